"""The target replicas that a router knows, and the requests that wait for one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from cluster.rpc.channels import DEFAULT_MAX_MESSAGE_BYTES
from cluster.rpc.replica_connection import ReplicaConnection
from cluster.rpc.tls import ChannelTls
from cluster.v1 import inference_pb2


class Placeable(Protocol):
    """Something that runs on a replica; hashable by identity."""

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
        wait_s: seconds that ``place`` waits for a ready replica.
        tokenizer_digest: hex SHA-256 that replicas must share; empty: any.
        max_message_bytes: the largest message sent or received.
        tls: of connections to replicas; unset: plaintext.
    """

    def __init__(
        self,
        router_id: str,
        *,
        wait_s: float,
        tokenizer_digest: str = "",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls: ChannelTls | None = None,
    ) -> None:
        self._router_id = router_id
        self._wait_s = wait_s
        self._tokenizer_digest = tokenizer_digest
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._connections: dict[tuple[str, str], ReplicaConnection] = {}
        self._retired: set[ReplicaConnection] = set()
        self._waiting: dict[Placeable, _Wait] = {}

    def set_replicas(self, replicas: Iterable[tuple[str, str]]) -> None:
        """Connects to new (id, ``host:port``) pairs, and retires those that are missing."""
        wanted = set(replicas)
        for key in self._connections.keys() - wanted:
            connection = self._connections.pop(key)
            self._retired.add(connection)
            connection.retire()
        for replica_id, address in wanted - self._connections.keys():
            self._connections[replica_id, address] = ReplicaConnection(
                replica_id,
                address,
                self._router_id,
                on_ready=self._place_waiting,
                on_closed=self._retired.discard,
                tokenizer_digest=self._tokenizer_digest,
                max_message_bytes=self._max_message_bytes,
                tls=self._tls,
            )

    def place(
        self,
        placeable: Placeable,
        *,
        avoid: ReplicaConnection | None = None,
        target_digest: str | None = None,
    ) -> None:
        """Puts it on the least loaded ready replica, or waits for one.

        Args:
            avoid: not on this one, unless it becomes ready anew.
            target_digest: only where this target runs; unset: anywhere.
        """
        ready = [
            c
            for c in self._connections.values()
            if c is not avoid and _is_ready_for(c, target_digest)
        ]
        if ready:
            placeable.on_placed(_least_loaded(ready))
            return
        event_loop = asyncio.get_running_loop()
        timer = event_loop.call_later(self._wait_s, self._give_up, placeable)
        self._waiting[placeable] = _Wait(timer, target_digest)

    def withdraw(self, placeable: Placeable) -> None:
        """Waits no longer; what does not wait is ignored."""
        waited = self._waiting.pop(placeable, None)
        if waited is not None:
            waited.timer.cancel()

    def limits(self, vocab_size: int, max_model_len: int) -> tuple[int, int]:
        """The least (vocabulary, context) over the given ones and the ready replicas'."""
        for connection in self._connections.values():
            if connection.is_ready and connection.welcome is not None:
                vocab_size = min(vocab_size, connection.welcome.vocab_size)
                max_model_len = min(max_model_len, connection.welcome.max_model_len)
        return vocab_size, max_model_len

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

    def _place_waiting(self, connection: ReplicaConnection) -> None:
        for placeable, waited in list(self._waiting.items()):
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


def _least_loaded(connections: list[ReplicaConnection]) -> ReplicaConnection:
    return min(connections, key=lambda c: (c.num_queued_tokens, random.random()))
