"""One request while it is being served."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.engine.draft_client import SessionKey
from cluster.engine.grammar import GrammarMatcher
from cluster.engine.text import TextStream
from cluster.engine.token_rules import TokenRules
from cluster.errors import DeadlineExceededError, InvalidRequestError, QueueFullError
from cluster.request import FinishReason, PositionLogprobs, Request, SpeculationStats, Usage
from cluster.speculation.proposal import DraftProposal


@dataclass(eq=False)
class Sequence:
    """Mutable state of a request; only the engine's thread touches it.

    Invariant between steps: positions ``0 .. num_computed_tokens-1`` are in the KV cache, and once
    the prompt is done ``num_computed_tokens == len(token_ids) - 1`` (the anchor has no keys yet).

    Attributes:
        token_ids: prompt and output; ``num_prompt_tokens`` of them are the prompt.
        pages: KV pages held, in order of position.
        page_digests: of its full pages, from the first on (``PrefixCache``).
        num_kept_pages: how many of its pages others can find, or others of the same content.
        num_cached_tokens: found in the prefix cache when it first started; ``None`` before.
        added_at: monotonic seconds.
        started_at: when it first left the queue; ``None`` before.
        num_waiting_tokens: while it waits: what will have to be computed of it, as far as is known.
        group: which of the groups in flight it belongs to while it runs.
        is_in_flight: part of a pass that is under way (its pages must not be touched).
        has_outdated_features: those in the cache are a former drafter's.
        end_error: set when it must end without finishing; acted on between passes.
        text: present where stop strings must be looked for.
        grammar: present where the output must follow one; it stands behind the output so far.
        rules: present where only some tokens may come.
        prompt_logprobs: of the prompt's tokens from the second on, as far as they were computed.
    """

    request: Request
    token_ids: list[int]
    num_prompt_tokens: int
    max_output_tokens: int
    num_computed_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    page_digests: list[bytes] = field(default_factory=list)
    num_kept_pages: int = 0
    num_cached_tokens: int | None = None
    added_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    num_waiting_tokens: int = 0
    group: int = 0
    is_in_flight: bool = False
    end_error: Exception | None = None
    has_outdated_features: bool = False
    text: TextStream | None = None
    grammar: GrammarMatcher | None = None
    rules: TokenRules | None = None
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    proposal: DraftProposal | None = None
    session: SessionKey | None = None
    session_epoch: int = 0
    num_fed_features: int = 0
    num_bulk_features: int = 0

    @classmethod
    def of(
        cls,
        request: Request,
        max_model_len: int,
        tokenizer: Any,
        grammar: GrammarMatcher | None = None,
    ) -> Sequence:
        """A request that nothing was done for yet.

        Args:
            max_model_len: no output goes beyond it.
            tokenizer: ``None`` if there is none; stop strings and words are looked for with it.
            grammar: of the request, at its beginning.

        Raises:
            InvalidRequestError: there are stop strings or bad words and no tokenizer, or the tokens
                to resume from do not follow the grammar.
        """
        text = None
        if request.sampling.stop:
            if tokenizer is None:
                raise InvalidRequestError("sampling.stop", "this engine has no tokenizer")
            text = TextStream.of(tokenizer, request.sampling)
            for token_id in request.resume_token_ids:
                text.push(token_id)
        if grammar is not None and not grammar.accept(request.resume_token_ids):
            raise InvalidRequestError("resume_token_ids", "do not follow the grammar")
        num_prompt_tokens = len(request.prompt_token_ids)
        return cls(
            request=request,
            token_ids=[*request.prompt_token_ids, *request.resume_token_ids],
            num_prompt_tokens=num_prompt_tokens,
            max_output_tokens=min(request.sampling.max_tokens, max_model_len - num_prompt_tokens),
            text=text,
            grammar=grammar,
            rules=TokenRules.of(request.sampling, tokenizer),
        )

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, resumed ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_missing_tokens(self) -> int:
        """Committed tokens that are not in the KV cache yet (1 while decoding)."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def has_started(self) -> bool:
        """Whether anything of it was ever computed, or found."""
        return self.num_cached_tokens is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of its prompt's log-probabilities are still to be computed."""
        return (
            self.request.sampling.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt_tokens - 1
        )

    @property
    def room(self) -> int:
        """Output tokens that may still follow."""
        return self.max_output_tokens - self.num_output_tokens

    def overdue_error(self, now: float) -> Exception | None:
        """Why it must end without finishing, where its time is over."""
        request = self.request
        if request.deadline is not None and now >= request.deadline:
            return DeadlineExceededError("the request's deadline passed")
        if self.has_started or request.queue_deadline is None or now < request.queue_deadline:
            return None
        return QueueFullError("the request waited too long", retry_after_s=1.0)

    def append(
        self, token_ids: Iterable[int], eos_token_ids: Collection[int]
    ) -> FinishReason | None:
        """Commits tokens up to where the output ends; returns why it ends there, if it does."""
        if self.room <= 0:  # nothing was to come behind the prompt
            return FinishReason.LENGTH
        for token_id in token_ids:
            self.token_ids.append(token_id)
            reason = self._finish_reason(token_id, eos_token_ids)
            if reason is not None:
                return reason
            if self.grammar is not None:
                self.grammar.accept((token_id,))
        return None

    def check_grammar(self) -> bool:
        """Whether what was sampled can be committed; it cannot where the grammar has failed, and
        then the request ends."""
        error = self.grammar.error if self.grammar is not None else None
        if error is not None:
            self.end_error = InvalidRequestError("sampling.grammar", error)
        return error is None

    def usage(self) -> Usage:
        """What it has used so far."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_output_tokens,
            cached_prompt_tokens=min(self.num_cached_tokens or 0, self.num_prompt_tokens),
            queue_s=0.0 if self.started_at is None else self.started_at - self.added_at,
            speculation=self.stats,
        )

    def _finish_reason(self, token_id: int, eos_token_ids: Collection[int]) -> FinishReason | None:
        params = self.request.sampling
        if self.text is not None and self.text.push(token_id).stopped:
            return FinishReason.STOP
        is_eos = token_id in eos_token_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.room <= 0 else None
