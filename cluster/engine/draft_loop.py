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
from cluster.engine.draft_engine import Addition, DraftEngine
from cluster.engine.pace import PaceStats
from cluster.errors import DsparkError, QueueFullError

logger = logging.getLogger(__name__)

MAX_QUEUED_PER_REPLICA = 4
MAX_QUEUED_CHUNKS_PER_REPLICA = 1024
MAX_QUEUED_COMMANDS = 4096
# A network takes rows of many sessions for little more than those of one.
MAX_ROWS_PER_TURN = 512
_EXPIRE_PERIOD_S = 5.0


@dataclass(frozen=True, kw_only=True)
class RoundAnswer:
    """A round's results, or the ``error`` that kept it from having any.

    ``queue_s`` passed between submission and the pass, ``compute_s`` in the pass. ``paced`` is the
    engine's.
    """

    results: list[DraftResult]
    queue_s: float
    compute_s: float
    error: Exception | None = None
    paced: PaceStats | None = None


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
    - rounds come before features: between two passes at most ``MAX_ROWS_PER_TURN`` rows of features
      are taken (or one chunk, if it has more), replicas in turn and sessions together, so that no
      round waits for more than these, and chunks never starve;
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
                chunks = _take_chunks(self._chunks)
            for command in commands:
                command(self._engine)
            if rounds:
                self._draft(rounds)
            if chunks:
                self._append(chunks)
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
                    paced=self._engine.paced,
                )
            )

    def _append(self, chunks: list[tuple[str, _QueuedChunk]]) -> None:
        additions: list[Addition] = []
        opened: list[tuple[str, _QueuedChunk]] = []
        for replica_id, queued in chunks:
            chunk = queued.chunk
            try:
                if chunk.sampling is not None:
                    self._engine.open(replica_id, chunk.session, chunk.sampling)
            except Exception as error:  # as above: the sender is told, the loop goes on
                self._fail(replica_id, queued, error)
                continue
            opened.append((replica_id, queued))
            additions.append(
                Addition(replica_id, chunk.session, chunk.start, chunk.features, chunk.token_ids)
            )
        try:
            lengths = self._engine.append_all(additions)
        except Exception as error:
            for replica_id, queued in opened:
                self._fail(replica_id, queued, error)
        else:
            for (_, queued), length in zip(opened, lengths, strict=True):
                queued.on_done(length or 0)

    def _fail(self, replica_id: str, queued: _QueuedChunk, error: Exception) -> None:
        if isinstance(error, DsparkError):  # the sender's fault, which it is told
            logger.debug("draft features of %s are refused: %s", replica_id, error)
        else:
            logger.error("appending draft features failed", exc_info=error)
        self._engine.close(replica_id, queued.chunk.session)
        queued.on_done(error)


def _take_chunks(
    queues: OrderedDict[str, deque[_QueuedChunk]],
) -> list[tuple[str, _QueuedChunk]]:
    """Takes chunks of different sessions, replicas in turn: one, and more while they fit a turn."""
    taken: list[tuple[str, _QueuedChunk]] = []
    sessions: set[tuple[str, SessionKey]] = set()
    num_rows = 0
    while queues:
        replica_id, queue = next(iter(queues.items()))
        chunk = queue[0].chunk
        key = (replica_id, chunk.session)
        num_rows += len(chunk.features)
        if taken and (key in sessions or num_rows > MAX_ROWS_PER_TURN):
            break
        sessions.add(key)
        taken += _take_one_each(queues, limit=1)
    return taken


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
