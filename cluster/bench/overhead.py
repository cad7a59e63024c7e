"""Suite ``overhead``: what serving costs beside computing.

The same requests, at the same concurrency, through a gRPC client to the whole cluster and straight
to an engine of the same configuration in the client's process, its drafter included; in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.bench.load_clients import ClusterClient, EngineClient
from cluster.bench.load_prompts import PromptSource
from cluster.bench.load_record import LoadResult
from cluster.bench.load_shape import LoadShape, Work, make_work
from cluster.bench.local_engine import build_looped_engine
from cluster.bench.own_serving import OwnCluster, OwnSettings, profile_curve
from cluster.bench.paired import paired_ratio
from cluster.bench.report import Report
from cluster.bench.served_load import measure
from cluster.config import ClusterConfig
from cluster.engine.target_config import load_tokenizer
from cluster.request import Request

_THROUGHPUT_BAR = 0.95
_FIRST_TOKEN_BAR_MS = 5.0
_CURVE_REPEATS = 5
_DIGITS = 4


def run(
    own: OwnSettings,
    *,
    shape: LoadShape,
    data: str,
    runs: int,
    folder: Path,
    note: Callable[[str], None],
) -> Report:
    """Runs the suite; passes where throughput and time to first token hold their bars.

    Args:
        own: what is served.
        shape: of the load; one concurrency.
        data: prompts, as ``load_prompt_set``.
        runs: paired runs.
        folder: exists; takes the cluster's log.

    Raises:
        DsparkError: the cluster does not start, or a request failed.
    """
    (concurrency,) = shape.concurrencies
    prompts = PromptSource(
        data,
        load_tokenizer(own.target),
        count=shape.num_prompts(runs),
        num_tokens=shape.prompt_tokens,
    )
    note("measuring the verify curve")
    own = profile_curve(own, folder, _CURVE_REPEATS)
    served: list[LoadResult] = []
    in_process: list[LoadResult] = []
    for index in range(runs):
        warm_up, work = make_work(prompts, shape)
        # Which side comes first changes from run to run.
        for is_served in (True, False) if index % 2 == 0 else (False, True):
            note(f"run {index + 1} of {runs}: {'cluster' if is_served else 'engine'}")
            if is_served:
                served.append(_through_cluster(own, folder, warm_up, work)[concurrency])
            else:
                in_process.append(_through_engine(own, warm_up, work)[concurrency])
    figures = overhead_figures(served, in_process)
    passed = (
        figures["throughput_ratio"] >= _THROUGHPUT_BAR
        and figures["first_token_ms"] <= _FIRST_TOKEN_BAR_MS
    )
    return Report(suite="overhead", figures=figures, passed=passed)


def overhead_figures(
    served: Sequence[LoadResult], in_process: Sequence[LoadResult]
) -> dict[str, Any]:
    """Figures of paired runs.

    Returns:
        ``throughput_ratio``: cluster over engine, with its interval; ``first_token_ms``: how much
        later the first token comes, the median over runs of the difference of medians.
    """
    throughput = paired_ratio(
        [result.throughput for result in served], [result.throughput for result in in_process]
    )
    later = [
        1e3 * (statistics.median(a.first_tokens_s) - statistics.median(b.first_tokens_s))
        for a, b in zip(served, in_process, strict=True)
    ]
    return {
        "throughput_ratio": throughput["ratio"],
        "throughput_ratio_interval": [throughput["ratio_low"], throughput["ratio_high"]],
        "first_token_ms": round(statistics.median(later), _DIGITS),
        "first_token_ms_by_run": [round(value, _DIGITS) for value in later],
        "sides": [
            {"side": name, "run": index + 1, **result.figures()}
            for name, results in (("cluster", served), ("engine", in_process))
            for index, result in enumerate(results)
        ],
    }


def _through_cluster(
    own: OwnSettings, folder: Path, warm_up: list[Request], work: Work
) -> dict[int, LoadResult]:
    with OwnCluster(own, folder) as cluster:
        return measure(partial(ClusterClient, cluster.address), warm_up, work)


def _through_engine(own: OwnSettings, warm_up: list[Request], work: Work) -> dict[int, LoadResult]:
    engine = build_looped_engine(ClusterConfig.parse(own.values()))
    return measure(partial(EngineClient, engine), warm_up, work)
