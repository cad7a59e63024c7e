"""What a client receives: a piece of one choice."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.request import FinishReason, PositionLogprobs, TokenSource, Usage
from cluster.rpc.convert import (
    finish_reason_from_proto,
    logprobs_from_proto,
    token_sources_from_proto,
    usage_from_proto,
)
from cluster.v1 import inference_pb2


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of one choice.

    Attributes:
        text: what became final with this piece; it may lag behind the tokens.
        offset: index in the completion of the first of ``token_ids``.
        token_sources: one per token.
        text_lengths: one per token: characters of ``text`` that it made final, in order. What is
            left of ``text`` behind them was held back until the end.
        logprobs: one per token where asked for, else empty.
        prompt_logprobs: on the choice's first piece where asked for: one per prompt token but the
            first.
        finish_reason, usage: set on the choice's last chunk.
    """

    request_id: str
    choice_index: int
    attempt: int
    offset: int
    token_ids: tuple[int, ...]
    token_sources: tuple[TokenSource, ...]
    text: str
    text_lengths: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


def chunk_from_proto(message: inference_pb2.GenerateResponse) -> Chunk:
    """Reads a chunk."""
    return Chunk(
        request_id=message.request_id,
        choice_index=message.choice_index,
        attempt=message.attempt,
        offset=message.token_offset,
        token_ids=tuple(message.token_ids),
        token_sources=token_sources_from_proto(message.token_sources),
        text=message.text,
        text_lengths=tuple(message.text_lengths),
        logprobs=logprobs_from_proto(message.logprobs),
        prompt_logprobs=logprobs_from_proto(message.prompt_logprobs),
        finish_reason=finish_reason_from_proto(message.finish_reason),
        usage=usage_from_proto(message.usage) if message.HasField("usage") else None,
    )
