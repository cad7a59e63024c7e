"""Messages of ``cluster.v1`` as the plain data of ``cluster.request``, and back.

Fields that are not set take the defaults of ``cluster.request``. ``float`` is 32 bits wide on the
wire: a temperature of 0.7 arrives as 0.699999988, on every replica the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.message import Message

from cluster.engine.pace import PaceStats
from cluster.errors import InvalidRequestError
from cluster.grammar import JSON_OBJECT, Grammar, GrammarKind
from cluster.request import (
    MAX_CHOICES,
    FinishReason,
    PositionLogprobs,
    Priority,
    Request,
    RequestOutput,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
    SpeculationStats,
    TokenLogprob,
    TokenSource,
    Usage,
)
from cluster.rpc.status import to_request_error
from cluster.v1 import common_pb2, inference_pb2, replica_pb2

MAX_REQUEST_ID_CHARS = 128

_SCALARS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "max_tokens",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
_LISTS = ("stop_token_ids", "stop", "allowed_token_ids", "bad_words")
_MODE_TO_PROTO = {
    SpeculationMode.AUTO: common_pb2.SPECULATION_MODE_AUTO,
    SpeculationMode.OFF: common_pb2.SPECULATION_MODE_OFF,
}
_MODE_FROM_PROTO = {
    common_pb2.SPECULATION_MODE_UNSPECIFIED: SpeculationMode.AUTO,
    common_pb2.SPECULATION_MODE_AUTO: SpeculationMode.AUTO,
    common_pb2.SPECULATION_MODE_OFF: SpeculationMode.OFF,
}
_PRIORITIES = {int(priority): priority for priority in Priority}
_SOURCES = {int(source): source for source in TokenSource}


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """What a client asked for, before it is tokenised.

    Attributes:
        request_id: the client's, or empty.
        prompt: text or token ids.
        num_choices: n, 1..16.
        resume_token_ids: empty unless ``num_choices`` is 1.
        model: its name, if the client gave one.
        truncate_prompt_tokens: as for ``cluster.rpc.prompt.kept_tokens``.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    speculation: SpeculationParams
    num_choices: int
    resume_token_ids: tuple[int, ...]
    attempt: int
    priority: Priority = Priority.DEFAULT
    truncate_prompt_tokens: int | None = None
    model: str | None = None


def generate_call_from_proto(message: inference_pb2.GenerateRequest) -> GenerateCall:
    """Reads a client's request.

    Raises:
        InvalidRequestError: naming the first field that is missing, unknown or contradicts another.
    """
    call = call_from_proto(message)
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("prompt", "is required")
    return replace(call, prompt=message.text if kind == "text" else tuple(message.token_ids.ids))


