"""``/v1/completions``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from cluster.api.answers import (
    ChoiceRecord,
    Envelope,
    UsageCounter,
    extensions,
    generated,
)
from cluster.api.fields import GenerationFields, Texts, TokenIds
from cluster.api.logprobs import (
    TokenTexts,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from cluster.engine.text import TextStream
from cluster.errors import InvalidRequestError
from cluster.request import SamplingParams
from cluster.rpc.chunk import Chunk
from cluster.rpc.router import RouterServer
from cluster.security.api_keys import ApiKey

MAX_PROMPTS = 256

_TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True)]
_FIELD_NAMES = {"prompt.token_ids": "prompt"}
_BEST_OF_NAMES = {**_FIELD_NAMES, "n": "best_of"}


def _check_number(prompt: object) -> object:
    """Before each of very many is looked at, which takes seconds."""
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request")
    return prompt


class CompletionRequest(GenerationFields):
    """The body of ``/v1/completions``."""

    prompt: Annotated[str | TokenIds | Texts | _TokenIdLists, BeforeValidator(_check_number)] = (
        Field(description=f"text or token ids, or up to {MAX_PROMPTS} of either")
    )
    max_tokens: int = 16
    logprobs: int | None = Field(default=None, description="top log-probabilities a token, 0 to 20")
    echo: bool = Field(default=False, description="begin the text with the prompt")
    best_of: int | None = Field(
        default=None,
        description="n to 16: so many are made, and the n with the highest mean log-probability of "
        "a token answered, best first; not with stream",
    )
    add_special_tokens: bool = Field(
        default=True, description="those that the tokenizer puts around a text"
    )


class Completions:
    """One request's way through a router and back."""

    def __init__(
        self,
        router: RouterServer,
        fields: CompletionRequest,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams,
        key: ApiKey,
    ) -> None:
        self._router = router
        self._fields = fields
        self._prompts = prompts
        self._sampling = sampling
        self._num_choices = fields.n if fields.best_of is None else fields.best_of  # of a prompt
        self._key = key
        self._envelope = Envelope.new("cmpl", "text_completion", router.model_name)
        self._texts = TokenTexts(router.vocabulary, as_ids=fields.return_tokens_as_token_ids)
        self._usage = UsageCounter(
            [len(prompt) for prompt in prompts],
            with_speculation=fields.return_speculation_stats,
        )

    @classmethod
    async def of(cls, router: RouterServer, fields: CompletionRequest, key: ApiKey) -> Completions:
        """Checks and tokenises a request. Raises: InvalidRequestError, ModelNotFoundError."""
        router.check_model(fields.model)
        fields.check_together()
        if fields.n < 1:  # the engine sees best_of, where it is given
            raise InvalidRequestError("n", "must be at least 1")
        if fields.best_of is not None and fields.best_of < fields.n:
            raise InvalidRequestError("best_of", f"must be at least n ({fields.n})")
        ranks = fields.best_of is not None and fields.best_of > fields.n
        if ranks and fields.stream:
            raise InvalidRequestError("best_of", "above n cannot go with stream: true")
        sampling = fields.to_sampling(
            max_tokens=fields.max_tokens,
            logprobs=0 if ranks and fields.logprobs is None else fields.logprobs,
            grammar=fields.to_grammar(),
            prompt_logprobs=fields.logprobs if fields.echo else None,
        )
        kept = fields.kept_tokens(sampling, router.max_model_len)
        prompts = [
            await router.encoder.tokens(
                prompt, add_special_tokens=fields.add_special_tokens, max_tokens=kept
            )
            for prompt in _prompts(fields.prompt)
        ]
        return cls(router, fields, prompts, sampling, key)

    async def complete(self) -> dict[str, Any]:
        """The whole answer. Raises: DsparkError."""
        records: dict[int, ChoiceRecord] = defaultdict(ChoiceRecord)
        async with aclosing(self._chunks()) as chunks:
            async for index, chunk in chunks:
                records[index].add(chunk)
        choices = []
        for index, record in enumerate(self._best(records)):
            prefix = self._prefix(index)
            choice = {"index": index, "text": prefix + record.text}
            choice |= {"finish_reason": record.finish_reason, "logprobs": None}
            choice |= self._logprobs(index, record, len(prefix), is_first=True)
            choices.append(choice | extensions(self._fields, record))
        return self._envelope.of(choices, self._usage.usage())

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer piece by piece. Raises: DsparkError."""
        options = self._fields.stream_options
        with_usage = options is not None and options.continuous_usage_stats
        lengths: dict[int, int] = {}
        async with aclosing(self._chunks()) as chunks:
            async for index, chunk in chunks:
                is_first = index not in lengths
                prefix = self._prefix(index) if is_first else ""
                offset = lengths.get(index, 0) + len(prefix)
                lengths[index] = offset + len(chunk.text)
                choice = {"index": index, "text": prefix + chunk.text, "logprobs": None}
                reason = chunk.finish_reason
                choice["finish_reason"] = None if reason is None else reason.name.lower()
                choice |= self._logprobs(index, chunk, offset, is_first=is_first)
                yield self._envelope.of(
                    [choice | extensions(self._fields, chunk)],
                    self._usage.usage() if with_usage else None,
                )
        if options is not None and options.include_usage:
            yield self._envelope.of([], self._usage.usage())

    async def _chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Chunks by the choice's number over all prompts."""
        stream = generated(
            self._router,
            self._prompts,
            self._fields,
            self._sampling,
            num_choices=self._num_choices,
            key=self._key,
            request_id=self._envelope.id,
            field_names=_FIELD_NAMES if self._fields.best_of is None else _BEST_OF_NAMES,
        )
        async with aclosing(stream) as chunks:
            async for prompt_index, chunk in chunks:
                self._usage.add(prompt_index, chunk)
                yield prompt_index * self._num_choices + chunk.choice_index, chunk

    def _best(self, records: Mapping[int, ChoiceRecord]) -> list[ChoiceRecord]:
        """The choices that are answered: all, or each prompt's best."""
        made = [record for _, record in sorted(records.items())]
        if self._num_choices == self._fields.n:
            return made
        best = []
        for first in range(0, len(made), self._num_choices):
            candidates = made[first : first + self._num_choices]
            candidates.sort(key=lambda record: record.mean_logprob, reverse=True)
            best += candidates[: self._fields.n]
        return best

    def _logprobs(
        self, index: int, piece: ChoiceRecord | Chunk, offset: int, *, is_first: bool
    ) -> dict[str, Any]:
        """What was asked for of a piece of a choice, or of the whole.

        Args:
            offset: where the piece begins in the choice's text, an echoed prompt included.
            is_first: whether it is the choice's beginning.
        """
        fields = self._fields
        extra: dict[str, Any] = {}
        if is_first and fields.return_token_ids:
            extra["prompt_token_ids"] = self._prompts[index // fields.n]
        if is_first and fields.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(
                piece.prompt_logprobs, fields.prompt_logprobs, self._texts
            )
        if fields.logprobs is None:
            return extra
        shaped = completion_logprobs(piece.logprobs, piece.text_lengths, offset, self._texts)
        if is_first and fields.echo:
            prompt = self._prompts[index // fields.n]
            stream = TextStream(self._router.tokenizer)
            lengths = [len(stream.push(token_id).text) for token_id in prompt]
            echoed = echoed_logprobs(
                prompt, piece.prompt_logprobs, lengths, fields.logprobs, self._texts
            )
            shaped = {name: echoed[name] + values for name, values in shaped.items()}
        return {**extra, "logprobs": shaped}

    def _prefix(self, index: int) -> str:
        """What a choice's text begins with."""
        if not self._fields.echo:
            return ""
        number = index // self._fields.n
        given = _prompts(self._fields.prompt)[number]
        is_text = isinstance(given, str)
        if is_text and self._fields.truncate_prompt_tokens is None:
            return str(given)
        tokens = list(self._prompts[number])
        return str(self._router.tokenizer.decode(tokens, skip_special_tokens=is_text))


def _prompts(
    given: str | list[int] | list[str] | list[list[int]],
) -> Sequence[str | Sequence[int]]:
    """Each prompt by itself. Raises: InvalidRequestError."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequestError("prompt", "must not be empty")
    if isinstance(given[0], int):
        return [given]
    return given
