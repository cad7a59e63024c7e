"""What a cluster holds when it rests, before and behind what was done to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.bench.chaos_faults import PARTS
from cluster.bench.lab.host import Host
from cluster.errors import DsparkError
from cluster.rpc.cluster_status import ClusterStatus
from cluster.rpc.drafter_status import drafter_holdings

# Processes of Ray's own on each host, by what tells them apart.
_RAY_PARTS = {
    "raylet": "/raylet/raylet",
    "gcs": "gcs_server",
    "agent": "DashboardAgent",
    "environment agent": "RuntimeEnvAgent",
}
# Ray keeps workers that nobody needs for a while, and ends them by itself.
_IDLE = "ray::IDLE"
# Files and threads that one process may have more of than any of its kind had before: connections
# to peers are opened when first needed, and threads of pools too.
FILES_SLACK = 12
THREADS_SLACK = 8
_TIMEOUT_S = 3.0


@dataclass(kw_only=True)
class Census:
    """Counts of a cluster at rest.

    Attributes:
        processes: by kind.
        most_files, most_threads: that one process has, by kind of our parts.
        stopped: processes that were stopped and are still there.
        num_requests: that replicas or routers hold.
        num_pages_held: replicas whose requests hold pages.
        num_sessions: on drafters.
        unanswered: drafters that do not say what they hold.
    """

    processes: Counter[str] = field(default_factory=Counter)
    most_files: dict[str, int] = field(default_factory=dict)
    most_threads: dict[str, int] = field(default_factory=dict)
    stopped: int = 0
    num_requests: int = 0
    num_pages_held: int = 0
    num_sessions: int = 0
    unanswered: int = 0

    def leaks(self, before: Census) -> list[str]:
        """What there is too much of, or too little of among processes."""
        found = []
        for kind in sorted({*self.processes, *before.processes}):
            now, then = self.processes[kind], before.processes[kind]
            if now != then:
                found.append(f"{now} processes of {kind}, {then} before")
        for name, slack, now_most, then_most in (
            ("files", FILES_SLACK, self.most_files, before.most_files),
            ("threads", THREADS_SLACK, self.most_threads, before.most_threads),
        ):
            for kind, most in now_most.items():
                if most > then_most.get(kind, 0) + slack:
                    found.append(f"{most} {name} of a {kind}, {then_most.get(kind, 0)} before")
        for what, count in (
            ("stopped processes", self.stopped),
            ("requests", self.num_requests),
            ("replicas with pages held", self.num_pages_held),
            ("draft sessions", self.num_sessions),
            ("drafters that do not answer", self.unanswered),
        ):
            if count > 0:
                found.append(f"{count} {what}")
        return found


async def take_census(hosts: Iterable[Host], statuses: Iterable[ClusterStatus]) -> Census:
    """Counts now.

    Args:
        hosts: all of the lab.
        statuses: every router's.
    """
    census = Census()
    for host in hosts:
        for process in host.processes():
            kind = _kind(process.command)
            if kind is None:
                continue
            census.processes[kind] += 1
            with contextlib.suppress(OSError):
                _count(census, kind, Path(f"/proc/{process.pid}"))
    drafters: set[str] = set()
    for status in statuses:
        census.num_requests += status.num_active_requests
        for replica in status.replicas:
            census.num_requests += replica.num_running + replica.num_waiting
            census.num_pages_held += replica.kv_cache_usage > 0
            drafters |= {drafter.address for drafter in replica.drafters}
    asked = (drafter_holdings(address, timeout_s=_TIMEOUT_S) for address in drafters)
    for holdings in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(holdings, DsparkError):
            census.unanswered += 1
        elif isinstance(holdings, BaseException):
            raise holdings
        else:
            census.num_sessions += holdings.num_sessions
    return census


def _kind(command: str) -> str | None:
    for kind, title in {**PARTS, **_RAY_PARTS}.items():
        if title in command:
            return kind
    return "other worker" if command.startswith("ray::") and _IDLE not in command else None


def _count(census: Census, kind: str, process: Path) -> None:
    state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    census.stopped += state == "T"
    if kind in PARTS:
        files, threads = len(os.listdir(process / "fd")), len(os.listdir(process / "task"))
        census.most_files[kind] = max(census.most_files.get(kind, 0), files)
        census.most_threads[kind] = max(census.most_threads.get(kind, 0), threads)