def call_from_proto(
    message: inference_pb2.GenerateRequest | inference_pb2.ChatRequest,
) -> GenerateCall:
    """Reads all but the prompt. Raises: InvalidRequestError."""
    if len(message.request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequestError("request_id", f"at most {MAX_REQUEST_ID_CHARS} characters")
    num_choices = message.n if message.HasField("n") else 1
    if not 1 <= num_choices <= MAX_CHOICES:
        raise InvalidRequestError("n", f"must be between 1 and {MAX_CHOICES}, got {num_choices}")
    resume_token_ids = tuple(message.resume_token_ids.ids)
    if resume_token_ids and num_choices != 1:
        raise InvalidRequestError("resume_token_ids", "only a request with n = 1 can be resumed")
    if message.attempt < 0:
        raise InvalidRequestError("attempt", f"must be 0 or more, got {message.attempt}")
    return GenerateCall(
        request_id=message.request_id,
        prompt=(),
        sampling=sampling_from_proto(message.sampling),
        speculation=speculation_from_proto(message.speculation),
        num_choices=num_choices,
        resume_token_ids=resume_token_ids,
        attempt=message.attempt,
        priority=priority_from_proto(message.priority),
        truncate_prompt_tokens=(
            message.truncate_prompt_tokens if message.HasField("truncate_prompt_tokens") else None
        ),
        model=message.model if message.HasField("model") else None,
    )


def generate_call_to_proto(call: GenerateCall) -> inference_pb2.GenerateRequest:
    """Writes a client's request.

    Raises:
        InvalidRequestError: a value does not fit its field (type, 32 bits, valid Unicode).
    """
    message = inference_pb2.GenerateRequest()
    _assign(message, "request_id", call.request_id)
    if isinstance(call.prompt, str):
        _assign(message, "text", call.prompt, name="prompt")
    else:
        message.token_ids.SetInParent()
        _extend(message.token_ids.ids, call.prompt, name="prompt.token_ids")
    message.sampling.CopyFrom(sampling_to_proto(call.sampling))
    message.speculation.CopyFrom(speculation_to_proto(call.speculation))
    _assign(message, "n", call.num_choices)
    if call.resume_token_ids:
        _extend(message.resume_token_ids.ids, call.resume_token_ids, name="resume_token_ids")
    _assign(message, "attempt", call.attempt)
    _assign(message, "priority", call.priority)
    if call.truncate_prompt_tokens is not None:
        _assign(message, "truncate_prompt_tokens", call.truncate_prompt_tokens)
    if call.model is not None:
        _assign(message, "model", call.model)
    return message


def priority_from_proto(priority: int) -> Priority:
    """Reads a priority. Raises: InvalidRequestError for one of a later version."""
    if priority == common_pb2.PRIORITY_UNSPECIFIED:
        return Priority.DEFAULT
    if priority not in _PRIORITIES:
        raise InvalidRequestError("priority", f"unknown value {priority}")
    return _PRIORITIES[priority]


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    """Reads sampling parameters; the values are not checked (``SamplingParams.validate`` does).

    Raises:
        InvalidRequestError: a kind of grammar of a later version.
    """
    given: dict[str, Any] = {
        name: getattr(message, name) for name in _SCALARS if message.HasField(name)
    }
    given |= {name: tuple(getattr(message, name)) for name in _LISTS}
    return SamplingParams(
        **given,
        logit_bias=dict(message.logit_bias),
        grammar=_grammar_from_proto(message.grammar) if message.HasField("grammar") else None,
    )


def sampling_to_proto(sampling: SamplingParams) -> common_pb2.SamplingParams:
    """Writes sampling parameters, defaults included. Raises: InvalidRequestError."""
    message = common_pb2.SamplingParams()
    for name in _SCALARS:
        value = getattr(sampling, name)
        if value is not None:
            _assign(message, name, value, name=f"sampling.{name}")
    for name in _LISTS:
        _extend(getattr(message, name), getattr(sampling, name), name=f"sampling.{name}")
    try:
        message.logit_bias.update(sampling.logit_bias)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError("sampling.logit_bias", str(error)) from None
    if sampling.grammar is not None:
        kind, source = sampling.grammar.kind.value, sampling.grammar.source
        _assign(message.grammar, kind, source, name="sampling.grammar")
    return message


def speculation_from_proto(message: common_pb2.SpeculationParams) -> SpeculationParams:
    """Reads speculation settings. Raises: InvalidRequestError for a mode of a later version."""
    mode = _MODE_FROM_PROTO.get(message.mode)
    if mode is None:
        raise InvalidRequestError("speculation.mode", f"unknown value {message.mode}")
    cap = message.num_speculative_tokens if message.HasField("num_speculative_tokens") else None
    return SpeculationParams(mode=mode, num_speculative_tokens=cap)


def speculation_to_proto(speculation: SpeculationParams) -> common_pb2.SpeculationParams:
    """Writes speculation settings. Raises: InvalidRequestError."""
    message = common_pb2.SpeculationParams(mode=_MODE_TO_PROTO[speculation.mode])
    if speculation.num_speculative_tokens is not None:
        name = "num_speculative_tokens"
        _assign(message, name, speculation.num_speculative_tokens, name=f"speculation.{name}")
    return message


def submit_to_proto(request: Request) -> replica_pb2.ConnectRequest:
    """Writes a validated request for a replica; its deadline becomes what is left of it."""
    message = replica_pb2.ConnectRequest()
    submit = message.submit
    submit.request_id = request.request_id
    submit.attempt = request.attempt
    submit.choice_index = request.choice_index
    submit.prompt_token_ids.extend(request.prompt_token_ids)
    submit.resume_token_ids.extend(request.resume_token_ids)
    submit.sampling.CopyFrom(sampling_to_proto(request.sampling))
    submit.speculation.CopyFrom(speculation_to_proto(request.speculation))
    if request.deadline is not None:
        submit.timeout_seconds = max(request.deadline - time.monotonic(), 0.0)
    submit.traceparent = request.traceparent
    submit.priority = int(request.priority)  # type: ignore[assignment]
    if request.queue_deadline is not None:
        submit.queue_timeout_seconds = max(request.queue_deadline - time.monotonic(), 0.0)
    return message


def submit_from_proto(submit: replica_pb2.ConnectRequest.Submit, request_id: str) -> Request:
    """Reads a router's request, to run under ``request_id``. Raises: InvalidRequestError."""
    deadline = None
    if submit.HasField("timeout_seconds"):
        deadline = time.monotonic() + submit.timeout_seconds
    queue_deadline = None
    if submit.HasField("queue_timeout_seconds"):
        queue_deadline = time.monotonic() + submit.queue_timeout_seconds
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(submit.prompt_token_ids),
        sampling=sampling_from_proto(submit.sampling),
        speculation=speculation_from_proto(submit.speculation),
        resume_token_ids=tuple(submit.resume_token_ids),
        choice_index=submit.choice_index,
        deadline=deadline,
        attempt=submit.attempt,
        priority=priority_from_proto(submit.priority),
        queue_deadline=queue_deadline,
        traceparent=submit.traceparent,
    )


