"""What completions and chat completions have in common on their way back."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from cluster.api.errors import to_client_field
from cluster.api.fields import GenerationFields
from cluster.api.streaming import merged
from cluster.errors import InvalidRequestError
from cluster.request import PositionLogprobs, SamplingParams, SpeculationStats, Usage
from cluster.rpc.chunk import Chunk, chunk_from_proto
from cluster.rpc.convert import GenerateCall, generate_call_from_proto, generate_call_to_proto
from cluster.rpc.router import RouterServer
from cluster.rpc.siblings import Siblings
from cluster.security.api_keys import ApiKey


@dataclass(frozen=True)
class Envelope:
    """What every object of one answer begins with."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, kind: str, model: str) -> Envelope:
        """Of a new answer; ``id`` begins with ``prefix``."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", kind, int(time.time()), model)

    def of(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        """The object with its choices; ``usage`` unset: without."""
        body = {**vars(self), "choices": choices}
        return body if usage is None else {**body, "usage": usage}


@dataclass
class ChoiceRecord:
    """Everything that one choice has received."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_sources: list[str] = field(default_factory=list)
    text_lengths: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, where log-probabilities were asked for; 0 without any."""
        if not self.logprobs:
            return 0.0
        return fmean(position.chosen.logprob for position in self.logprobs)

    def add(self, chunk: Chunk) -> None:
        """Appends a piece."""
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.token_sources += [source.name.lower() for source in chunk.token_sources]
        self.text_lengths += chunk.text_lengths
        self.logprobs += chunk.logprobs
        self.prompt_logprobs += chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason.name.lower()
        self.usage = chunk.usage or self.usage


class UsageCounter:
    """Usage over all choices of an answer.

    Args:
        prompt_lengths: tokens of each prompt; its choices share them.
    """

    def __init__(self, prompt_lengths: Sequence[int], *, with_speculation: bool) -> None:
        self._num_prompt_tokens = sum(prompt_lengths)
        self._with_speculation = with_speculation
        self._num_completion_tokens = 0
        self._num_cached: dict[int, int] = {}
        self._stats = SpeculationStats()

    def add(self, prompt_index: int, chunk: Chunk) -> None:
        """Counts a piece."""
        self._num_completion_tokens += len(chunk.token_ids)
        if chunk.usage is None:
            return
        cached = self._num_cached.get(prompt_index, 0)
        self._num_cached[prompt_index] = max(cached, chunk.usage.cached_prompt_tokens)
        _add_stats(self._stats, chunk.usage.speculation)

    def usage(self) -> dict[str, Any]:
        """As OpenAI has it, with our counts of speculation where asked for."""
        usage: dict[str, Any] = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached.values())},
        }
        if self._with_speculation:
            length = self._stats.acceptance_length
            usage["speculation"] = {**vars(self._stats), "acceptance_length": round(length, 3)}
        return usage


async def generated(
    router: RouterServer,
    prompts: Sequence[Sequence[int]],
    fields: GenerationFields,
    sampling: SamplingParams,
    *,
    num_choices: int,
    key: ApiKey,
    request_id: str,
    field_names: dict[str, str],
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """All prompts' chunks as they come, with the prompt's number.

    Args:
        num_choices: of each prompt.
        key: whose request it is.
        field_names: how the client wrote fields of ``cluster.request`` that are named otherwise.

    Raises:
        DsparkError: as ``RouterServer.generate``, with the client's field.
    """
    names = {"sampling.grammar": fields.grammar_field, **field_names}
    siblings = Siblings()
    with client_fields(names):
        if len(prompts) > 1:
            lengths = [min(len(p) + sampling.max_tokens, router.max_model_len) for p in prompts]
            router.check_fits(num_choices * sum(lengths), fields.to_priority())
        streams = [
            _chunks(
                router,
                GenerateCall(
                    request_id=f"{request_id}-{index}",
                    prompt=tuple(prompt),
                    sampling=sampling,
                    speculation=fields.to_speculation(),
                    num_choices=num_choices,
                    resume_token_ids=(),
                    attempt=0,
                    priority=fields.to_priority(),
                ),
                fields.timeout_seconds,
                key,
                siblings,
            )
            for index, prompt in enumerate(prompts)
        ]
        async with aclosing(merged(streams)) as chunks:
            async for numbered in chunks:
                yield numbered


@contextmanager
def client_fields(names: dict[str, str]) -> Iterator[None]:
    """Errors within name fields as the client wrote them; ``names`` as for ``to_client_field``."""
    try:
        yield
    except InvalidRequestError as error:
        raise type(error)(to_client_field(error.field, names), error.message) from None


def extensions(fields: GenerationFields, piece: ChoiceRecord | Chunk) -> dict[str, Any]:
    """What a choice carries beside OpenAI's fields, where it was asked for."""
    record = piece
    if isinstance(piece, Chunk):
        record = ChoiceRecord()
        record.add(piece)
    assert isinstance(record, ChoiceRecord)
    extra: dict[str, Any] = {}
    if fields.return_token_ids:
        extra["token_ids"] = record.token_ids
    if fields.return_token_sources:
        extra["token_sources"] = record.token_sources
        extra["text_lengths"] = record.text_lengths
    return extra


async def _chunks(
    router: RouterServer,
    call: GenerateCall,
    timeout_s: float | None,
    key: ApiKey,
    siblings: Siblings,
) -> AsyncGenerator[Chunk, None]:
    # Through the wire's types: what a number may be, and how it is rounded, is as over gRPC.
    call = generate_call_from_proto(generate_call_to_proto(call))
    stream = router.generate(call, timeout_s, key, siblings=siblings)
    async with aclosing(stream) as messages:
        async for message in messages:
            yield chunk_from_proto(message)


def _add_stats(total: SpeculationStats, stats: SpeculationStats) -> None:
    for name, value in vars(stats).items():
        if isinstance(value, int):
            setattr(total, name, getattr(total, name) + value)
    mine, theirs = total.num_accepted_tokens_per_pos, stats.num_accepted_tokens_per_pos
    mine.extend([0] * (len(theirs) - len(mine)))
    for position, count in enumerate(theirs):
        mine[position] += count
