"""One replica's streams on a drafter: rounds, and features in bulk."""

from __future__ import annotations

import asyncio
import logging
from typing import Generic, TypeVar

from grpc import aio

from cluster.engine.draft_client import SessionKey
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_loop import DraftLoop, RoundAnswer
from cluster.errors import InvalidRequestError, QueueFullError
from cluster.rpc.draft_messages import (
    chunk_bytes,
    decode_chunk,
    decode_round,
    decode_session,
    encode_answer,
    encode_session,
)
from cluster.rpc.draft_spans import DraftSpans
from cluster.v1 import drafter_pb2

logger = logging.getLogger(__name__)

MAX_OUTSTANDING_ROUNDS = 4
MAX_SEQUENCES = 1024

_Answer = TypeVar("_Answer")


class DraftStream:
    """Rounds of one replica, answered in the order in which their passes end.

    Guarantees: at most ``MAX_OUTSTANDING_ROUNDS`` are queued, computed or unread by the replica;
    one more ends the stream.
    """

    def __init__(
        self,
        context: aio.ServicerContext,
        replica_id: str,
        engine: DraftEngine,
        draft_loop: DraftLoop,
        spans: DraftSpans,
    ) -> None:
        self.num_outstanding = 0
        self._spans = spans
        self._context = context
        self._replica_id = replica_id
        self._engine = engine
        self._draft_loop = draft_loop
        self._answers: _Answers[tuple[int, RoundAnswer]] = _Answers()

    async def read(self) -> None:
        """Takes rounds until the replica ends the stream.

        Raises:
            InvalidRequestError, QueueFullError: the replica broke the protocol.
        """
        while (message := await self._context.read()) is not aio.EOF:
            kind = message.WhichOneof("message")
            if kind == "round":
                self._submit(message.round)
            elif kind == "close":
                sessions = [decode_session(session) for session in message.close.sessions]
                self._draft_loop.close_sessions(self._replica_id, sessions)
                self._spans.close(self._replica_id, sessions)
            else:
                raise InvalidRequestError("message", f"{kind} is not expected here")

    async def write(self) -> None:
        """Sends answers as they come.

        Raises:
            Exception: what a round's pass failed with.
        """
        while True:
            round_id, answer = await self._answers.get()
            if answer.error is not None:
                raise answer.error
            self._spans.answered(self._replica_id, answer)
            await self._context.write(encode_answer(round_id, answer))
            self.num_outstanding -= 1

    def _submit(self, message: drafter_pb2.DraftRequest.Round) -> None:
        if self.num_outstanding >= MAX_OUTSTANDING_ROUNDS:
            raise QueueFullError("too many draft rounds outstanding", retry_after_s=0.1)
        draft_round = decode_round(
            message,
            feature_size=self._engine.feature_size,
            vocab_size=self._engine.vocab_size,
            block_size=self._engine.block_size,
            max_sequences=MAX_SEQUENCES,
        )
        round_id = message.round_id
        self.num_outstanding += 1
        self._draft_loop.submit_round(
            self._replica_id,
            draft_round,
            lambda answer: self._answers.put((round_id, answer)),
        )


class FeedStream:
    """Features of one replica, acknowledged in order.

    Guarantees: at most ``credit_bytes`` of features are held that are not in the engine yet; more
    ends the stream.
    """

    def __init__(
        self,
        context: aio.ServicerContext,
        replica_id: str,
        engine: DraftEngine,
        draft_loop: DraftLoop,
        credit_bytes: int,
        spans: DraftSpans,
    ) -> None:
        self._spans = spans
        self._context = context
        self._replica_id = replica_id
        self._engine = engine
        self._draft_loop = draft_loop
        self._credit_bytes = credit_bytes
        self._answers: _Answers[tuple[SessionKey, int, int | Exception]] = _Answers()

    async def read(self) -> None:
        """Takes chunks until the replica ends the stream.

        Raises:
            InvalidRequestError, QueueFullError: the replica broke the protocol.
        """
        while (message := await self._context.read()) is not aio.EOF:
            kind = message.WhichOneof("message")
            if kind != "chunk":
                raise InvalidRequestError("message", f"{kind} is not expected here")
            self._submit(message.chunk)

    async def write(self) -> None:
        """Sends acknowledgements as they come, and with them the credit back.

        Raises:
            Exception: what appending a chunk failed with.
        """
        while True:
            session, num_bytes, length = await self._answers.get()
            if isinstance(length, Exception):
                raise length
            self._credit_bytes += num_bytes
            ack = drafter_pb2.FeedResponse.Ack(
                session=encode_session(session), length=length, credit_bytes=num_bytes
            )
            await self._context.write(drafter_pb2.FeedResponse(ack=ack))

    def _submit(self, message: drafter_pb2.FeedRequest.Chunk) -> None:
        num_bytes = chunk_bytes(message)
        if num_bytes > self._credit_bytes:
            raise QueueFullError("more features than the credit allows", retry_after_s=0.1)
        chunk = decode_chunk(
            message,
            feature_size=self._engine.feature_size,
            vocab_size=self._engine.vocab_size,
        )
        self._credit_bytes -= num_bytes
        self._spans.open(self._replica_id, chunk.session, message.traceparent)
        self._draft_loop.submit_features(
            self._replica_id,
            chunk,
            lambda length: self._answers.put((chunk.session, num_bytes, length)),
        )


class _Answers(Generic[_Answer]):
    """A queue from the draft loop's thread into the event loop; its users bound its length."""

    def __init__(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_Answer] = asyncio.Queue()

    async def get(self) -> _Answer:
        """Waits for the next answer; in the event loop."""
        return await self._queue.get()

    def put(self, answer: _Answer) -> None:
        """Adds an answer, from any thread."""
        try:
            self._event_loop.call_soon_threadsafe(self._queue.put_nowait, answer)
        except RuntimeError:
            logger.debug("an answer after the event loop was closed has no reader")
