"""A target replica's two streams to one drafter."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Mapping

from grpc import aio

from cluster.engine.draft_client import DraftOutcome, DraftResult, DraftSequence, SessionKey
from cluster.engine.draft_loop import MAX_QUEUED_CHUNKS_PER_REPLICA
from cluster.errors import DsparkError, MalformedProposalError
from cluster.rpc.channels import MAX_RECONNECT_S, MIN_RECONNECT_S, open_channel
from cluster.rpc.cluster_status import DrafterStatus
from cluster.rpc.draft_messages import decode_answer, encode_session
from cluster.rpc.draft_session import (
    ClientSession,
    DraftClientStats,
    DrafterState,
    PendingChunk,
    PendingRound,
    RoundHandle,
)
from cluster.rpc.drafter_handshake import MismatchError, greet_draft, greet_feed, read_message
from cluster.rpc.drafter_probe import probe
from cluster.rpc.drafter_times import DrafterTimes
from cluster.rpc.tasks import run_until_first_ends, write_all
from cluster.rpc.tls import ChannelTls
from cluster.speculation.breaker import Breaker, BreakerState
from cluster.speculation.draft_cost import DraftCost
from cluster.v1 import drafter_pb2, drafter_pb2_grpc

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MAX_OUTSTANDING_ROUNDS = 2
MAX_QUEUED_MESSAGES = 1024
MALFORMED_QUARANTINE_S = 2.0
MISMATCH_RETRY_S = 2.0


class _OpenError(DsparkError):
    """The breaker has opened: the drafter is not to be used for a while."""


class DrafterConnection:
    """Keeps two streams to a drafter, each on a TCP connection of its own.

    Guarantees:
    - reconnects with jittered, exponential delays until it is cancelled;
    - nothing of one stream is ever used with the next: ``generation`` tells them apart;
    - a drafter that breaks the protocol, or is late or lost too often (``Breaker``), loses its
      sessions, is left alone for a time that doubles, and is ready again only behind a probing
      round that was in time;
    - rounds owed by a stream that ended are owed no more, at once.

    ``run`` belongs to the event loop; every other method is called with ``changed`` held, from
    any thread.

    Args:
        drafter_id, address: of the drafter.
        replica_id: who connects.
        digests: hex SHA-256 by name; the drafter's must be equal.
        vocab_size: the target's; the drafter's must be equal.
        changed: guards this connection's state, and is notified when it changes.
        stats: counted into.
        round_timeout_s: by when a probing round must be answered.
        tls: unset: plaintext.
    """

    def __init__(
        self,
        drafter_id: str,
        address: str,
        *,
        replica_id: str,
        digests: Mapping[str, str],
        vocab_size: int,
        changed: threading.Condition,
        stats: DraftClientStats,
        round_timeout_s: float,
        tls: ChannelTls | None = None,
    ) -> None:
        self.drafter_id = drafter_id
        self.address = address
        self.block_size = 0
        self.num_sessions = 0
        self._replica_id = replica_id
        self._digests = digests
        self._vocab_size = vocab_size
        self._changed = changed
        self._stats = stats
        self._tls = tls
        self._state = DrafterState.CONNECTING
        self._reason = ""
        self._generation = 0
        self._credit_bytes = 0
        self._pending_rounds: dict[int, PendingRound] = {}
        self._pending_chunks: deque[PendingChunk] = deque()
        self._breaker = Breaker()
        self._round_timeout_s = round_timeout_s
        self._times = DrafterTimes(stats)
        self._event_loop = asyncio.get_running_loop()
        self._rounds: asyncio.Queue[drafter_pb2.DraftRequest] = asyncio.Queue()
        self._chunks: asyncio.Queue[drafter_pb2.FeedRequest] = asyncio.Queue()
        self._opened = asyncio.Event()
        self._retired = asyncio.Event()

    # What the engine's thread uses.

    @property
    def is_ready(self) -> bool:
        """Whether sessions may be opened."""
        return self._state is DrafterState.READY

    @property
    def is_up(self) -> bool:
        """Whether the sessions that are open may be drafted for."""
        return self._state in (DrafterState.READY, DrafterState.DRAINING)

    @property
    def generation(self) -> int:
        """Number of the stream of now."""
        return self._generation

    def is_generation(self, generation: int) -> bool:
        """Whether that stream still lives."""
        return self.is_up and self._generation == generation

    @property
    def credit_bytes(self) -> int:
        """Feature bytes that may be sent now."""
        return self._credit_bytes

    @property
    def can_send_chunk(self) -> bool:
        """Whether the drafter has acknowledged enough of the earlier features."""
        return self.is_up and len(self._pending_chunks) < MAX_QUEUED_CHUNKS_PER_REPLICA

    @property
    def can_send_round(self) -> bool:
        """Whether the drafter has answered enough of the earlier rounds."""
        return self.is_up and len(self._pending_rounds) < MAX_OUTSTANDING_ROUNDS

    @property
    def cost(self) -> DraftCost:
        """What its rounds take; from the last stream while there is none."""
        return self._times.cost

    @property
    def has_answered(self) -> bool:
        """Whether ``cost`` has learnt from a round."""
        return self._times.round_trip_s > 0

    def status(self) -> DrafterStatus:
        """For status reports."""
        return DrafterStatus(
            drafter_id=self.drafter_id,
            address=self.address,
            state=str(self._state),
            reason=self._reason,
            round_trip_ms=self._times.round_trip_s * 1e3,
            num_rounds=dict(self._times.num_rounds),
            round_trip_s=self._times.round_trips,
            paced=self._times.paced,
        )

    def send_round(
        self,
        round_id: int,
        message: drafter_pb2.DraftRequest,
        handle: RoundHandle,
        sessions: Mapping[SessionKey, ClientSession],
        sequences: Mapping[SessionKey, DraftSequence],
    ) -> None:
        """Sends a round of these sequences; the connection owes ``handle`` an answer."""
        handle.waiting.add(self)
        self._pending_rounds[round_id] = PendingRound(handle, sessions, sequences, time.monotonic())
        self._event_loop.call_soon_threadsafe(self._rounds.put_nowait, message)

    def send_chunk(
        self, session: ClientSession, end: int, num_bytes: int, message: drafter_pb2.FeedRequest
    ) -> None:
        """Sends features up to position ``end``; the caller has looked at ``credit_bytes``."""
        self._credit_bytes -= num_bytes
        session.num_unacknowledged += 1
        session.is_open = True
        self._pending_chunks.append(PendingChunk(session, end, num_bytes))
        self._event_loop.call_soon_threadsafe(self._chunks.put_nowait, message)

    def close_session(self, session: ClientSession) -> None:
        """Forgets the session on the drafter, behind what is on its way to it."""
        if not self.is_generation(session.generation):
            return
        if not session.is_closing:
            session.is_closing = True
            self.num_sessions -= 1
        # A drafter that does not read is told no more; unused sessions expire there.
        can_tell = self._rounds.qsize() < MAX_QUEUED_MESSAGES
        if session.is_open and session.num_unacknowledged == 0 and can_tell:
            close = drafter_pb2.DraftRequest.Close(sessions=[encode_session(session.key)])
            self._event_loop.call_soon_threadsafe(
                self._rounds.put_nowait, drafter_pb2.DraftRequest(close=close)
            )

    def count_late(self, outcome: str = "late") -> None:
        """Notes that the drafter kept a round (``late``), or the next one (``dropped``), waiting
        too long."""
        self._times.num_rounds[outcome] += 1
        if self.is_up and self._breaker.fail(time.monotonic()):
            self._go_down(DrafterState.OPEN, "too slow")
            self._event_loop.call_soon_threadsafe(self._opened.set)

    def retire(self) -> None:
        """Opens no more sessions; ``run`` ends with the last one, or with the stream."""
        if self.is_ready:
            self._state, self._reason = DrafterState.DRAINING, "it is being stopped"
        self.end_if_unused()

    def end_if_unused(self) -> None:
        """To be called when a session of a retired drafter has gone."""
        if not self.is_up or self.num_sessions == 0:
            self._event_loop.call_soon_threadsafe(self._retired.set)

    # What the event loop runs.

    async def run(self) -> None:
        """Keeps the streams until cancelled, or retired and not needed any more."""
        keeping = asyncio.ensure_future(self._keep())
        retired = asyncio.ensure_future(self._retired.wait())
        try:
            await asyncio.wait((keeping, retired), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (keeping, retired):
                task.cancel()
            await asyncio.gather(keeping, retired, return_exceptions=True)

    async def _keep(self) -> None:
        delay_s = MIN_RECONNECT_S
        last_state = DrafterState.CONNECTING
        try:
            while True:
                generation = self._generation
                state, reason, delay_s = await self._serve_once(delay_s)
                with self._changed:
                    is_retired = self._state is DrafterState.DRAINING
                    self._go_down(state, reason)
                if is_retired:
                    return
                if state is not last_state or generation != self._generation:
                    logger.warning(
                        "drafter %s is %s: %s; %s", self.drafter_id, state, reason, self._stats
                    )
                last_state = state
                open_s = self._breaker.wait_s(time.monotonic())
                await asyncio.sleep(max(open_s, delay_s * random.uniform(0.5, 1.0)))
        finally:
            with self._changed:
                self._go_down(DrafterState.LOST, "removed")

    async def _serve_once(self, last_delay_s: float) -> tuple[DrafterState, str, float]:
        """One pair of streams; returns what became of it and how long to wait."""
        try:
            await self._serve()
        except MismatchError as error:
            self._stats.num_mismatched += 1
            return DrafterState.MISMATCHED, str(error), MISMATCH_RETRY_S
        except MalformedProposalError as error:
            self._stats.num_malformed += 1
            with self._changed:
                if self._breaker.state is BreakerState.CLOSED:  # else the probe was malformed
                    self._breaker.open(time.monotonic(), MALFORMED_QUARANTINE_S)
            return DrafterState.QUARANTINED, str(error), MIN_RECONNECT_S
        except _OpenError as error:
            return DrafterState.OPEN, str(error), MIN_RECONNECT_S
        except aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except TimeoutError:
            reason = f"no greeting within {HANDSHAKE_TIMEOUT_S:g} s"
        except EOFError as error:
            reason = str(error)
        except Exception as error:  # our own mistake must not cost the drafter for good
            logger.exception("the connection to drafter %s failed", self.drafter_id)
            reason = f"{type(error).__name__}: {error}"
        if not self.is_up:
            return DrafterState.LOST, reason, min(last_delay_s * 2, MAX_RECONNECT_S)
        with self._changed:
            if self._breaker.fail(time.monotonic()):
                return DrafterState.OPEN, f"lost too often: {reason}", MIN_RECONNECT_S
        return DrafterState.LOST, reason, MIN_RECONNECT_S

    async def _serve(self) -> None:
        async with (
            open_channel(self.address, tls=self._tls) as draft_channel,
            open_channel(self.address, tls=self._tls) as feed_channel,
        ):
            draft = drafter_pb2_grpc.DrafterServiceStub(draft_channel).Draft()
            feed = drafter_pb2_grpc.DrafterServiceStub(feed_channel).Feed()
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                welcome = await greet_draft(
                    draft,
                    replica_id=self._replica_id,
                    digests=self._digests,
                    vocab_size=self._vocab_size,
                )
                credit_bytes = await greet_feed(feed, replica_id=self._replica_id)
            if self._breaker.begin_probe(time.monotonic()):
                await self._probe(draft, feed, welcome)
            self._opened.clear()
            self._rounds, self._chunks = asyncio.Queue(), asyncio.Queue()
            with self._changed:
                self._come_up(welcome, credit_bytes)
            await run_until_first_ends(
                self._read_answers(draft),
                self._read_acknowledgements(feed),
                write_all(draft, self._rounds),
                write_all(feed, self._chunks),
                self._until_opened(),
            )

    async def _probe(
        self,
        draft: aio.StreamStreamCall,
        feed: aio.StreamStreamCall,
        welcome: drafter_pb2.DraftResponse.Welcome,
    ) -> None:
        """Closes the breaker. Raises: _OpenError: a round is not in time; what ``probe`` raises."""
        with self._changed:
            self._state = DrafterState.HALF_OPEN
        succeeded = False
        try:
            await probe(
                draft,
                feed,
                feature_size=welcome.feature_size,
                vocab_size=self._vocab_size,
                timeout_s=self._round_timeout_s,
            )
            succeeded = True
        except TimeoutError:
            raise _OpenError("a probing round was too late") from None
        finally:
            self._breaker.end_probe(time.monotonic(), succeeded=succeeded)

    async def _read_answers(self, draft: aio.StreamStreamCall) -> None:
        while True:
            answer = (await read_message(draft, "proposals")).proposals
            received_at = time.monotonic()
            pending = self._pending_rounds.get(answer.round_id)
            if pending is None:
                raise MalformedProposalError("an answer to a round that is not outstanding")
            results = decode_answer(
                answer,
                asked=pending.sequences,
                samplings={key: session.sampling for key, session in pending.sessions.items()},
                vocab_size=self._vocab_size,
            )
            with self._changed:
                self._take_answer(answer, results, received_at)

    def _take_answer(
        self,
        answer: drafter_pb2.DraftResponse.Proposals,
        results: list[DraftResult],
        received_at: float,
    ) -> None:
        # Gone when the breaker opened while its answer was being decoded.
        pending = self._pending_rounds.pop(answer.round_id, None)
        if pending is None:
            return
        self._times.observe(answer, pending, received_at)
        for result in results:
            session = pending.sessions[result.session]
            if result.outcome is DraftOutcome.UNKNOWN_SESSION:
                session.is_lost = True
            elif result.outcome is DraftOutcome.MISSING:
                session.acknowledged_length = result.missing_from
            else:
                session.acknowledged_length = result.committed_length - 1
        if self in pending.handle.waiting:  # else it was late, and nobody may see it any more
            pending.handle.waiting.remove(self)
            pending.handle.results.extend(results)
            self._stats.num_rounds += 1
            self._times.num_rounds["answered"] += 1
            self._breaker.succeed()
            self._changed.notify_all()

    async def _read_acknowledgements(self, feed: aio.StreamStreamCall) -> None:
        while True:
            ack = (await read_message(feed, "ack")).ack
            with self._changed:
                self._take_acknowledgement(ack)

    def _take_acknowledgement(self, ack: drafter_pb2.FeedResponse.Ack) -> None:
        if not self._pending_chunks:
            raise MalformedProposalError("an acknowledgement of nothing")
        chunk = self._pending_chunks.popleft()
        session = chunk.session
        if (ack.session.request_id, ack.session.epoch) != session.key:
            raise MalformedProposalError("an acknowledgement out of order")
        if ack.credit_bytes != chunk.num_bytes or ack.length < 0:
            raise MalformedProposalError("an acknowledgement with other numbers than were sent")
        self._credit_bytes += chunk.num_bytes
        session.num_unacknowledged -= 1
        if ack.length < chunk.end:
            session.is_lost = True
        else:
            session.acknowledged_length = max(session.acknowledged_length, ack.length)
        if session.is_closing:
            self.close_session(session)

    async def _until_opened(self) -> None:
        await self._opened.wait()
        raise _OpenError(self._reason)

    def _come_up(self, welcome: drafter_pb2.DraftResponse.Welcome, credit_bytes: int) -> None:
        self._times.begin(welcome)
        self._state = DrafterState.READY
        self._reason = ""
        self._generation += 1
        self.block_size = welcome.block_size
        self.num_sessions = 0
        self._credit_bytes = credit_bytes
        self._changed.notify_all()

    def _go_down(self, state: DrafterState, reason: str) -> None:
        self._state, self._reason = state, reason
        for pending in self._pending_rounds.values():
            if self in pending.handle.waiting:
                pending.handle.waiting.remove(self)
                self._stats.num_lost += 1
                self._times.num_rounds["lost"] += 1
        self._pending_rounds.clear()
        self._pending_chunks.clear()
        self._changed.notify_all()
