"""One completion on its way from replicas to a client."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from cluster.engine.text import TextStream
from cluster.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
)
from cluster.request import FinishReason, Request
from cluster.routing.replica_picker import Prompt
from cluster.rpc.replica_connection import ReplicaConnection
from cluster.rpc.replica_pool import ReplicaPool
from cluster.rpc.siblings import Siblings
from cluster.rpc.status import from_request_error
from cluster.v1 import inference_pb2, replica_pb2

logger = logging.getLogger(__name__)

# A request that makes engines fail must not take down replica after replica.
MAX_LOSSES_WITHOUT_PROGRESS = 3
# Replicas that are asked before a client is told that all queues are full.
MAX_REFUSALS = 3
_CLOCK_SLACK_S = 0.001

_submission_numbers = itertools.count()


class Choice:
    """One of a request's choices, wherever it runs.

    Guarantees: the client's tokens are a single unbroken sequence. When its replica is lost, the
    choice goes on elsewhere behind the tokens that were received, on the same target unless there
    are none; the third loss in a row without a new token ends it, where replicas that drained do
    not count. Where one replica's queue is full, two others are tried; then it waits, if it has
    siblings or was accepted before (``Siblings``): until its deadline, or without one for the
    pool's ``wait_s`` in which nothing comes of them. Each submission has an id of its own, and a
    token offset that repeats or skips anything is never passed on. Holds at most one chunk for the
    client, whose tokens are merged while it does not read. The speculation statistics at the end
    are those of the last replica alone.

    Args:
        request: the validated request; its id is the client's.
        tokenizer: turns tokens into the client's text.
        pool: where to run.
        on_change: called when ``take`` has something new, or the choice has ended.
        eos_token_ids: tokens that end an output, unless the request ignores them.
        siblings: the other choices of the client's request; unset: there are none.
        prompt: of the request with the tokens that it resumes, where somebody has it already.
        queue_timeout_s: unset, or how long a replica may leave it waiting before its first token.

    Raises:
        InvalidRequestError: the resumed tokens hold a stop string already.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerFast,
        pool: ReplicaPool,
        on_change: Callable[[], None],
        eos_token_ids: Collection[int] = (),
        *,
        siblings: Siblings | None = None,
        prompt: Prompt | None = None,
        queue_timeout_s: float | None = None,
    ) -> None:
        self.error: Exception | None = None
        self.done = False
        self._request = request
        self._pool = pool
        self._prompt = prompt
        self._queue_timeout_s = queue_timeout_s
        self._queue_deadline: float | None = None
        self._refusal: QueueFullError | None = None  # the last one
        self._was_lost = False
        self._refused_by: list[ReplicaConnection] = []  # since the last new token
        self._siblings = siblings or Siblings()
        self._on_change = on_change
        self._ending_token_ids = request.sampling.ending_token_ids(eos_token_ids)
        self._num_losses = 0  # since the last new token
        self._token_ids = list(request.resume_token_ids)
        self._text = TextStream.of(tokenizer, request.sampling)
        for token_id in self._token_ids:
            self._text.push(token_id)
        if self._text.stopped:
            raise InvalidRequestError("resume_token_ids", "already holds a stop string")
        self._has_prompt_logprobs = False
        self._chunk: inference_pb2.GenerateResponse | None = None
        self._connection: ReplicaConnection | None = None
        self._submission_id = ""

    @property
    def prompt(self) -> Prompt:
        """What a replica needs to have computed to go on with it."""
        if self._prompt is None:
            token_ids = [*self._request.prompt_token_ids, *self._token_ids]
            max_tokens = self._request.sampling.max_tokens
            self._prompt = Prompt(token_ids, max_tokens - len(self._token_ids))
        return self._prompt

    @property
    def turn(self) -> float:
        """When it is to be placed, where others wait too."""
        return self._request.turn

    @property
    def deadline(self) -> float | None:
        """How long it waits for a replica."""
        return self._request.deadline

    def start(self) -> None:
        """Runs the choice on a replica, now or as soon as one is ready."""
        if not self._pool.place(self):
            self._siblings.accept()

    def resubmit(self) -> None:
        """Tries again what full queues refused."""
        if self._is_late():
            self._fail(DeadlineExceededError("the request's deadline passed"))
            return
        stands_still = self.deadline is None and self._siblings.stand_still(self._pool.wait_s)
        if stands_still and self._refusal is not None:
            self._fail(self._refusal)
            return
        digest = self._target_digest(self._refused_by[-1])
        self._refused_by.clear()
        self._queue_deadline = None  # the time here was not spent in a replica's queue
        self._pool.place(self, target_digest=digest)

    def cancel(self, reason: str) -> None:
        """Ends the choice wherever it is (``reason``: cancelled or deadline)."""
        self._pool.withdraw(self)
        self._siblings.withdraw(self)
        if self._connection is not None:
            self._connection.cancel(self._submission_id, reason)
            self._connection = None
        self.done = True

    def take(self) -> inference_pb2.GenerateResponse | None:
        """What the client has not been sent yet, if anything."""
        chunk, self._chunk = self._chunk, None
        return chunk

    def on_placed(self, connection: ReplicaConnection) -> None:
        """Submits what is missing to a ready replica."""
        self._connection = connection
        self._siblings.submitted(self)
        try:
            self._submit_to(connection)
        except Exception as error:  # ends this choice, and nothing that all choices share
            self._fail(error)

    def _submit_to(self, connection: ReplicaConnection) -> None:
        request = self._request
        if self._has_prompt_logprobs:  # of a replica that was lost
            request = replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
        self._submission_id = (
            f"{request.request_id}/{request.choice_index}.{next(_submission_numbers)}"
        )
        connection.submit(
            replace(
                request,
                request_id=self._submission_id,
                resume_token_ids=tuple(self._token_ids),
                queue_deadline=self._next_queue_deadline(),
            ),
            self.prompt,
            self,
        )

    def on_unplaced(self, reason: str) -> None:
        """No replica was ready in time."""
        if self._is_late():
            self._fail(DeadlineExceededError(f"the request's deadline passed: {reason}"))
        else:
            self._fail(ReplicaLostError(reason))

    def on_delta(self, delta: replica_pb2.ConnectResponse.Delta) -> None:
        """Takes what the replica made of the request."""
        try:
            self._take_delta(delta)
        except Exception as error:  # ends this choice, and not the stream that all choices share
            self._leave()
            self._fail(error)

    def on_lost(self, *, drained: bool = False) -> None:
        """Goes on elsewhere, from the tokens received."""
        try:
            self._go_on(drained)
        except Exception as error:  # as above
            self._fail(error)

    def _go_on(self, drained: bool) -> None:
        lost, self._connection = self._connection, None
        self._queue_deadline = None  # the time there was not spent in a queue
        if self._is_complete():
            self._finish_without_replica()
            return
        self._was_lost = True
        self._siblings.accept()
        self._num_losses += not drained
        if self._num_losses == MAX_LOSSES_WITHOUT_PROGRESS:
            logger.error("request %s lost its replica too often", self._submission_id)
            message = f"{self._num_losses} replicas in a row were lost before a new token came"
            self._fail(ReplicaLostError(message))
            return
        logger.info("request %s goes on elsewhere", self._submission_id)
        self._pool.num_restarts += 1
        avoid = [lost] if lost is not None else []
        self._pool.place(self, avoid=avoid, target_digest=self._target_digest(lost))

    def _take_delta(self, delta: replica_pb2.ConnectResponse.Delta) -> None:
        num_known = len(self._token_ids) - delta.token_offset if delta.token_ids else 0
        if num_known < 0:
            logger.error("replica skipped %d tokens of %s", -num_known, self._submission_id)
            self._leave()
            self.on_lost()
            return
        if len(delta.token_ids) > num_known or delta.finish_reason:
            self._siblings.begun(self)
            self._add(delta, num_known)
        if delta.HasField("error"):
            error = from_request_error(delta.error)
            if isinstance(error, ReplicaLostError):
                self.on_lost()
                return
            refused_by, self._connection = self._connection, None
            if isinstance(error, QueueFullError) and refused_by is not None:
                self._refusal = error
                if self._goes_elsewhere(refused_by):
                    return
                if self._siblings.refused(self, error.retry_after_s):
                    return
            self._fail(error)
            return
        if delta.finish_reason:
            self._connection = None
            self.done = True
            self._siblings.finished(self)
        self._on_change()

    def _goes_elsewhere(self, refused_by: ReplicaConnection) -> bool:
        """Tries another replica at once, if there is one and there is time."""
        self._pool.refused(refused_by)
        self._refused_by.append(refused_by)
        late = self._queue_deadline is not None and time.monotonic() >= self._queue_deadline
        if late or len(self._refused_by) == MAX_REFUSALS:
            return False
        return self._pool.place_now(
            self, avoid=self._refused_by, target_digest=self._target_digest(refused_by)
        )

    def _target_digest(self, former: ReplicaConnection | None) -> str | None:
        """What another target says does not continue what the former one said."""
        return former.target_digest if former is not None and self._token_ids else None

    def _next_queue_deadline(self) -> float | None:
        """Of a submission that is about to be sent; none once there is a token, nor where one
        that had been accepted is to wait until its deadline."""
        if self._queue_timeout_s is None or (self._was_lost and self.deadline is not None):
            return None
        if len(self._token_ids) > len(self._request.resume_token_ids):
            return None
        if self._queue_deadline is None:
            self._queue_deadline = time.monotonic() + self._queue_timeout_s
        return self._queue_deadline

    def _add(self, delta: replica_pb2.ConnectResponse.Delta, num_known: int) -> None:
        chunk = self._open_chunk()
        token_ids = delta.token_ids[num_known:]
        if token_ids:
            self._token_ids += token_ids
            self._num_losses = 0
            self._refused_by.clear()
            self._prompt = None
        chunk.token_ids.extend(token_ids)
        chunk.token_sources.extend(delta.token_sources[num_known:])
        chunk.logprobs.extend(delta.logprobs[num_known:])
        if delta.prompt_logprobs and not self._has_prompt_logprobs:
            chunk.prompt_logprobs.extend(delta.prompt_logprobs)
            self._has_prompt_logprobs = True
        texts = [self._text.push(token_id).text for token_id in token_ids]
        chunk.text += "".join(texts)
        chunk.text_lengths.extend(map(len, texts))
        if delta.finish_reason:
            chunk.text += self._text.finish()
            chunk.finish_reason = delta.finish_reason
            chunk.usage.CopyFrom(delta.usage)

    def _open_chunk(self) -> inference_pb2.GenerateResponse:
        if self._chunk is None:
            self._chunk = inference_pb2.GenerateResponse(
                request_id=self._request.request_id,
                choice_index=self._request.choice_index,
                attempt=self._request.attempt,
                token_offset=len(self._token_ids),
            )
        return self._chunk

    def _is_complete(self) -> bool:
        """Whether there is all that could come; without a token the prompt's part is missing."""
        if not self._token_ids:
            return False
        return self._is_stopped() or len(self._token_ids) >= self._request.sampling.max_tokens

    def _is_stopped(self) -> bool:
        if self._text.stopped:
            return True
        could_end = len(self._token_ids) > self._request.sampling.min_tokens
        return could_end and self._token_ids[-1] in self._ending_token_ids

    def _finish_without_replica(self) -> None:
        """All tokens had come, only the word that they were all was lost."""
        chunk = self._open_chunk()
        chunk.text += self._text.finish()
        reason = FinishReason.STOP if self._is_stopped() else FinishReason.LENGTH
        chunk.finish_reason = int(reason)  # type: ignore[assignment]
        chunk.usage.prompt_tokens = len(self._request.prompt_token_ids)
        chunk.usage.completion_tokens = len(self._token_ids)
        self.done = True
        self._siblings.finished(self)
        self._on_change()

    def _is_late(self) -> bool:
        # Timers may be early by what clocks do not resolve.
        return self.deadline is not None and time.monotonic() >= self.deadline - _CLOCK_SLACK_S

    def _leave(self) -> None:
        if self._connection is not None:
            self._connection.cancel(self._submission_id, "cancelled")

    def _fail(self, error: Exception) -> None:
        self._connection = None
        self._siblings.withdraw(self)
        self.error = error
        self.done = True
        self._on_change()
