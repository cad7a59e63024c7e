"""How a client goes on with a call whose stream broke."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import grpc

from cluster.errors import (
    ClusterStateError,
    DeadlineExceededError,
    DsparkError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
    RouterStoppingError,
)
from cluster.rpc.chunk import Chunk, chunk_from_proto
from cluster.rpc.convert import GenerateCall, generate_call_to_proto
from cluster.rpc.status import from_rpc_error, has_details
from cluster.v1 import inference_pb2

# In the headers of an answer: which router has admitted the call.
ROUTER_HEADER = "dspark-router"

_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 1.0
# A call that no router has admitted is tried so often; a router may just be handing over its port.
_MAX_UNANSWERED = 4
# What gRPC ends a call with, of itself, when the connection breaks.
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class Resumption:
    """One call over all its attempts: what is there of it, and whether and when it goes on.

    Guarantees: of a call with one choice no token is passed on twice and none is left out,
    whatever routers send: a chunk that does not begin where the last one ended is not taken. Each
    attempt carries the tokens that are there and a higher number, so that a router which still
    runs an earlier one ends that. A router that had taken the call and is being stopped costs it
    none of its time to go on; where full queues are all that keeps it from going on, it is tried
    until its deadline. The prompt's log-probabilities come once. A call with several choices is
    begun anew as long as nothing of it has come, and fails behind that.

    Args:
        call: of the first attempt; without a request id it gets a random one.
        address: of the routers, for messages.
        timeout_s: the call's deadline from now; unset: none.
        resume_timeout_s: how long it is tried to go on, from when the stream broke, where it has no
            deadline or no router answers; 0: not at all.
    """

    def __init__(
        self, call: GenerateCall, address: str, *, timeout_s: float | None, resume_timeout_s: float
    ) -> None:
        self._call = replace(call, request_id=call.request_id or uuid.uuid4().hex)
        self._address = address
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._resume_timeout_s = resume_timeout_s
        self._token_ids = list(call.resume_token_ids)
        self._num_ended = 0  # choices
        self._has_prompt_logprobs = False
        self._has_begun = False  # something of it was received
        self._was_admitted = False
        self._is_refused = False  # the last attempt, by a router whose queues are full
        self._num_failures = 0  # since the last chunk
        self._broken_at = 0.0  # the first of them
        self._cause: DsparkError | None = None  # of the first of them

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended, whatever becomes of the stream."""
        return 0 < self._call.num_choices == self._num_ended

    def request(self) -> inference_pb2.GenerateRequest:
        """What to send for the attempt that is due."""
        return generate_call_to_proto(self._call)

    def timeout_s(self) -> float | None:
        """Of that attempt. Raises: DeadlineExceededError: it is too late."""
        if self._deadline is None:
            return None
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceededError("the request's deadline passed")
        return left_s

    def take(self, message: inference_pb2.GenerateResponse) -> Chunk | None:
        """The next chunk; ``None``: the stream repeats or skips tokens, and is to be left."""
        if self._call.num_choices == 1:
            if message.token_offset != len(self._token_ids):
                self._fail(DsparkError("the router repeated or skipped tokens"))
                return None
            self._token_ids += message.token_ids
            if self._has_prompt_logprobs:
                message.ClearField("prompt_logprobs")
            self._has_prompt_logprobs |= bool(message.prompt_logprobs)
        self._has_begun = self._was_admitted = True
        self._num_failures = 0
        self._num_ended += message.finish_reason != 0
        return chunk_from_proto(message)

    def failed(self, error: grpc.RpcError, headers: Iterable[tuple[str, Any]] | None) -> None:
        """Takes the end of an attempt.

        Args:
            headers: of the answer, as far as they came.

        Raises:
            DsparkError: the call has failed with it.
        """
        is_admitted = any(key == ROUTER_HEADER for key, _ in headers or ())
        self._was_admitted |= is_admitted
        rebuilt = from_rpc_error(error)
        is_broken = not has_details(error) and error.code() in _BROKEN
        if self._cause is not None and isinstance(rebuilt, InvalidRequestError):
            raise self._cause from None  # what is there cannot be gone on with
        is_stopping = isinstance(rebuilt, RouterStoppingError)
        self._is_refused = self._num_failures > 0 and isinstance(rebuilt, QueueFullError)
        if not (is_broken or self._is_refused or is_stopping):
            raise rebuilt from None
        if is_stopping and is_admitted:
            self._num_failures = 0
        self._fail(rebuilt)

    def next_delay_s(self) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            DsparkError: what the call has failed with, if there is to be none.
        """
        cause = self._cause or ReplicaLostError("the stream has ended")
        if self._has_begun and self._call.num_choices > 1:
            raise cause
        if self._was_admitted or isinstance(cause, RouterStoppingError):
            waits = self._is_refused and self._deadline is not None and self._resume_timeout_s > 0
            if not waits and time.monotonic() >= self._broken_at + self._resume_timeout_s:
                raise cause
        elif self._num_failures >= _MAX_UNANSWERED or self._resume_timeout_s == 0:
            if isinstance(cause, ReplicaLostError):
                raise ClusterStateError(f"no cluster answers at {self._address}: {cause}")
            raise cause
        sampling = self._call.sampling
        if self._has_prompt_logprobs:
            sampling = replace(sampling, prompt_logprobs=None)
        self._call = replace(
            self._call,
            sampling=sampling,
            resume_token_ids=tuple(self._token_ids),
            attempt=self._call.attempt + 1,
        )
        delay_s = min(_FIRST_DELAY_S * 2.0 ** (self._num_failures - 1), _MAX_DELAY_S)
        return delay_s * random.uniform(0.5, 1.5)

    def _fail(self, cause: DsparkError) -> None:
        if self._num_failures == 0:
            self._broken_at = time.monotonic()
            self._cause = cause
        self._num_failures += 1
