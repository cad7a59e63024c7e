"""Throughput of our whole cluster and of the peer's server in its modes, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.bench.load_clients import ClusterClient, LoadClient
from cluster.bench.load_prompts import PromptSource
from cluster.bench.load_record import LoadResult
from cluster.bench.load_shape import LoadShape, Work, check_finished, make_work, run_work
from cluster.bench.openai_client import OpenAIClient
from cluster.bench.own_serving import OwnCluster, OwnSettings
from cluster.bench.peer import PeerServer, PeerSettings
from cluster.errors import DsparkError
from cluster.request import Request

OURS = "ours"
_DIGITS = 4


@dataclass
class SideResults:
    """Runs of one side, by concurrency, in order."""

    by_concurrency: dict[int, list[LoadResult]] = field(default_factory=dict)

    def throughputs(self, concurrency: int) -> list[float]:
        """Output tokens per second of each run."""
        return [result.throughput for result in self.by_concurrency[concurrency]]

    def median_figures(self, concurrency: int) -> dict[str, Any]:
        """Medians over runs of every figure of ``LoadResult.figures``."""
        runs = [result.figures() for result in self.by_concurrency[concurrency]]
        figures: dict[str, Any] = {}
        for name in runs[0]:
            values = [run[name] for run in runs if run[name] is not None]
            figures[name] = round(statistics.median(values), _DIGITS) if values else None
        return figures


def measure(
    make_client: Callable[[], LoadClient], warm_up: Sequence[Request], work: Work
) -> dict[int, LoadResult]:
    """One run of one side, as ``run_work``. Raises: DsparkError, a request failed."""
    results = run_work(make_client, warm_up, work)
    for result in results.values():
        check_finished(result)
    return results


@contextmanager
def peer_servers(
    settings: PeerSettings,
    modes: Mapping[str, Mapping[str, Any] | None],
    folder: Path,
    note: Callable[[str], None],
) -> Iterator[tuple[dict[str, PeerServer], dict[str, str]]]:
    """The peer in each mode, paused; what cannot be started is left out.

    Yields:
        Servers by mode, and by mode why one is not there.

    Raises:
        DsparkError: none can be started.
    """
    servers: dict[str, PeerServer] = {}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        for mode, speculative in modes.items():
            note(f"starting the peer: {mode}")
            server = PeerServer(settings, speculative, folder / f"peer-{mode}.log")
            stack.callback(server.close)
            try:
                server.wait_ready()
            except DsparkError as error:
                note(f"the peer cannot serve {mode}: {error}")
                failures[mode] = str(error)
                server.close()
                continue
            server.pause()
            servers[mode] = server
        if not servers:
            raise DsparkError("; ".join(failures.values()))
        yield servers, failures


def measure_in_turn(
    own: OwnSettings,
    servers: Mapping[str, PeerServer],
    prompts: PromptSource,
    shape: LoadShape,
    *,
    runs: int,
    folder: Path,
    note: Callable[[str], None],
) -> dict[str, SideResults]:
    """Runs every side so many times, on the same requests; the first one changes from run to run.

    While a side is measured, the others are paused, or not started (our cluster).

    Args:
        prompts: enough of them for all runs, so that no side finds a prompt in its cache.

    Returns:
        Results by side: ``ours``, and the peer's modes.
    """
    sides = {name: SideResults() for name in (OURS, *servers)}
    for run in range(runs):
        warm_up, work = make_work(prompts, shape)
        names = list(sides)
        first = run % len(names)
        for name in names[first:] + names[:first]:
            note(f"run {run + 1} of {runs}: {name}")
            if name == OURS:
                with OwnCluster(own, folder) as cluster:
                    results = measure(partial(ClusterClient, cluster.address), warm_up, work)
            else:
                results = _measure_peer(servers[name], warm_up, work)
            for concurrency, result in results.items():
                sides[name].by_concurrency.setdefault(concurrency, []).append(result)
    return sides


def _measure_peer(server: PeerServer, warm_up: list[Request], work: Work) -> dict[int, LoadResult]:
    server.resume()
    try:
        return measure(partial(OpenAIClient, server.url), warm_up, work)
    finally:
        server.pause()
