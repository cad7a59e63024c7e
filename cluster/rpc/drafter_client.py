"""Drafting by drafters that are somewhere else."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping, Sequence

import torch

from cluster.config import SpeculativeConfig
from cluster.engine.draft_client import (
    DraftResult,
    DraftRound,
    DraftSampling,
    DraftSequence,
    DraftTimes,
    SessionKey,
)
from cluster.engine.draft_loop import FeatureChunk
from cluster.rpc.cluster_status import DrafterStatus
from cluster.rpc.draft_messages import (
    MAX_CHUNK_BYTES,
    MAX_CHUNK_ROWS,
    TOKEN_ID_BYTES,
    chunk_bytes,
    encode_chunk,
    encode_round,
)
from cluster.rpc.draft_session import ClientSession, DraftClientStats, RoundHandle
from cluster.rpc.drafter_connection import DrafterConnection
from cluster.rpc.session_balance import SessionBalance
from cluster.rpc.tls import ChannelTls
from cluster.speculation.draft_cost import DraftCost, spread_round_s

_CLOSE_TIMEOUT_S = 5.0


class GrpcDraftClient:
    """A ``DraftClient`` on any number of drafters, over gRPC.

    Guarantees:
    - only ``collect`` waits, and no longer than it is told to; it returns at once when the
      drafters that owe an answer are lost;
    - no fault of a drafter raises here: late, lost and malformed answers are counted, and absent;
    - a late answer is never used; a session whose stream ended is gone (``has_session``);
    - sessions are balanced: where a drafter comes, some of all go to it, a few at a time;
    - what is under way is bounded: two rounds a drafter, feature bytes by the drafter's credit.

    The engine's thread calls it; ``set_drafters``, ``status`` and ``stats`` are for any thread.

    Args:
        replica_id: unique in the cluster.
        digests: hex SHA-256 by name (``target``, ``tokenizer``, ``drafter``, ``projection``); a
            drafter with others is not used.
        vocab_size: the target's.
        config: its ``num_speculative_tokens`` bounds ``block_size``, and its ``draft_timeout_ms``
            the rounds that probe a drafter.
        event_loop: where the streams run. A process that serves gRPC already passes the loop it
            serves in, since events of two loops in a process wait for each other; without one a
            thread of its own is started.
        tls: unset: plaintext.
        host: of the replica; drafters there come first.
    """

    is_concurrent = True

    def __init__(
        self,
        *,
        replica_id: str,
        digests: Mapping[str, str],
        vocab_size: int,
        config: SpeculativeConfig,
        event_loop: asyncio.AbstractEventLoop | None = None,
        tls: ChannelTls | None = None,
        host: str = "",
    ) -> None:
        self._replica_id = replica_id
        self._digests = digests
        self._vocab_size = vocab_size
        self._tls = tls
        self._round_timeout_s = config.draft_timeout_ms / 1e3
        self._max_tokens = config.num_speculative_tokens
        self._changed = threading.Condition()
        self._stats = DraftClientStats()
        self._connections: dict[tuple[str, str], DrafterConnection] = {}
        self._retired: set[DrafterConnection] = set()
        self._tasks: dict[DrafterConnection, asyncio.Task[None]] = {}
        self._sessions: dict[SessionKey, ClientSession] = {}
        self._balance = SessionBalance(host)
        self._round_ids = itertools.count(1)
        self._last_costs = [DraftCost()]
        self._is_closed = False
        self._thread: threading.Thread | None = None
        if event_loop is None:
            event_loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=_run_loop, args=(event_loop,), name="drafter-client", daemon=True
            )
            self._thread.start()
        self._event_loop = event_loop

    def set_drafters(self, drafters: Sequence[tuple[str, str]]) -> None:
        """Says which drafters there are.

        Those that are new are connected to. Those that are gone are being stopped: they get no
        new session, and theirs move, a few at a time, as soon as another drafter is ready; until
        then they draft, as long as they do. The others are left alone. Returns at once.

        Args:
            drafters: (drafter id, ``host:port``) pairs.
        """
        self._event_loop.call_soon_threadsafe(self._apply_drafters, list(drafters))

    def status(self) -> list[DrafterStatus]:
        """Every drafter with its state and the reason for it."""
        with self._changed:
            connections = [*self._connections.values(), *self._retired]
            return [connection.status() for connection in connections]

    @property
    def stats(self) -> DraftClientStats:
        """Counts since the start; they go on changing."""
        return self._stats

    @property
    def block_size(self) -> int:
        """Most draft tokens a round; 0 while no drafter is ready."""
        with self._changed:
            sizes = [connection.block_size for connection in self._drafting_connections()]
        if not sizes:
            return 0
        return min(sizes) if self._max_tokens is None else min(*sizes, self._max_tokens)

    def is_ready(self) -> bool:
        """Whether some drafter is connected, matches, and is not left alone."""
        with self._changed:
            return bool(self._drafting_connections())

    def predicted_round_s(
        self, num_sessions: float, num_tokens: int, *, added_drafters: int = 0
    ) -> float:
        """Seconds from sending a round to its last answer, from what earlier ones took.

        While no drafter is ready, what those took that were ready last.
        """
        now = time.monotonic()
        with self._changed:
            return spread_round_s(
                self._costs(), num_sessions, num_tokens, now, added_drafters=added_drafters
            )

    def times(self) -> DraftTimes:
        """What drafters' passes have taken."""
        now = time.monotonic()
        with self._changed:
            costs = self._costs()
            return DraftTimes(
                compute_s=self._stats.compute_s,
                queue_s=sum(cost.queue_s(now) for cost in costs) / len(costs),
                network_s=self._stats.network_s,
            )

    def open_session(self, session: SessionKey, sampling: DraftSampling) -> bool:
        """Assigns the session to a ready drafter (``SessionBalance``); False when there is none.

        The drafter hears of it with the first features.
        """
        with self._changed:
            connections = self._ready_connections()
            if not connections:
                return False
            self._close_session(session)
            connection = self._balance.choose(connections)
            connection.num_sessions += 1
            self._sessions[session] = ClientSession(
                session, sampling, connection, connection.generation
            )
            return True

    def has_session(self, session: SessionKey) -> bool:
        """Whether the session is open and should stay where it is (False: open a new epoch)."""
        with self._changed:
            found = self._sessions.get(session)
            return found is not None and found.is_live and not found.is_leaving

    def feed(
        self, session: SessionKey, start: int, features: torch.Tensor, token_ids: Sequence[int]
    ) -> int:
        """Sends committed positions in bulk, without waiting. A session's first are from 0 on.

        Args:
            start: first position.
            features: ``[rows, d]`` of positions ``start ..``.
            token_ids: rows + 1 of them, of positions ``start ..``.

        Returns:
            How many rows were taken: fewer, also none, when the byte credit is used up, the
            drafter has too many chunks to acknowledge, or the session is gone.

        Raises:
            ValueError: the session's first features start elsewhere.
        """
        with self._changed:
            found = self._sessions.get(session)
            if found is None or not found.is_live:
                return 0
            if not found.is_open and start != 0:
                raise ValueError(f"the first features of {session} start at {start}")
            connection = found.connection
            row_bytes = features.shape[1] * features.dtype.itemsize + TOKEN_ID_BYTES
            # A chunk has one token more than rows.
            largest = min(max((MAX_CHUNK_BYTES - TOKEN_ID_BYTES) // row_bytes, 1), MAX_CHUNK_ROWS)
            first = 0
            # The first chunk opens the session on the drafter, even when it holds nothing.
            while first < len(features) or not found.is_open:
                affordable = (connection.credit_bytes - TOKEN_ID_BYTES) // row_bytes
                rows = features[first : first + min(largest, max(affordable, 0))]
                is_stuck = len(rows) == 0 and first < len(features)
                if is_stuck or affordable < 0 or not connection.can_send_chunk:
                    break
                chunk = FeatureChunk(
                    session=session,
                    start=start + first,
                    features=rows,
                    token_ids=tuple(token_ids[first : first + len(rows) + 1]),
                    sampling=found.sampling if start + first == 0 else None,
                )
                first += len(rows)
                message = encode_chunk(chunk)
                connection.send_chunk(found, start + first, chunk_bytes(message.chunk), message)
            return first

    def acknowledged_length(self, session: SessionKey) -> int:
        """Positions that the drafter is known to hold: 0 .. length-1."""
        with self._changed:
            found = self._sessions.get(session)
            return found.acknowledged_length if found is not None and found.is_live else 0

    def close_session(self, session: SessionKey) -> None:
        """Forgets the session here and on its drafter; unknown sessions are ignored."""
        with self._changed:
            self._close_session(session)

    def start_round(self, round: DraftRound) -> RoundHandle:
        """Sends a round without waiting, one message to each drafter that has part in it.

        Sequences whose session is gone, and those of a drafter that owes two rounds already, are
        left out.
        """
        handle = RoundHandle()
        with self._changed:
            parts: dict[DrafterConnection, _Part] = {}
            row = 0
            for sequence in round.sequences:
                rows = round.features[row : row + sequence.num_features]
                row += sequence.num_features
                session = self._sessions.get(sequence.session)
                if session is not None and session.is_live:
                    part = parts.setdefault(session.connection, _Part())
                    part.add(session, sequence, rows)
            for connection, part in parts.items():
                if not connection.can_send_round:
                    self._stats.num_dropped += 1
                    connection.count_late("dropped")
                    continue
                round_id = next(self._round_ids)
                is_whole = len(part.sequences) == len(round.sequences)
                features = round.features if is_whole else torch.cat(part.features)
                message = encode_round(round_id, list(part.sequences.values()), features)
                connection.send_round(round_id, message, handle, part.sessions, part.sequences)
            # What leaves is still in this round; it is opened anew behind it.
            leaving = self._balance.leaving(
                self._ready_connections(),
                self._sessions.values(),
                time.monotonic(),
                retired=self._retired,
            )
            for session in leaving:
                session.is_leaving = True
        return handle

    def collect(self, handle: RoundHandle, timeout_s: float) -> list[DraftResult]:
        """Waits at most ``timeout_s`` for the round's answers; what is late is dropped for good."""
        with self._changed:
            self._changed.wait_for(lambda: not handle.waiting, timeout_s)
            for connection in list(handle.waiting):
                handle.waiting.discard(connection)
                self._stats.num_late += 1
                connection.count_late()
            return handle.results

    def close(self) -> None:
        """Ends every connection. Not to be called in the event loop that was passed in."""
        if self._is_closed:
            return
        self._is_closed = True
        closing = asyncio.run_coroutine_threadsafe(self._close_connections(), self._event_loop)
        closing.result(_CLOSE_TIMEOUT_S)
        if self._thread is not None:
            self._event_loop.call_soon_threadsafe(self._event_loop.stop)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _ready_connections(self) -> list[DrafterConnection]:
        return [connection for connection in self._connections.values() if connection.is_ready]

    def _drafting_connections(self) -> list[DrafterConnection]:
        """Where none can take sessions, those that draft for what they have until they stop."""
        retired = [connection for connection in self._retired if connection.is_up]
        return self._ready_connections() or retired

    def _costs(self) -> list[DraftCost]:
        """Of the drafters that are ready, else of those that were last; at least one."""
        ready = self._ready_connections()
        if ready:
            self._last_costs = [connection.cost for connection in ready]
        return self._last_costs

    def _close_session(self, key: SessionKey) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            session.connection.close_session(session)
            if session.connection in self._retired:
                session.connection.end_if_unused()

    def _apply_drafters(self, drafters: list[tuple[str, str]]) -> None:
        """In the event loop: starts and ends connections."""
        if self._is_closed:
            return
        with self._changed:
            for key in list(self._connections):
                if key not in drafters:
                    connection = self._connections.pop(key)
                    self._retired.add(connection)
                    connection.retire()
            for drafter_id, address in drafters:
                if (drafter_id, address) in self._connections:
                    continue
                connection = DrafterConnection(
                    drafter_id,
                    address,
                    replica_id=self._replica_id,
                    digests=self._digests,
                    vocab_size=self._vocab_size,
                    changed=self._changed,
                    stats=self._stats,
                    round_timeout_s=self._round_timeout_s,
                    tls=self._tls,
                )
                self._connections[drafter_id, address] = connection
                self._tasks[connection] = asyncio.create_task(self._run(connection))

    async def _run(self, connection: DrafterConnection) -> None:
        try:
            await connection.run()
        finally:
            with self._changed:
                self._retired.discard(connection)
                del self._tasks[connection]

    async def _close_connections(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._thread is not None:
            # gRPC's own tasks end a little later than the calls they belong to.
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                await asyncio.wait(others, timeout=1.0)


class _Part:
    """What one drafter gets of a round."""

    def __init__(self) -> None:
        self.sessions: dict[SessionKey, ClientSession] = {}
        self.sequences: dict[SessionKey, DraftSequence] = {}
        self.features: list[torch.Tensor] = []

    def add(self, session: ClientSession, sequence: DraftSequence, rows: torch.Tensor) -> None:
        """Adds a sequence and its feature rows."""
        self.sessions[session.key] = session
        self.sequences[session.key] = sequence
        self.features.append(rows)


def _run_loop(event_loop: asyncio.AbstractEventLoop) -> None:
    try:
        event_loop.run_forever()
    finally:
        event_loop.close()
