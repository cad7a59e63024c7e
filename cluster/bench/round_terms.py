"""The terms of a speculative round, each measured alone: drafting, and verifying.

Run as a program, it prints them as one JSON object (seconds); its argument is a JSON object with
``values`` (the ``args`` of a configuration), ``prompts`` (token ids), ``max_tokens`` and
``verify_tokens``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from cluster.bench.local_engine import run_requests
from cluster.config import ClusterConfig
from cluster.engine.draft_client import DraftResult, DraftRound
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.drafter_calibration import load_drafter_calibration
from cluster.engine.local_drafter import LocalDraftClient
from cluster.engine.local_shards import local_shards
from cluster.engine.pages import PagePool
from cluster.engine.profile import BatchShape, StepProbe
from cluster.engine.worker import ShardWorker
from cluster.request import Request, SamplingParams

_VERIFY_REPEATS = 50
_WARM_UP = 5


class TimedDraftClient(LocalDraftClient):
    """A local drafter that notes how long each round of one sequence takes, in seconds."""

    def __init__(self, engine: DraftEngine) -> None:
        super().__init__(engine)
        self.seconds: list[float] = []

    def collect(self, handle: DraftRound, timeout_s: float) -> list[DraftResult]:
        """As ``LocalDraftClient``."""
        started = time.perf_counter()
        results = super().collect(handle, timeout_s)
        if any(result.proposal is not None for result in results):
            self.seconds.append(time.perf_counter() - started)
        return results


def draft_seconds(
    config: ClusterConfig, prompts: Sequence[Sequence[int]], max_tokens: int
) -> float:
    """Median seconds of a round of one request: features in, proposal out, no network.

    Raises:
        RuntimeError: not one round was drafted.
    """
    client = TimedDraftClient(build_draft_engine(config, seed=0))
    worker = ShardWorker(config, 0)
    worker.start("", 0, 0)
    engine = worker.build_engine(client, calibration=load_drafter_calibration(config), seed=0)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    requests = [
        Request(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]
    run_requests(engine, requests, lambda output: None, max_active=1)
    engine.close()
    if len(client.seconds) <= _WARM_UP:
        raise RuntimeError(f"only {len(client.seconds)} rounds were drafted")
    return statistics.median(client.seconds[_WARM_UP:])


def verify_seconds(config: ClusterConfig, num_tokens: int, context: int) -> float:
    """Median seconds of a pass over one request's ``num_tokens`` behind ``context`` cached ones."""
    with local_shards(config) as runner:
        shard = runner.shard
        pages = PagePool(shard.num_pages, shard.page_size, shard.cache.release)
        longest = min(config.target.max_model_len or shard.max_model_len, shard.max_model_len)
        probe = StepProbe(runner, pages, config.target, longest)
        shape = BatchShape((num_tokens,), (context,))
        seconds = [probe.measure(shape) for _ in range(_WARM_UP + _VERIFY_REPEATS)]
    return statistics.median(seconds[_WARM_UP:])


def main(argument: dict[str, Any]) -> dict[str, float]:
    """Both terms."""
    config = ClusterConfig.parse(argument["values"])
    prompts, max_tokens = argument["prompts"], argument["max_tokens"]
    context = len(prompts[0]) + max_tokens // 2
    return {
        "draft_s": draft_seconds(config, prompts, max_tokens),
        "verify_s": verify_seconds(config, argument["verify_tokens"], context),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
