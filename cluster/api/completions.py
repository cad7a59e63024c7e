"""``/v1/completions``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import Field

from cluster.api.answers import (
    ChoiceRecord,
    Envelope,
    UsageCounter,
    check_model,
    extensions,
    generated,
)
from cluster.api.fields import GenerationFields
from cluster.api.logprobs import TokenTexts, completion_logprobs
from cluster.errors import InvalidRequestError
from cluster.request import SamplingParams
from cluster.rpc.chunk import Chunk
from cluster.rpc.router import RouterServer
from cluster.security.api_keys import ApiKey

MAX_PROMPTS = 256

_FIELD_NAMES = {"prompt.token_ids": "prompt"}
_BEST_OF_NAMES = {**_FIELD_NAMES, "n": "best_of"}


class CompletionRequest(GenerationFields):
    """The body of ``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description=f"text or token ids, or up to {MAX_PROMPTS} of either"
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
        self._texts = TokenTexts(router.vocabulary)
        self._usage = UsageCounter(
            [len(prompt) for prompt in prompts],
            with_speculation=fields.return_speculation_stats,
        )

    @classmethod
    async def of(cls, router: RouterServer, fields: CompletionRequest, key: ApiKey) -> Completions:
        """Checks and tokenises a request. Raises: InvalidRequestError, ModelNotFoundError."""
        check_model(router, fields.model)
        fields.check_together()
        if fields.best_of is not None and fields.best_of < fields.n:
            raise InvalidRequestError("best_of", f"must be at least n ({fields.n})")
        ranks = fields.best_of is not None and fields.best_of > fields.n
        if ranks and fields.stream:
            raise InvalidRequestError("best_of", "above n cannot go with stream: true")
        if fields.echo and fields.logprobs is not None:
            raise InvalidRequestError(
                "echo", "with logprobs is not served: there are none of the prompt"
            )
        sampling = fields.to_sampling(
            max_tokens=fields.max_tokens,
            logprobs=0 if ranks and fields.logprobs is None else fields.logprobs,
            grammar=fields.to_grammar(),
        )
        prompts = [
            await router.encoder.encode(prompt, add_special_tokens=fields.add_special_tokens)
            if isinstance(prompt, str)
            else tuple(prompt)
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
            if self._fields.logprobs is not None:
                choice["logprobs"] = completion_logprobs(
                    record.logprobs, record.text_lengths, len(prefix), self._texts
                )
            choices.append(choice | extensions(self._fields, record))
        return self._envelope.of(choices, self._usage.usage())

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer piece by piece. Raises: DsparkError."""
        options = self._fields.stream_options
        with_usage = options is not None and options.continuous_usage_stats
        lengths: dict[int, int] = {}
        async with aclosing(self._chunks()) as chunks:
            async for index, chunk in chunks:
                text = chunk.text
                if index not in lengths:
                    text = self._prefix(index) + text
                offset = lengths.get(index, 0)
                lengths[index] = offset + len(text)
                yield self._envelope.of(
                    [self._delta(index, text, offset, chunk)],
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

    def _delta(self, index: int, text: str, offset: int, chunk: Chunk) -> dict[str, Any]:
        reason = chunk.finish_reason
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "finish_reason": None if reason is None else reason.name.lower(),
            "logprobs": None,
        }
        if self._fields.logprobs is not None:
            choice["logprobs"] = completion_logprobs(
                chunk.logprobs, chunk.text_lengths, offset, self._texts
            )
        return choice | extensions(self._fields, chunk)

    def _prefix(self, index: int) -> str:
        """What a choice's text begins with."""
        if not self._fields.echo:
            return ""
        number = index // self._fields.n
        given = _prompts(self._fields.prompt)[number]
        if isinstance(given, str):
            return given
        return str(self._router.tokenizer.decode(list(given)))


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
    if len(given) > MAX_PROMPTS:
        raise InvalidRequestError("prompt", f"at most {MAX_PROMPTS} prompts in one request")
    return given
