"""Live drafters whose messages are often broken, for those that use them.

Every few of a drafter's messages are broken: greetings, proposals and acknowledgements, each behind
valid ones. A drafter that is caught is left alone by its replica, so another one takes its place,
under a new name; some stay, to be probed by their breaker.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

from google.protobuf.message import Message

from cluster.bench.fuzz_live_counts import LiveCounts
from cluster.bench.fuzz_mutators import mutate_bytes, mutate_message
from cluster.bench.fuzz_proposals import DIGESTS, make_credit, make_proposals, make_welcome
from cluster.bench.fuzz_surfaces import VOCAB_SIZE
from cluster.config import SpeculativeConfig
from cluster.rpc.draft_messages import chunk_bytes
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.raw_server import RawServer, Read, Write
from cluster.v1 import drafter_pb2

_NUM_PROBED = 2  # of the drafters stay, however often they are caught
_BROKEN = 0.5  # of messages behind the greeting
_BROKEN_GREETINGS = 0.1
_BYTES_TOO = 0.3  # of broken messages have bytes changed behind their fields
_MOST_REPEATS = 20  # an endless stream's, in one go
_SWAP_S = 0.01
# One whose greeting gives no credit, say, is sent nothing that it could answer.
_OLDEST_S = 3.0
_MAX_SESSIONS = 1000
_UP = ("ready", "connecting", "half-open", "draining")


class HostileDrafters:
    """Every drafter there is, behind one port; honest once enough was sent."""

    def __init__(self, counts: LiveCounts, num_messages: int, rng: random.Random) -> None:
        self.server = RawServer(
            "cluster.v1.DrafterService", {"Draft": self._draft, "Feed": self._feed}
        )
        self._counts = counts
        self._num_messages = num_messages
        self._rng = rng
        # Sessions whose drafts are to come with their law: the latest.
        self._with_law: dict[tuple[str, int], None] = {}

    async def _draft(self, read: Read, write: Write) -> None:
        await read()
        welcome = drafter_pb2.DraftResponse(welcome=make_welcome("d"))
        await self._write(write, welcome, _BROKEN_GREETINGS)
        while (data := await read()) is not None:
            message = drafter_pb2.DraftRequest.FromString(data)
            if not message.HasField("round"):
                continue
            asked = message.round
            proposals = make_proposals(
                asked.round_id, asked.sequences, self._rng, has_law=self._has_law
            )
            await self._write(write, drafter_pb2.DraftResponse(proposals=proposals), _BROKEN)

    async def _feed(self, read: Read, write: Write) -> None:
        await read()
        welcome = drafter_pb2.FeedResponse(welcome=make_credit())
        await self._write(write, welcome, _BROKEN_GREETINGS)
        while (data := await read()) is not None:
            chunk = drafter_pb2.FeedRequest.FromString(data).chunk
            if chunk.sampling.send_probs:
                self._with_law[chunk.session.request_id, chunk.session.epoch] = None
                while len(self._with_law) > _MAX_SESSIONS:
                    del self._with_law[next(iter(self._with_law))]
            ack = drafter_pb2.FeedResponse.Ack(
                session=chunk.session,
                length=chunk.start + len(chunk.token_ids) - 1,
                credit_bytes=chunk_bytes(chunk),
            )
            # Seldom: a session without features is not drafted for.
            await self._write(write, drafter_pb2.FeedResponse(ack=ack), _BROKEN_GREETINGS)

    def _has_law(self, key: drafter_pb2.SessionKey) -> bool:
        return (key.request_id, key.epoch) in self._with_law

    async def _write(self, write: Write, message: Message, broken: float) -> None:
        rng = self._rng
        if self._counts.num_messages >= self._num_messages or rng.random() >= broken:
            await write(message.SerializeToString())
            return
        mutate_message(message, rng)
        data = message.SerializeToString()
        if rng.random() < _BYTES_TOO:
            data = mutate_bytes(data, rng)
        repeats = rng.randint(2, _MOST_REPEATS) if rng.random() < 0.02 else 1
        for _ in range(repeats):
            self._counts.num_messages += 1
            await write(data)


class SuppliedClient(NamedTuple):
    """A replica's client of hostile drafters, and the task that keeps it in them."""

    client: GrpcDraftClient
    supplying: asyncio.Task[None]


@asynccontextmanager
async def supplied_client(
    counts: LiveCounts,
    config: SpeculativeConfig,
    num_messages: int,
    rng: random.Random,
    *,
    num_drafters: int,
) -> AsyncIterator[SuppliedClient]:
    """So many hostile drafters at a time and their client; what became of rounds and drafters is
    counted behind it, and that none was caught is a failure."""
    drafters = HostileDrafters(counts, num_messages, rng)
    address = f"127.0.0.1:{await drafters.server.start('127.0.0.1')}"
    client = GrpcDraftClient(
        replica_id="r",
        digests=DIGESTS,
        vocab_size=VOCAB_SIZE,
        config=config,
        event_loop=asyncio.get_running_loop(),
    )
    states: Counter[str] = Counter()
    supplying = asyncio.create_task(
        _keep_supplied(client, address, states, num_drafters=num_drafters)
    )
    try:
        yield SuppliedClient(client, supplying)
    finally:
        supplying.cancel()
        await asyncio.to_thread(client.close)
        await drafters.server.stop()
    stats = client.stats
    counts.outcomes.update(
        {
            "answered rounds": stats.num_rounds,
            "lost rounds": stats.num_lost,
            "late rounds": stats.num_late,
            "malformed": stats.num_malformed,
            "mismatched": stats.num_mismatched,
            **{f"drafters {state}": number for state, number in states.items()},
        }
    )
    if not stats.num_malformed or not states["quarantined"]:
        counts.fail(f"no drafter was caught: {stats}, {states}")


async def _keep_supplied(
    client: GrpcDraftClient, address: str, states: Counter[str], *, num_drafters: int
) -> None:
    """Keeps the client in drafters: those that it has left alone, and old ones, are replaced, but
    for a few; counts the states that they come to."""
    names = (f"d{number}" for number in range(1 << 60))
    probed = [next(names) for _ in range(_NUM_PROBED)]
    born: dict[str, float] = {}
    last: dict[str, str] = {}
    while True:
        now = time.monotonic()
        found = {status.drafter_id: status.state for status in client.status()}
        states.update(state for name, state in found.items() if last.get(name) != state)
        last = found
        born = {
            name: since
            for name, since in born.items()
            if found.get(name, "connecting") in _UP and now - since < _OLDEST_S
        }
        while len(born) < num_drafters - _NUM_PROBED:
            born[next(names)] = now
        client.set_drafters([(name, address) for name in (*probed, *born)])
        await asyncio.sleep(_SWAP_S)


def check_client(counts: LiveCounts, client: GrpcDraftClient) -> None:
    """What the engine plans with must be numbers, whatever drafters say."""
    times, stats = client.times(), client.stats
    for value in (
        client.predicted_round_s(4, 8),
        *(times.compute_s, times.queue_s, times.network_s),
        *(stats.compute_s, stats.network_s, stats.round_trip_s),
    ):
        if not math.isfinite(value):
            counts.fail(f"a time is {value}: {times}, {stats}")


@contextmanager
def no_mistakes(counts: LiveCounts) -> Iterator[None]:
    """What a connection logs as a mistake of its own counts as a failure."""

    class _Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            counts.fail(f"{record.getMessage()}: {record.exc_info}")

    handler = _Handler(logging.ERROR)
    logger = logging.getLogger("cluster")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
