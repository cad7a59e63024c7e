"""What is done to a cluster on the lab's hosts, at random but repeatably."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from cluster.bench.lab.host import Host, HostProcess
from cluster.bench.lab.lab_cluster import LabCluster

# How Ray calls the processes of each part.
PARTS = {
    "router": "ray::ServeReplica:dspark:Router",
    "front": "ray::ServeReplica:dspark:TargetReplica",
    "shard": "ray::Shard",
    "drafter": "ray::ServeReplica:dspark:Drafter",
    "controller": "ray::ServeController",
}
# And one that Serve starts, for which Serve waits as long as it takes: also when it is stopped.
_STARTING = "initialize_and_get_metadata"
DELAY_S = 0.5
SHORT_CUT_S = 2.0  # nobody takes the host for lost yet
LONG_CUT_S = 16.0  # Ray has taken it for lost, and its parts are elsewhere when it comes back
STOP_S = 8.0  # of those stopped processes that wake up again
_NODE_AWAY_S = 3.0  # until a killed node is started again
_TEND_PERIOD_S = 1.0


class Blow(NamedTuple):
    """Something done to a part: kill; stop for good; pause, from which it wakes with old state."""

    part: str
    how: str


class Disturbance(NamedTuple):
    """Something done to the network, for a while: cut or delay, of a host, a pair or all."""

    how: str
    what: str


_Card = TypeVar("_Card")

BLOWS = (
    Blow("shard", "kill"),
    Blow("drafter", "kill"),
    Blow("router", "kill"),
    Blow("shard", "stop"),
    Blow("front", "kill"),
    Blow("drafter", "pause"),
    Blow("node", "kill"),
    Blow("drafter", "stop"),
    Blow("shard", "pause"),
    Blow("router", "pause"),
    Blow("controller", "kill"),
    Blow("front", "pause"),
    Blow("router", "stop"),
    Blow("front", "stop"),
)
DISTURBANCES = (
    Disturbance("cut", "host"),
    Disturbance("delay", "host"),
    Disturbance("cut", "pair"),
    Disturbance("delay", "all"),
    Disturbance("short cut", "host"),
    Disturbance("long cut", "host"),
)


class Faults:
    """Deals blows and disturbances, each kind once before any comes again.

    Nodes of Ray that have ended come back by themselves while the ``async with`` block runs.

    Args:
        cluster: what is broken; its head keeps its Ray, and is never cut off from all.
        seed: of every choice.

    Attributes:
        log: what was done, in order.
    """

    def __init__(self, cluster: LabCluster, *, seed: int) -> None:
        self.log: list[str] = []
        self._cluster = cluster
        self._rng = random.Random(seed)
        self._blows: list[Blow] = []
        self._disturbances: list[Disturbance] = []
        self._away_until: dict[str, float] = {}
        self._paused: dict[HostProcess, Host] = {}
        self._tending: asyncio.Task[None] | None = None
        self._start = time.monotonic()

    async def __aenter__(self) -> Faults:
        self._tending = asyncio.create_task(self._tend())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)

    @property
    def is_whole(self) -> bool:
        """Whether every node of Ray runs."""
        return all(node.is_running for node in self._cluster.nodes.values())

    async def strike(self) -> Blow | None:
        """Kills or stops a random part; ``None`` where there is none of its kind now."""
        blow = self._deal(self._blows, BLOWS)
        if blow.part == "node":
            name = self._rng.choice(self._workers())
            self._away_until[name] = time.monotonic() + _NODE_AWAY_S
            await asyncio.to_thread(self._cluster.nodes[name].kill)
            self._note(f"kill node {name}")
            return blow
        found = [
            (process, host)
            for host in self._cluster.network.hosts.values()
            for process in host.processes(PARTS[blow.part])
            if blow.how != "stop" or _STARTING not in process.command
        ]
        if not found:
            self._note(f"{blow.how} {blow.part}: there is none")
            return None
        process, host = self._rng.choice(found)
        number = signal.SIGKILL if blow.how == "kill" else signal.SIGSTOP
        host.send_to(process, number)
        self._note(f"{blow.how} {blow.part} {process.pid} on {host.name}")
        if blow.how == "pause":
            self._paused[process] = host
            asyncio.get_running_loop().call_later(STOP_S, self._wake, process)
        return blow

    async def disturb(self, seconds: float) -> Disturbance:
        """Cuts or slows some links for a while; returns behind it."""
        disturbance = self._deal(self._disturbances, DISTURBANCES)
        network = self._cluster.network
        names = list(network.hosts)
        host = self._rng.choice(self._workers())
        other = self._rng.choice([name for name in names if name != host])
        seconds = {"short cut": SHORT_CUT_S, "long cut": LONG_CUT_S}.get(disturbance.how, seconds)
        where: list[tuple[str, str | None]] = [(name, None) for name in names]
        if disturbance.what != "all":
            where = [(host, other if disturbance.what == "pair" else None)]
        for first, second in where:
            if disturbance.how == "delay":
                network.delay(DELAY_S, first, second)
            else:
                network.cut(first, second)
        targets = {"host": host, "pair": f"{host} and {other}"}.get(disturbance.what, "all")
        self._note(f"{disturbance.how} of {targets} for {seconds:.0f} s")
        try:
            await asyncio.sleep(seconds)
        finally:
            network.mend()
        return disturbance

    def wake_all(self) -> None:
        """Wakes what was only to pause."""
        for process in list(self._paused):
            self._wake(process)

    def _wake(self, process: HostProcess) -> None:
        host = self._paused.pop(process, None)
        if host is not None:
            host.send_to(process, signal.SIGCONT)

    def _deal(self, deck: list[_Card], cards: Sequence[_Card]) -> _Card:
        if not deck:
            deck.extend(self._rng.sample(cards, len(cards)))
        return deck.pop()

    def _workers(self) -> list[str]:
        return [name for name in self._cluster.nodes if name != self._cluster.head.name]

    def _note(self, what: str) -> None:
        self.log.append(f"{time.monotonic() - self._start:6.1f} s  {what}")

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(_TEND_PERIOD_S)
            now = time.monotonic()
            away = {name for name, until in self._away_until.items() if now < until}
            for name in await asyncio.to_thread(self._cluster.tend, away):
                self._note(f"node {name} is started again")