def add_output(delta: replica_pb2.ConnectResponse.Delta, output: RequestOutput) -> None:
    """Appends what a step changed for a request to its delta that was not sent yet."""
    if not delta.token_ids:
        delta.token_offset = output.token_offset
    delta.token_ids.extend(output.token_ids)
    # The enumerations have the same values on both sides.
    delta.token_sources.extend(map(int, output.token_sources))  # type: ignore[arg-type]
    pairs = (delta.logprobs, output.logprobs), (delta.prompt_logprobs, output.prompt_logprobs)
    for entries, positions in pairs:
        for position in positions:
            entry = entries.add()
            _set_logprob(entry.chosen, position.chosen)
            for top in position.top:
                _set_logprob(entry.top.add(), top)
    if output.finish_reason is not None:
        delta.finish_reason = int(output.finish_reason)  # type: ignore[assignment]
    if output.usage is not None:
        delta.usage.CopyFrom(usage_to_proto(output.usage))
    if output.error is not None:
        delta.error.CopyFrom(to_request_error(output.error))


def token_sources_from_proto(sources: Iterable[int]) -> tuple[TokenSource, ...]:
    """Reads token sources; one that a later version added counts as the target's."""
    return tuple(_SOURCES.get(source, TokenSource.TARGET) for source in sources)


def finish_reason_from_proto(reason: int) -> FinishReason | None:
    """Reads a finish reason: None while unfinished, and STOP for one of a later version."""
    if reason == common_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    return FinishReason.LENGTH if reason == FinishReason.LENGTH else FinishReason.STOP


def logprobs_from_proto(
    positions: Iterable[common_pb2.PositionLogprobs],
) -> tuple[PositionLogprobs, ...]:
    """Reads log-probabilities, one entry per token."""
    return tuple(
        PositionLogprobs(
            TokenLogprob(position.chosen.token_id, position.chosen.logprob),
            tuple(TokenLogprob(top.token_id, top.logprob) for top in position.top),
        )
        for position in positions
    )


def stats_to_proto(stats: SpeculationStats) -> common_pb2.SpeculationStats:
    """Writes speculation statistics."""
    return common_pb2.SpeculationStats(**vars(stats))


def stats_from_proto(message: common_pb2.SpeculationStats) -> SpeculationStats:
    """Reads speculation statistics."""
    return SpeculationStats(
        num_drafts=message.num_drafts,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
        num_accepted_tokens_per_pos=list(message.num_accepted_tokens_per_pos),
        num_steps=message.num_steps,
        num_late_proposals=message.num_late_proposals,
        num_stale_proposals=message.num_stale_proposals,
        num_malformed_proposals=message.num_malformed_proposals,
    )


def pace_to_proto(stats: PaceStats) -> common_pb2.Pace:
    """Writes what is paced, and how well."""
    return common_pb2.Pace(**vars(stats))


def pace_from_proto(message: Message) -> PaceStats | None:
    """Reads the field ``paced`` of a message, if it is set."""
    if not message.HasField("paced"):
        return None
    paced: common_pb2.Pace = message.paced  # type: ignore[attr-defined]
    return PaceStats(
        profile=paced.profile,
        time_scale=paced.time_scale,
        num_passes=paced.num_passes,
        num_overruns=paced.num_overruns,
        worst_overrun=paced.worst_overrun,
    )


def usage_to_proto(usage: Usage) -> common_pb2.Usage:
    """Writes token counts."""
    return common_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        queue_seconds=usage.queue_s,
        speculation=stats_to_proto(usage.speculation),
    )


def usage_from_proto(message: common_pb2.Usage) -> Usage:
    """Reads token counts."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        queue_s=message.queue_seconds,
        speculation=stats_from_proto(message.speculation),
    )


def _grammar_from_proto(message: common_pb2.Grammar) -> Grammar:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequestError("sampling.grammar", "has no kind that is known here")
    if kind == "json_object":
        return JSON_OBJECT
    return Grammar(GrammarKind(kind), getattr(message, kind))


def _set_logprob(message: common_pb2.TokenLogprob, value: TokenLogprob) -> None:
    message.token_id = value.token_id
    message.logprob = value.logprob


def _assign(message: Message, field: str, value: object, *, name: str | None = None) -> None:
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(name or field, str(error)) from None


def _extend(repeated: object, values: Iterable[object], *, name: str) -> None:
    try:
        repeated.extend(values)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(name, str(error)) from None
