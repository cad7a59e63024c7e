"""Suite ``chaos``: a paced cluster on four hosts, broken again and again under load.

Each request is seeded and has a deadline; clients go on with what they have on any router. At the
end every answer is judged against plain transformers, and the cluster, at rest again, is counted
against what it was before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.bench.chaos_census import Census, take_census
from cluster.bench.chaos_faults import Faults
from cluster.bench.chaos_load import ChaosAnswer, ChaosLoad, Outcome, Routers
from cluster.bench.judge import judge_answers
from cluster.bench.lab.lab_cluster import LabCluster, LabHost
from cluster.bench.load_prompts import take_prompts
from cluster.bench.own_serving import OwnSettings
from cluster.bench.report import Report
from cluster.errors import DsparkError
from cluster.request import SamplingParams

NUM_REPLICAS = 2
NUM_DRAFTERS = 3
NUM_ROUTERS = 2
_ROUTER_PORT = 50051
_NUM_PROMPTS = 64
_WARM_REQUESTS = 8
_RECOVERY_S = 600.0
_REST_S = 60.0
_POLL_S = 0.5
_FINISHED_BAR = 0.5

# Replicas and drafters have a host to spare each; a replica's shards are on one of them.
_HOSTS = (
    LabHost("alpha", {"dspark-router": 1, "dspark-drafter": 1}),
    LabHost("bravo", {"dspark-target": 2, "dspark-drafter": 1, "dspark-router": 1}),
    LabHost("charlie", {"dspark-target": 2, "dspark-drafter": 1}),
    LabHost("delta", {"dspark-target": 2, "dspark-drafter": 1, "dspark-router": 1}),
)


@dataclass(frozen=True, kw_only=True)
class ChaosPlan:
    """What is run.

    Attributes:
        profile: file of the device profile; ``time_scale``: stretches its times.
        seconds: how long the cluster is broken.
        period_s: between two parts that are killed or stopped; halfway between, links are cut or
            slow for a third of it.
        concurrency: requests at once.
        deadline_s: of each request.
        prompt_tokens, max_tokens: of each request.
        seed: of what is broken, and of the choice of routers.
    """

    profile: Path
    time_scale: float
    seconds: float = 1800.0
    period_s: float = 20.0
    concurrency: int = 8
    deadline_s: float = 90.0
    prompt_tokens: int = 64
    max_tokens: int = 96
    seed: int = 1


def run(
    own: OwnSettings, plan: ChaosPlan, *, data: str, folder: Path, note: Callable[[str], None]
) -> Report:
    """Runs the suite; needs root and Linux.

    Args:
        own: of the cluster; float32, so that answers can be judged.
        data: prompts, as ``load_prompt_set``.
        folder: for configurations and logs.
        note: takes one line of progress.

    Raises:
        ConfigError, CheckpointError, DataError: before anything was started.
        DsparkError: there is no lab on this machine, or the cluster does not start.
    """
    prompts = take_prompts(data, own.target, count=_NUM_PROMPTS, num_tokens=plan.prompt_tokens)
    note("starting a cluster on four hosts")
    with LabCluster(_HOSTS, chaos_settings(own, plan).document(), folder) as cluster:
        figures, answers = asyncio.run(_Chaos(cluster, plan, prompts, note).run())
    note(f"judging {len(answers)} answers")
    verdict = judge_answers(own.target, answers)
    figures["mismatches"] = verdict.num_mismatches
    figures["within_epsilon"] = verdict.num_within_epsilon
    figures["positions"] = verdict.num_positions
    return Report(suite="chaos", figures=figures, passed=passes(figures))


def passes(figures: dict[str, Any]) -> bool:
    """The suite's own bar. A cluster that is mostly away ends requests at their deadlines, in good
    order and of no use, so many of them must finish."""
    return (
        figures["requests"] > 0
        and figures["killed"] > 0
        and figures["lost"] == 0
        and figures["mismatches"] == 0
        and figures["leaks"] == 0
        and figures["finished"] >= _FINISHED_BAR * figures["requests"]
    )


def chaos_settings(own: OwnSettings, plan: ChaosPlan) -> OwnSettings:
    """Two replicas of two shards, three drafters and two routers, paced."""
    pace = {"profile": str(plan.profile.resolve()), "time_scale": plan.time_scale}
    return replace(
        own,
        num_replicas=NUM_REPLICAS,
        max_num_seqs=2 * plan.concurrency,
        max_num_batched_tokens=max(256, 16 * plan.concurrency),
        max_model_len=512,
        kv_cache_memory_mb=32,
        overrides={
            "target": {
                "tensor_parallel_size": 2,
                "placement_strategy": "STRICT_PACK",
                "resources": {"dspark-target": 1},
                "pace": pace,
            },
            "drafter": {
                "num_replicas": NUM_DRAFTERS,
                "resources": {"dspark-drafter": 1},
                "kv_cache_memory_mb": 32,
                "session_ttl_s": 20.0,
                "pace": pace,
            },
            "speculative": {"draft_timeout_ms": 500.0},
            "router": {
                "num_replicas": NUM_ROUTERS,
                "resources": {"dspark-router": 1},
                "host": "0.0.0.0",
                "port": _ROUTER_PORT,
            },
        },
    )


class _Chaos:
    """One run on a cluster."""

    def __init__(
        self,
        cluster: LabCluster,
        plan: ChaosPlan,
        prompts: list[tuple[int, ...]],
        note: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._plan = plan
        self._prompts = prompts
        self._note = note
        self._blows: list[str] = []

    async def run(self) -> tuple[dict[str, Any], list[ChaosAnswer]]:
        """Figures, and every answer of the time of chaos."""
        plan = self._plan
        hosts = self._cluster.network.hosts.values()
        async with (
            Routers([f"{host.address}:{_ROUTER_PORT}" for host in hosts]) as routers,
            Faults(self._cluster, seed=plan.seed) as faults,
        ):
            await self._wait_whole(routers, faults)
            warm = self._load(routers)
            while len(warm.answers) < _WARM_REQUESTS:
                await asyncio.sleep(_POLL_S)
            await warm.finish()
            before = await self._census_at_rest(routers, None)
            self._note(f"chaos for {plan.seconds:.0f} s")
            started = time.monotonic()
            load = self._load(routers)
            await self._break(faults, started + plan.seconds)
            lasted = time.monotonic() - started
            await load.finish()
            faults.wake_all()
            recovery_s = await self._wait_whole(routers, faults)
            after = await self._census_at_rest(routers, before)
        leaks = after.leaks(before)
        for leak in leaks:
            self._note(f"left: {leak}")
        counts = load.counts()
        broken = [answer for answer in load.answers if answer.problems]
        lost = [a for a in load.answers if a.outcome in (Outcome.FAILED, Outcome.HUNG)]
        for answer in [*lost, *broken]:
            self._note(f"{answer.request_id}: {answer.outcome} {answer.error} {answer.problems}")
        gaps = [a.longest_gap_s for a in load.answers if a.outcome is Outcome.FINISHED] or [0.0]
        p50, p95, most = np.quantile(gaps, (0.5, 0.95, 1.0))
        refused = counts[Outcome.REFUSED]
        return {
            "requests": len(load.answers) - refused,
            "lost": len({a.request_id for a in [*lost, *broken]}),
            "mismatches": 0,
            "leaks": len(leaks),
            "killed": len(self._blows),
            "finished": counts[Outcome.FINISHED],
            "at_deadline": counts[Outcome.DEADLINE],
            "refused": refused,
            "resumes": sum(answer.num_resumes for answer in load.answers),
            "tokens_per_second": round(load.num_tokens / lasted, 1),
            "longest_gap_seconds": {
                "p50": round(float(p50), 2),
                "p95": round(float(p95), 2),
                "max": round(float(most), 2),
            },
            "recovery_seconds": round(recovery_s, 1),
            "left": leaks,
            "faults": faults.log,
            "files": {"before": before.most_files, "after": after.most_files},
            "threads": {"before": before.most_threads, "after": after.most_threads},
        }, load.answers

    def _load(self, routers: Routers) -> ChaosLoad:
        plan = self._plan
        return ChaosLoad(
            routers,
            self._prompts,
            SamplingParams(temperature=0.8, max_tokens=plan.max_tokens, ignore_eos=True),
            concurrency=plan.concurrency,
            deadline_s=plan.deadline_s,
            seed=plan.seed,
        )

    async def _break(self, faults: Faults, until: float) -> None:
        period_s = self._plan.period_s
        next_at = time.monotonic()
        while time.monotonic() < until:
            blow = await faults.strike()
            self._note(faults.log[-1])
            if blow is not None:
                self._blows.append(f"{blow.how} {blow.part}")
            await asyncio.sleep(period_s / 2)
            if time.monotonic() < until:
                await faults.disturb(period_s / 3)
                self._note(faults.log[-1])
            next_at += period_s
            await asyncio.sleep(max(next_at - time.monotonic(), 0.0))

    async def _wait_whole(self, routers: Routers, faults: Faults) -> float:
        """Seconds until every part serves. Raises: DsparkError: never."""
        started = time.monotonic()
        while time.monotonic() - started < _RECOVERY_S:
            if faults.is_whole and _is_whole(routers):
                return time.monotonic() - started
            await asyncio.sleep(_POLL_S)
        for address, status in routers.latest.items():
            self._note(f"router {address}: {status}")
        raise DsparkError(f"not every part is back after {_RECOVERY_S:.0f} s")

    async def _census_at_rest(self, routers: Routers, before: Census | None) -> Census:
        """A count as soon as nothing is too much, or after a minute."""
        deadline = time.monotonic() + _REST_S
        hosts = list(self._cluster.network.hosts.values())
        while True:
            await asyncio.sleep(_POLL_S)
            census = await take_census(hosts, list(routers.latest.values()))
            if not census.leaks(before or census) or time.monotonic() > deadline:
                return census


def _is_whole(routers: Routers) -> bool:
    """Whether as many routers as there should be see all replicas, and those all drafters."""
    statuses = [routers.latest[address] for address in routers.ready if address in routers.latest]
    return len(statuses) == NUM_ROUTERS and all(
        len(status.replicas) == NUM_REPLICAS
        and all(
            replica.state == "ready"
            and [drafter.state for drafter in replica.drafters] == ["ready"] * NUM_DRAFTERS
            for replica in status.replicas
        )
        for status in statuses
    )
