"""Suite ``pool``: drafters that come and go with the load, on a paced cluster.

One run of a cluster whose pool starts with one drafter: load, twice the load until a drafter more
is in service, the same with requests that want no speculation until the pool is at zero, and with
speculation again until a drafter is back. Every request is seeded, and every answer is judged
against plain transformers. Then a cluster with a fixed pool: as many drafters as were needed and
one more, in turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.actors.swap import RunningApplication
from cluster.bench.judge import judge_answers
from cluster.bench.load_prompts import take_prompts
from cluster.bench.own_serving import OwnCluster, OwnSettings
from cluster.bench.paired import paired_ratio
from cluster.bench.report import Report
from cluster.bench.steady_load import Answer, SteadyLoad
from cluster.engine.pace import PaceStats
from cluster.errors import DsparkError
from cluster.request import SamplingParams
from cluster.rpc.client import AsyncClient
from cluster.rpc.cluster_status import ClusterStatus

_POLL_S = 0.1
_WAIT_S = 60.0
_MAX_DRAFTERS = 3
_NUM_PROMPTS = 64
_APPLICATION = "dspark"
MAX_SCALE_UP_S = 10.0
MIN_RATIO = 0.98


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """What is run.

    Attributes:
        profile: file of the device profile; ``time_scale``: stretches its times.
        concurrency: requests at once; twice as many come later.
        to_zero_s: configured time after which speculation that is off brings the pool to zero.
        phase_s: time that each load runs at least.
        pairs: measurements with the drafters needed and with one more; 0: none.
        pair_s: time of each.
        prompt_tokens, max_tokens: of each request.
    """

    profile: Path
    time_scale: float
    concurrency: int = 16
    to_zero_s: float = 10.0
    phase_s: float = 15.0
    pairs: int = 10
    pair_s: float = 6.0
    prompt_tokens: int = 64
    max_tokens: int = 96


def run(
    own: OwnSettings, plan: PoolPlan, *, data: str, folder: Path, note: Callable[[str], None]
) -> Report:
    """Runs the suite.

    Args:
        own: of the cluster; float32, so that answers can be judged.
        data: prompts, as ``load_prompt_set``.
        folder: for configurations and logs.
        note: takes one line of progress.

    Raises:
        ConfigError, CheckpointError, DataError: before anything was started.
        DsparkError: a cluster does not start, or does not get there in a minute.
    """
    token_ids = take_prompts(data, own.target, count=_NUM_PROMPTS, num_tokens=plan.prompt_tokens)
    note("a pool that scales itself")
    scaled = _settings(own, plan, {"max_replicas": _MAX_DRAFTERS, "scaling": _scaling(plan)})
    with OwnCluster(scaled, folder) as cluster:
        figures, answers = asyncio.run(_Phases(cluster.address, plan, token_ids, note).run())
    if plan.pairs > 0:
        needed = figures["drafters_needed"]
        note(f"{needed} drafters, and {needed + 1}, in turn")
        fixed = _settings(own, plan, {"num_replicas": needed})
        with OwnCluster(fixed, folder) as cluster:
            ratio, more = _measure_beyond(cluster, plan, token_ids, needed, note)
        figures["beyond_need"] = ratio
        answers += more
    figures["requests"] = len(answers)
    figures["failed"] = sum(answer.error is not None for answer in answers)
    note(f"judging {len(answers)} answers")
    verdict = judge_answers(own.target, answers)
    figures["mismatches"] = verdict.num_mismatches
    figures["within_epsilon"] = verdict.num_within_epsilon
    return Report(suite="pool", figures=figures, passed=_passes(figures))


def _passes(figures: dict[str, Any]) -> bool:
    ratio = figures.get("beyond_need")
    up_s = figures["scale_up_seconds"]
    return (
        up_s is not None
        and up_s <= MAX_SCALE_UP_S
        and figures["scaled_to_zero"]
        and figures["failed"] == 0
        and figures["mismatches"] == 0
        and (ratio is None or MIN_RATIO <= ratio["ratio_low"] <= ratio["ratio_high"] <= 1.02)
    )


def _scaling(plan: PoolPlan) -> dict[str, float]:
    # With so few drafters none is taken away before the others are needed again.
    return {"to_zero_s": plan.to_zero_s, "down_s": 300.0}


def _settings(own: OwnSettings, plan: PoolPlan, drafter: dict[str, Any]) -> OwnSettings:
    pace = {"profile": str(plan.profile.resolve()), "time_scale": plan.time_scale}
    most = 2 * plan.concurrency
    return replace(
        own,
        max_num_seqs=most,
        max_num_batched_tokens=max(512, 8 * most),
        overrides={
            "target": {"pace": pace},
            "drafter": {"pace": pace, "max_sessions": 4 * most, **drafter},
            # A device that is slow on purpose is not late; and without groups that take turns a
            # round is as long as its drafting shows.
            "speculative": {"draft_timeout_ms": 1000.0 * plan.time_scale, "grouping": "off"},
            "router": {"port": 0},
        },
    )


class _Phases:
    """One run of the cluster that scales itself."""

    def __init__(
        self,
        address: str,
        plan: PoolPlan,
        prompts: list[tuple[int, ...]],
        note: Callable[[str], None],
    ) -> None:
        self._address = address
        self._plan = plan
        self._prompts = prompts
        self._note = note
        self._rows: list[dict[str, Any]] = []

    async def run(self) -> tuple[dict[str, Any], list[Answer]]:
        """Figures of all phases, and every answer."""
        plan = self._plan
        async with (
            AsyncClient(self._address) as client,
            SteadyLoad(client, self._prompts, _sampling(plan)) as load,
        ):
            load.run(plan.concurrency)
            await self._measure(client, load, plan.concurrency)
            before = _num_ready(await client.status())
            load.run(2 * plan.concurrency)
            rise = time.monotonic()
            up_s = await _wait(client, (before + 1, _MAX_DRAFTERS), rise)
            self._note(f"a drafter more in service after {up_s:.1f} s")
            await self._measure(client, load, 2 * plan.concurrency)
            status = await client.status()
            needed = _num_ready(status)
            load.run(2 * plan.concurrency, speculates=False)
            off = time.monotonic()
            zero_s = await _wait(client, (0, 0), off, plan.to_zero_s)
            self._note(f"no drafter after {zero_s:.1f} s without speculation")
            await self._measure(client, load, 2 * plan.concurrency)
            load.run(plan.concurrency)
            on = time.monotonic()
            back_s = await _wait(client, (1, _MAX_DRAFTERS), on)
            self._note(f"a drafter again after {back_s:.1f} s")
            await self._measure(client, load, plan.concurrency)
            status = await client.status()
        figures = {
            "scale_up_seconds": _figure(up_s),
            "scaled_to_zero": zero_s < float("inf"),
            "to_zero_seconds": _figure(zero_s),
            "from_zero_seconds": _figure(back_s),
            "drafters_needed": needed,
            "rows": self._rows,
            "paced": _paced(status),
        }
        return figures, load.answers

    async def _measure(self, client: AsyncClient, load: SteadyLoad, concurrency: int) -> None:
        await asyncio.sleep(self._plan.phase_s / 3)
        start = time.monotonic()
        await asyncio.sleep(self._plan.phase_s * 2 / 3)
        status = await client.status()
        row = {
            "concurrency": concurrency,
            "drafters": _num_ready(status),
            "speculation": status.replicas[0].speculation_state,
            "throughput": round(load.throughput(start, time.monotonic()), 1),
        }
        self._rows.append(row)
        self._note(str(row))


def _measure_beyond(
    cluster: OwnCluster,
    plan: PoolPlan,
    prompts: list[tuple[int, ...]],
    needed: int,
    note: Callable[[str], None],
) -> tuple[dict[str, Any], list[Answer]]:
    """Throughput with a drafter more than needed, against that with those needed."""

    async def run(application: RunningApplication) -> tuple[list[list[float]], list[Answer]]:
        sides: list[list[float]] = [[], []]
        async with (
            AsyncClient(cluster.address) as client,
            SteadyLoad(client, prompts, _sampling(plan)) as load,
        ):
            load.run(2 * plan.concurrency)
            for pair in range(plan.pairs):
                for side in (0, 1) if pair % 2 == 0 else (1, 0):
                    count = needed + side
                    await asyncio.to_thread(application.set_num_drafters, count)
                    wait_s = await _wait(client, (count, count), time.monotonic())
                    if wait_s == float("inf"):
                        raise DsparkError(f"{count} drafters are not ready within a minute")
                    await asyncio.sleep(plan.pair_s / 2)  # sessions move
                    start = time.monotonic()
                    await asyncio.sleep(plan.pair_s)
                    sides[side].append(load.throughput(start, time.monotonic()))
                note(f"pair {pair + 1} of {plan.pairs}: {[round(s[-1], 1) for s in sides]}")
        return sides, load.answers

    with RunningApplication(cluster.ray_address, _APPLICATION) as application:
        (enough, more), answers = asyncio.run(run(application))
    return paired_ratio(more, enough), answers


async def _wait(
    client: AsyncClient,
    wanted: tuple[int, int],
    since: float,
    beyond_s: float = 0.0,
) -> float:
    """Seconds since ``since`` until as many drafters are ready as wanted; infinite if never.

    Args:
        wanted: fewest and most.
        since: of ``time.monotonic``.
        beyond_s: what is waited longer than a minute.
    """
    while time.monotonic() - since < beyond_s + _WAIT_S:
        if wanted[0] <= _num_ready(await client.status()) <= wanted[1]:
            return time.monotonic() - since
        await asyncio.sleep(_POLL_S)
    return float("inf")


def _num_ready(status: ClusterStatus) -> int:
    """Drafters that every replica can ask."""
    return min(
        (sum(d.state == "ready" for d in replica.drafters) for replica in status.replicas),
        default=0,
    )


def _sampling(plan: PoolPlan) -> SamplingParams:
    return SamplingParams(temperature=0.8, max_tokens=plan.max_tokens, ignore_eos=True)


def _figure(seconds: float) -> float | None:
    return round(seconds, 2) if seconds < float("inf") else None


def _paced(status: ClusterStatus) -> dict[str, Any]:
    """How well the paced parts kept their time, each by itself."""
    parts: list[PaceStats] = []
    for replica in status.replicas:
        paced = (replica.paced, *(drafter.paced for drafter in replica.drafters))
        parts += [part for part in paced if part is not None]
    return {
        "profile": parts[0].profile if parts else "",
        "time_scale": parts[0].time_scale if parts else 0.0,
        "passes": sum(part.num_passes for part in parts),
        "overruns": sum(part.num_overruns for part in parts),
        "worst_overrun": round(max((part.worst_overrun for part in parts), default=1.0), 2),
    }
