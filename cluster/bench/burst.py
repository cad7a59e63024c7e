"""Suite ``burst``: load that rises from light to several times saturation, and falls again.

The same arrivals, once with adaptive speculation and once without any, in turn. One engine in this
process, its drafter in another one over gRPC.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.bench.load_prompts import PromptSource
from cluster.bench.paired import paired_ratio
from cluster.bench.report import Report
from cluster.bench.turns import engines, pace_label
from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.engine.target_config import load_tokenizer
from cluster.errors import DsparkError, QueueFullError
from cluster.request import Request, RequestOutput, SamplingParams
from cluster.speculation.switch import SpeculationMode

_MAX_FLIPS = 4
_TIME_BAR = 1.05
_RECOVERED_BAR = 0.9
_RECOVERY_S = 10.0
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class BurstShape:
    """The load.

    Attributes:
        runs: of both sides.
        light, burst: arrivals as a multiple of what plain decoding can serve at most.
        light_s, burst_s, after_s: how long each lasts; ``after_s`` counts once nothing waits.
        prompt_tokens, max_tokens: of a request.
        data: prompts, as ``load_prompt_set``.
    """

    runs: int = 10
    light: float = 0.2
    burst: float = 3.0
    light_s: float = 15.0
    burst_s: float = 10.0
    after_s: float = 20.0
    prompt_tokens: int = 64
    max_tokens: int = 64
    data: str = "stdlib-heldout"


@dataclass(eq=False)
class _Served:
    """One request as its user saw it: when its chunks came, and how many tokens they had."""

    sent: float
    chunks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.chunks)

    @property
    def token_s(self) -> float:
        """Time per output token behind the first chunk."""
        (first, count), (last, _) = self.chunks[0], self.chunks[-1]
        return (last - first) / max(self.num_tokens - count, 1)

    def gaps_s(self) -> list[float]:
        """Times from chunk to chunk."""
        times = [when for when, _ in self.chunks]
        return [after - before for before, after in itertools.pairwise(times)]


@dataclass(frozen=True, kw_only=True)
class BurstRun:
    """What one side made of the load.

    Attributes:
        token_p95_s, gap_p95_s: of requests sent in the burst.
        rate_before, rate_after: tokens a second of a user under light load, medians.
        went_off: whether it decoded plainly in the burst, or while what it left was served.
        back_on_s: from the moment when nothing waited any more until it speculated again.
        flips, failed, refused: counts.
    """

    token_p95_s: float
    gap_p95_s: float
    rate_before: float
    rate_after: float
    went_off: bool
    back_on_s: float
    flips: int
    failed: int
    refused: int


def run(values: dict[str, Any], shape: BurstShape, note: Callable[[str], None]) -> Report:
    """Runs the suite.

    Raises:
        DsparkError: target or drafter cannot be served so, or a light load is too short.
    """
    config = ClusterConfig.parse(values)
    prompts = PromptSource(
        shape.data,
        load_tokenizer(config.target.model),
        count=256,
        num_tokens=shape.prompt_tokens,
    )
    ours: list[BurstRun] = []
    theirs: list[BurstRun] = []
    with engines(config, values) as (speculating, plain):
        for index in range(shape.runs):
            sides = [(speculating.engine, ours), (plain.engine, theirs)]
            for engine, runs in sides if index % 2 == 0 else reversed(sides):
                runs.append(_run_once(engine, config, prompts, shape))
            note(f"run {index + 1}: {ours[-1]}")
    figures = burst_figures(ours, theirs)
    figures["paced"] = pace_label(config)
    passed = (
        figures["flips"] <= _MAX_FLIPS
        and figures["failed"] == 0
        and figures["went_off"]
        and figures["p95_ratio_high"] <= _TIME_BAR
        and figures["gap_p95_ratio_high"] <= _TIME_BAR
        and figures["recovered_ratio_low"] >= _RECOVERED_BAR
        and figures["back_on_s"] <= _RECOVERY_S
    )
    return Report(suite="burst", figures=figures, passed=passed)


def burst_figures(ours: list[BurstRun], theirs: list[BurstRun]) -> dict[str, Any]:
    """Figures of paired runs, with speculation and without."""
    token = paired_ratio([r.token_p95_s for r in ours], [r.token_p95_s for r in theirs])
    gap = paired_ratio([r.gap_p95_s for r in ours], [r.gap_p95_s for r in theirs])
    recovered = paired_ratio([r.rate_after for r in ours], [r.rate_before for r in ours])
    light = paired_ratio([r.rate_before for r in ours], [r.rate_before for r in theirs])
    return {
        "flips": max(r.flips for r in ours),
        "flips_by_run": [r.flips for r in ours],
        "went_off": all(r.went_off for r in ours),
        "back_on_s": round(max(r.back_on_s for r in ours), 2),
        "p95_ratio": token["ratio"],
        "p95_ratio_high": token["ratio_high"],
        "gap_p95_ratio": gap["ratio"],
        "gap_p95_ratio_high": gap["ratio_high"],
        "recovered_ratio": recovered["ratio"],
        "recovered_ratio_low": recovered["ratio_low"],
        "light_ratio": light["ratio"],
        "failed": sum(r.failed for r in (*ours, *theirs)),
        "refused_by_run": [[a.refused, b.refused] for a, b in zip(ours, theirs, strict=True)],
    }


def _run_once(
    engine: Engine, config: ClusterConfig, prompts: PromptSource, shape: BurstShape
) -> BurstRun:
    load = _OpenLoop(engine, prompts, shape)
    capacity = _requests_per_second(engine, config, shape)
    before = load.run(shape.light * capacity, shape.light_s)
    flips = engine.load().speculation.num_flips
    burst = load.run(shape.burst * capacity, shape.burst_s)
    went_off = load.was_plain
    load.run(shape.light * capacity, until=lambda: engine.load().num_waiting == 0)
    went_off |= load.was_plain
    calm = time.monotonic()
    load.back_on = None if _is_plain(engine) else calm
    load.run(shape.light * capacity, shape.after_s / 2)
    after = load.run(shape.light * capacity, shape.after_s / 2)
    back_on_s = (load.back_on or time.monotonic()) - calm
    num_flips = engine.load().speculation.num_flips - flips
    load.finish()
    gaps = [gap for request in burst for gap in request.gaps_s()]
    return BurstRun(
        token_p95_s=float(np.quantile([r.token_s for r in burst], 0.95)),
        gap_p95_s=float(np.quantile(gaps, 0.95)),
        rate_before=_median_rate(before),
        rate_after=_median_rate(after),
        went_off=went_off,
        back_on_s=round(back_on_s, 2),
        flips=num_flips,
        failed=load.num_failed,
        refused=load.num_refused,
    )


def _is_plain(engine: Engine) -> bool:
    return engine.load().speculation.mode == SpeculationMode.PLAIN


def _median_rate(requests: list[_Served]) -> float:
    if not requests:
        raise DsparkError("no request came under light load: it must last longer")
    return float(np.median([1.0 / request.token_s for request in requests]))


def _requests_per_second(engine: Engine, config: ClusterConfig, shape: BurstShape) -> float:
    """What plain decoding of full batches can serve."""
    batch = config.target.max_num_seqs
    context = batch * (shape.prompt_tokens + shape.max_tokens // 2)
    step_s = float(engine.cost_model.verify_seconds(batch, context))
    return batch / step_s / shape.max_tokens


class _OpenLoop:
    """Requests that are sent when their time has come, whatever has become of those before."""

    def __init__(self, engine: Engine, prompts: PromptSource, shape: BurstShape) -> None:
        self.num_failed = self.num_refused = 0
        self.was_plain = False
        self.back_on: float | None = None
        self._engine = engine
        self._prompts = prompts
        self._shape = shape
        self._active: dict[str, _Served] = {}
        self._num_sent = 0
        self._arrivals = np.random.default_rng(0)  # the same on both sides

    def run(
        self,
        rate: float,
        seconds: float = float("inf"),
        until: Callable[[], bool] = lambda: False,
    ) -> list[_Served]:
        """Sends ``rate`` requests a second; returns those of them that ended well in the end.

        They are complete only behind a later ``run`` or ``finish``.
        """
        sent: list[_Served] = []
        self.was_plain = False
        now = time.monotonic()
        end = now + seconds
        due = now + self._arrivals.exponential(1 / rate)
        while now < end and not until():
            while due <= now:
                self._send(due, sent)
                due += self._arrivals.exponential(1 / rate)
            self._step(min(due, end))
            now = time.monotonic()
        return sent

    def finish(self) -> None:
        """Serves what is left."""
        while self._engine.has_work:
            self._step(0.0)

    def _send(self, due: float, sent: list[_Served]) -> None:
        self._num_sent += 1
        request = Request(
            request_id=f"burst-{id(self)}-{self._num_sent}",
            prompt_token_ids=self._prompts.take(),
            sampling=SamplingParams(
                temperature=0.0, max_tokens=self._shape.max_tokens, ignore_eos=True
            ),
        )
        try:
            self._engine.add_request(request)
        except QueueFullError:
            self.num_refused += 1
            return
        served = _Served(due)
        self._active[request.request_id] = served
        sent.append(served)

    def _step(self, idle_until: float) -> None:
        if not self._engine.has_work:
            time.sleep(max(idle_until - time.monotonic(), 0.0))
            return
        outputs = self._engine.step()
        now = time.monotonic()
        for output in outputs:
            self._take(output, now)
        if _is_plain(self._engine):
            self.was_plain = True
        elif self.back_on is None:
            self.back_on = now

    def _take(self, output: RequestOutput, now: float) -> None:
        served = self._active[output.request_id]
        if output.token_ids:
            served.chunks.append((now, len(output.token_ids)))
        if output.is_last:
            self.num_failed += output.error is not None
            del self._active[output.request_id]
