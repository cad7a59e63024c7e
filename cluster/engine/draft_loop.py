"""The thread that runs a drafter's engine for everybody who asks."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from cluster.engine.draft_client import DraftResult, DraftRound, DraftSampling, SessionKey
from cluster.engine.draft_engine import DraftEngine
from cluster.errors import QueueFullError

logger = logging.getLogger(__name__)

MAX_QUEUED_PER_REPLICA = 4
MAX_QUEUED_CHUNKS_PER_REPLICA = 1024
MAX_QUEUED_COMMANDS = 4096
_EXPIRE_PERIOD_S = 5.0


@dataclass(frozen=True, kw_only=True)
class RoundAnswer:
    """A round's results, or the ``error`` that kept it from having any.

    ``queue_s`` passed between submission and the pass, ``compute_s`` in the pass.
    """

    results: list[DraftResult]
    queue_s: float
    compute_s: float
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureChunk:
    """Committed positions ``start ..``; with ``sampling`` the session is opened.

    ``features`` are ``[rows, d]``, ``token_ids`` rows + 1.
    """

    session: SessionKey
    start: int
    features: torch.Tensor
    token_ids: tuple[int, ...]
    sampling: DraftSampling | None = None


@dataclass(frozen=True)
class _QueuedRound:
    round: DraftRound
    submitted_at: float
    on_done: Callable[[RoundAnswer], None]


@dataclass(frozen=True)
class _QueuedChunk:
    chunk: FeatureChunk
    on_done: Callable[[int | Exception], None]


_Queued = TypeVar("_Queued")


class DraftLoop:
    """Runs a ``DraftEngine`` in one thread.

    Guarantees:
    - rounds of different replicas that wait at the same time share one pass, one round a replica;
    - rounds come before features: between two passes at most one chunk of features is taken,
      replicas in turn, so a round waits for at most one chunk and chunks never starve;
    - queues are bounded by replica, and every submission is answered exactly once, unless the
      replica is dropped or the loop stopped before its turn;
    - an error of the engine answers those it hit, forgets their sessions, and ends nothing else.

    Callbacks run in the loop's thread and must not block.
    """

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._rounds: OrderedDict[str, deque[_QueuedRound]] = OrderedDict()
        self._chunks: OrderedDict[str, deque[_QueuedChunk]] = OrderedDict()
        self._commands: deque[Callable[[DraftEngine], None]] = deque()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="draft-loop", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread behind the pass at hand; what is queued is dropped."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def submit_round(
        self, replica_id: str, draft_round: DraftRound, on_done: Callable[[RoundAnswer], None]
    ) -> None:
        """Queues a round.

        Raises:
            QueueFullError: the replica has too many rounds waiting.
        """
        with self._changed:
            queue = self._rounds.setdefault(replica_id, deque())
            if len(queue) >= MAX_QUEUED_PER_REPLICA:
                raise QueueFullError("too many draft rounds outstanding", retry_after_s=0.1)
            queue.append(_QueuedRound(draft_round, time.monotonic(), on_done))
            self._changed.notify()

    def submit_features(
        self, replica_id: str, chunk: FeatureChunk, on_done: Callable[[int | Exception], None]
    ) -> None:
        """Queues features; ``on_done`` gets the length then held (0: no such session).

        Raises:
            QueueFullError: the replica has too many chunks waiting.
        """
        with self._changed:
            queue = self._chunks.setdefault(replica_id, deque())
            if len(queue) >= MAX_QUEUED_CHUNKS_PER_REPLICA:
                raise QueueFullError("too many feature chunks outstanding", retry_after_s=0.1)
            queue.append(_QueuedChunk(chunk, on_done))
            self._changed.notify()

    def close_sessions(self, replica_id: str, sessions: list[SessionKey]) -> None:
        """Forgets sessions soon; unknown ones are ignored.

        Raises:
            QueueFullError: too much is waiting to be forgotten.
        """

        def close(engine: DraftEngine) -> None:
            for session in sessions:
                engine.close(replica_id, session)

        with self._changed:
            if len(self._commands) >= MAX_QUEUED_COMMANDS:
                raise QueueFullError("too many sessions to close", retry_after_s=0.1)
        self._command(close)

    def drop_replica(self, replica_id: str) -> None:
        """Forgets soon all sessions of a replica, and now what it has queued."""
        with self._changed:
            self._rounds.pop(replica_id, None)
            self._chunks.pop(replica_id, None)
        self._command(lambda engine: engine.drop_replica(replica_id))

    def _command(self, command: Callable[[DraftEngine], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, timeout=_EXPIRE_PERIOD_S)
                if self._is_stopping:
                    return
                commands = list(self._commands)
                self._commands.clear()
                rounds = _take_one_each(self._rounds)
                chunks = _take_one_each(self._chunks, limit=1)
            for command in commands:
                command(self._engine)
            if rounds:
                self._draft(rounds)
            for replica_id, queued in chunks:
                self._append(replica_id, queued)
            self._engine.expire()

    def _has_work(self) -> bool:
        return bool(self._is_stopping or self._commands or self._rounds or self._chunks)

    def _draft(self, rounds: list[tuple[str, _QueuedRound]]) -> None:
        started_at = time.monotonic()
        error: Exception | None = None
        try:
            answers = self._engine.draft([(replica, queued.round) for replica, queued in rounds])
        except Exception as caught:  # whatever a pass throws must reach those who wait for it
            logger.exception("a draft pass of %d rounds failed", len(rounds))
            error, answers = caught, [[] for _ in rounds]
            for replica_id, _ in rounds:
                self._engine.drop_replica(replica_id)
        compute_s = time.monotonic() - started_at
        for (_, queued), results in zip(rounds, answers, strict=True):
            queued.on_done(
                RoundAnswer(
                    results=results,
                    queue_s=started_at - queued.submitted_at,
                    compute_s=compute_s,
                    error=error,
                )
            )

    def _append(self, replica_id: str, queued: _QueuedChunk) -> None:
        chunk = queued.chunk
        try:
            if chunk.sampling is not None:
                self._engine.open(replica_id, chunk.session, chunk.sampling)
            length = self._engine.append(
                replica_id, chunk.session, chunk.start, chunk.features, chunk.token_ids
            )
        except Exception as error:  # as above: the sender is told, the loop goes on
            logger.exception("appending draft features failed")
            self._engine.close(replica_id, chunk.session)
            queued.on_done(error)
        else:
            queued.on_done(length or 0)


def _take_one_each(
    queues: OrderedDict[str, deque[_Queued]], limit: int | None = None
) -> list[tuple[str, _Queued]]:
    """Takes the first entry of up to ``limit`` queues, and puts these queues behind the others."""
    taken = []
    for replica_id in list(queues)[:limit]:
        queue = queues[replica_id]
        taken.append((replica_id, queue.popleft()))
        if queue:
            queues.move_to_end(replica_id)
        else:
            del queues[replica_id]
    return taken
