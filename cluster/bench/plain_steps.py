"""Plain decode steps of our engine against the peer's, in turn, on the same requests."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.load_prompts import PromptSource
from cluster.bench.own_serving import OwnSettings
from cluster.bench.paired import paired_ratio
from cluster.bench.step_server import StepServer

# Steps of a side that are not counted each time its turn comes: caches and clocks wake up.
_WARM_UP = 2


def start_own_steps(settings: OwnSettings, log: Path) -> StepServer:
    """Our engine in one process, without a drafter, to be stepped. Raises: DsparkError."""
    values = settings.values()
    values.pop("speculative", None)
    variables = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "cluster.bench.own_steps", json.dumps(values)]
    return StepServer(command, variables, log)


def compare_steps(
    own: StepServer,
    peer: StepServer,
    prompts: PromptSource,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    runs: int,
    steps: int,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Times steps of both sides; while one computes, the other waits for input.

    Both are filled once for each batch and context, with the same prompts, and then decode in turn,
    ``steps`` counted steps at a time, ``runs`` times; which comes first changes from run to run.

    Returns:
        Rows of ``concurrency`` (the batch), ``context`` (at the first step), ``ours`` and ``peer``
        (milliseconds of a step: medians over runs of medians over steps), and their ratio.
    """
    rows = []
    for context in contexts:
        for batch in batches:
            requests = [prompts.take(context) for _ in range(batch)]
            max_tokens = runs * (steps + _WARM_UP) + context
            for side in (own, peer):
                side.fill(requests, max_tokens)
            medians: dict[StepServer, list[float]] = {own: [], peer: []}
            for run in range(runs):
                for side in (own, peer) if run % 2 == 0 else (peer, own):
                    seconds = side.steps(_WARM_UP + steps)[_WARM_UP:]
                    medians[side].append(1e3 * statistics.median(seconds))
            for side in (own, peer):
                side.clear()
            row = {"concurrency": batch, "context": context}
            rows.append({**row, **paired_ratio(medians[own], medians[peer])})
            note(f"batch {batch}, context {context}: {rows[-1]['ratio']:.3f} of the peer's step")
    return rows
