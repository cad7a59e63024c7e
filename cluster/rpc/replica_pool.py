"""The target replicas that a router knows, and the requests that wait for one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

from cluster.routing.replica_choice import ChoicePolicy
from cluster.routing.replica_picker import Prompt, ReplicaPicker
from cluster.rpc.channels import DEFAULT_MAX_MESSAGE_BYTES
from cluster.rpc.replica_connection import ReplicaConnection
from cluster.rpc.tls import ChannelTls
from cluster.v1 import inference_pb2


class Placeable(Protocol):
    """Something that runs on a replica; hashable by identity.

    Attributes:
        prompt: what has to be computed for it.
        turn: what waits is placed in this order.
        deadline: it waits so long (``time.monotonic()``); unset: for the pool's ``wait_s``.
    """

    @property
    def prompt(self) -> Prompt: ...

    @property
    def turn(self) -> float: ...

    @property
    def deadline(self) -> float | None: ...

    def on_placed(self, connection: ReplicaConnection) -> None:
        """Run it there; the connection is ready."""

    def on_unplaced(self, reason: str) -> None:
        """No replica became ready in time."""


class _Wait(NamedTuple):
    """How long something waits, and for which target (unset: any)."""

    timer: asyncio.TimerHandle
    target_digest: str | None


class ReplicaPool:
    """One connection for each replica, and a bounded wait where none is ready.

    Guarantees: what is given to ``place`` is answered once, by ``on_placed`` or ``on_unplaced``,
    unless it is withdrawn before. A replica that was taken out finishes what it runs.

    Args:
        router_id: who connects.
        policy: how replicas are scored.
        wait_s: seconds that ``place`` waits for a ready replica with what has no deadline.
        tokenizer_digest: hex SHA-256 that replicas must share; empty: any.
        max_message_bytes: the largest message sent or received.
        tls: of connections to replicas; unset: plaintext.

    Attributes:
        num_restarts: what lost its replica and was to go on elsewhere.
        has_been_ready: set once some replica could take requests, and from then on.
    """

    def __init__(
        self,
        router_id: str,
        *,
        wait_s: float,
        policy: ChoicePolicy | None = None,
        tokenizer_digest: str = "",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls: ChannelTls | None = None,
    ) -> None:
        self.num_restarts = 0
        self.has_been_ready = asyncio.Event()
        self._router_id = router_id
        self.wait_s = wait_s
        self._tokenizer_digest = tokenizer_digest
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._picker = ReplicaPicker(policy)
        self._connections: dict[tuple[str, str], ReplicaConnection] = {}
        self._retired: set[ReplicaConnection] = set()
        self._limits: tuple[int | None, int | None] = None, None
        self._limits_at = -1
        self._by_slot: dict[int, ReplicaConnection] = {}
        self._waiting: dict[Placeable, _Wait] = {}

    def set_replicas(self, replicas: Iterable[tuple[str, str]]) -> None:
        """Connects to new (id, ``host:port``) pairs, and retires those that are missing."""
        wanted = set(replicas)
        for key in self._connections.keys() - wanted:
            connection = self._connections.pop(key)
            self._retired.add(connection)
            connection.retire()
        for replica_id, address in wanted - self._connections.keys():
            connection = ReplicaConnection(
                replica_id,
                address,
                self._router_id,
                picker=self._picker,
                on_ready=self._on_ready,
                on_closed=self._on_closed,
                tokenizer_digest=self._tokenizer_digest,
                max_message_bytes=self._max_message_bytes,
                tls=self._tls,
            )
            self._connections[replica_id, address] = connection
            self._by_slot[connection.slot] = connection

    def place(
        self,
        placeable: Placeable,
        *,
        avoid: Collection[ReplicaConnection] = (),
        target_digest: str | None = None,
    ) -> bool:
        """Puts it on the ready replica that suits it best, or waits for one. Returns whether one
        was ready.

        Args:
            avoid: not on these, unless one becomes ready anew.
            target_digest: only where this target runs; unset: anywhere.
        """
        if self.place_now(placeable, avoid=avoid, target_digest=target_digest):
            return True
        event_loop = asyncio.get_running_loop()
        wait_s = self.wait_s
        if placeable.deadline is not None:
            wait_s = placeable.deadline - time.monotonic()
        timer = event_loop.call_later(wait_s, self._give_up, placeable)
        self._waiting[placeable] = _Wait(timer, target_digest)
        return False

    def place_now(
        self,
        placeable: Placeable,
        *,
        avoid: Collection[ReplicaConnection] = (),
        target_digest: str | None = None,
    ) -> bool:
        """As ``place`` without waiting. Returns whether a replica was ready."""
        among = None
        if target_digest is not None:
            among = [s for s, c in self._by_slot.items() if c.target_digest == target_digest]
        # The slot of one that is gone may be another's by now.
        avoided = [c.slot for c in avoid if self._by_slot.get(c.slot) is c]
        slot = self._picker.pick(placeable.prompt, avoid=avoided, among=among)
        if slot is None:
            return False
        placeable.on_placed(self._by_slot[slot])
        return True

    def refused(self, connection: ReplicaConnection) -> None:
        """The replica has answered that its queue is full: others are tried first for a while."""
        self._picker.refused(connection.slot)

    def withdraw(self, placeable: Placeable) -> None:
        """Waits no longer; what does not wait is ignored."""
        waited = self._waiting.pop(placeable, None)
        if waited is not None:
            waited.timer.cancel()

    def limits(self, vocab_size: int, max_model_len: int) -> tuple[int, int]:
        """The least (vocabulary, context) over the given ones and the ready replicas'."""
        if self._limits_at != self._picker.num_changes:
            self._limits_at = self._picker.num_changes
            ready = [c.welcome for c in self._connections.values() if c.is_ready and c.welcome]
            vocab_sizes, lengths = [w.vocab_size for w in ready], [w.max_model_len for w in ready]
            self._limits = min(vocab_sizes, default=None), min(lengths, default=None)
        least_vocab, least_len = self._limits
        return (
            vocab_size if least_vocab is None else min(vocab_size, least_vocab),
            max_model_len if least_len is None else min(max_model_len, least_len),
        )

    def statuses(self) -> list[inference_pb2.ReplicaStatus]:
        """Every replica's status, retired ones included, by id."""
        connections = [*self._connections.values(), *self._retired]
        return sorted((c.status() for c in connections), key=lambda status: status.replica_id)

    async def close(self) -> None:
        """Ends every connection; what waits is told that there is no replica."""
        connections = [*self._connections.values(), *self._retired]
        self._connections.clear()
        await asyncio.gather(*(connection.close() for connection in connections))
        for placeable in list(self._waiting):
            self._give_up(placeable)

    def _on_closed(self, connection: ReplicaConnection) -> None:
        self._retired.discard(connection)
        del self._by_slot[connection.slot]

    def _on_ready(self, connection: ReplicaConnection) -> None:
        self.has_been_ready.set()
        for placeable, waited in sorted(self._waiting.items(), key=lambda item: item[0].turn):
            if _is_ready_for(connection, waited.target_digest):
                self.withdraw(placeable)
                placeable.on_placed(connection)

    def _give_up(self, placeable: Placeable) -> None:
        reason = self._why_unplaced(self._waiting[placeable].target_digest)
        self.withdraw(placeable)
        placeable.on_unplaced(reason)

    def _why_unplaced(self, target_digest: str | None) -> str:
        parts = ["no target replica is ready"]
        if target_digest is not None:
            parts[0] += f" that runs the same target as the lost one ({_short(target_digest)})"
        for connection in self._connections.values():
            if connection.reason:
                parts.append(f"{connection.replica_id} {connection.reason}")
            elif connection.is_ready:
                parts.append(f"{connection.replica_id} runs {_short(connection.target_digest)}")
        return "; ".join(parts)


def _is_ready_for(connection: ReplicaConnection, target_digest: str | None) -> bool:
    return connection.is_ready and target_digest in (None, connection.target_digest)


def _short(digest: str) -> str:
    return digest[:12] or "an unnamed target"
