"""Suite ``drafter-loss``: what a paced cluster does without its drafters, and with late ones.

Two hosts of the lab: a target on one, all drafters on the other. In turn: load without speculation,
with it, with every drafter killed at once, and with a second each way between the hosts, so that
every round is answered after 2 s. What counts begins a second behind the fault.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.bench.chaos_faults import PARTS
from cluster.bench.judge import judge_answers
from cluster.bench.lab.lab_cluster import LabCluster, LabHost
from cluster.bench.load_prompts import take_prompts
from cluster.bench.own_serving import OwnSettings
from cluster.bench.paired import paired_ratio
from cluster.bench.report import Report
from cluster.bench.steady_load import Answer, SteadyLoad
from cluster.errors import DsparkError
from cluster.request import SamplingParams
from cluster.rpc.client import AsyncClient
from cluster.rpc.cluster_status import ReplicaStatus

MIN_RATIO = 0.97
LATE_S = 2.0  # behind which a late drafter answers
_GRACE_S = 1.0
_NUM_DRAFTERS = 3
_NUM_PROMPTS = 32
_WAIT_S = 300.0
_POLL_S = 0.2
_TARGETS, _DRAFTERS = "alpha", "bravo"
_HOSTS = (
    LabHost(_TARGETS, {"dspark-router": 1, "dspark-target": 1}),
    # Starting again they must not take the targets' cores, which on another machine they could not.
    LabHost(_DRAFTERS, {"dspark-drafter": _NUM_DRAFTERS}, nice=19),
)


@dataclass(frozen=True, kw_only=True)
class DrafterLossPlan:
    """What is run.

    Attributes:
        profile: file of the device profile; ``time_scale``: stretches its times.
        rounds: how often each fault comes.
        window_s: of each measurement.
        concurrency: requests at once.
        prompt_tokens, max_tokens: of each request.
    """

    profile: Path
    time_scale: float
    rounds: int = 3
    window_s: float = 8.0
    concurrency: int = 8
    prompt_tokens: int = 64
    max_tokens: int = 48


def run(
    own: OwnSettings, plan: DrafterLossPlan, *, data: str, folder: Path, note: Callable[[str], None]
) -> Report:
    """Runs the suite; needs root and Linux.

    Args:
        own: of the cluster; float32, so that answers can be judged.
        data: prompts, as ``load_prompt_set``.
        folder: for configurations and logs.
        note: takes one line of progress.

    Raises:
        ConfigError, CheckpointError, DataError: before anything was started.
        DsparkError: there is no lab on this machine, the cluster does not start, or its drafters
            do not come back.
    """
    prompts = take_prompts(data, own.target, count=_NUM_PROMPTS, num_tokens=plan.prompt_tokens)
    note("starting a cluster on two hosts")
    with LabCluster(_HOSTS, _settings(own, plan).document(), folder) as cluster:
        figures, answers = asyncio.run(_DrafterLoss(cluster, plan, prompts, note).run())
    verdict = judge_answers(own.target, answers)
    figures["requests"] = len(answers)
    figures["failed"] = sum(answer.error is not None for answer in answers)
    figures["mismatches"] = verdict.num_mismatches
    return Report(suite="drafter-loss", figures=figures, passed=passes(figures))


def passes(figures: dict[str, Any]) -> bool:
    """The suite's own bar."""
    return (
        figures["failed"] == 0
        and figures["mismatches"] == 0
        and figures["replica_restarts"] == 0
        and figures["killed"]["ratio"] >= MIN_RATIO
        and figures["late"]["ratio"] >= MIN_RATIO
    )


def _settings(own: OwnSettings, plan: DrafterLossPlan) -> OwnSettings:
    pace = {"profile": str(plan.profile.resolve()), "time_scale": plan.time_scale}
    return replace(
        own,
        max_num_seqs=2 * plan.concurrency,
        max_num_batched_tokens=max(256, 16 * plan.concurrency),
        max_model_len=512,
        kv_cache_memory_mb=32,
        overrides={
            "target": {"resources": {"dspark-target": 1}, "pace": pace},
            "drafter": {
                "num_replicas": _NUM_DRAFTERS,
                "resources": {"dspark-drafter": 1},
                "kv_cache_memory_mb": 32,
                "pace": pace,
            },
            "router": {"resources": {"dspark-router": 1}, "host": "0.0.0.0"},
        },
    )


class _DrafterLoss:
    """One run on a cluster."""

    def __init__(
        self,
        cluster: LabCluster,
        plan: DrafterLossPlan,
        prompts: list[tuple[int, ...]],
        note: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._plan = plan
        self._prompts = prompts
        self._note = note

    async def run(self) -> tuple[dict[str, Any], list[Answer]]:
        """Figures but for those of the answers, and the answers."""
        plan = self._plan
        sampling = SamplingParams(temperature=0.8, max_tokens=plan.max_tokens, ignore_eos=True)
        plain: list[float] = []
        speculative: list[float] = []
        lost: dict[str, list[float]] = {"killed": [], "late": []}
        back_s: dict[str, list[float]] = {"killed": [], "late": []}
        faults = {"killed": self._kill, "late": self._delay}
        async with (
            AsyncClient(self._cluster.address) as client,
            SteadyLoad(client, self._prompts, sampling) as load,
        ):
            replica_id = (await _replica(client)).replica_id
            for number in range(plan.rounds):
                for name, fault in faults.items():
                    load.run(plan.concurrency, speculates=False)
                    await asyncio.sleep(plan.window_s)  # the requests before end
                    plain.append(await self._measure(load))
                    load.run(plan.concurrency)
                    await asyncio.sleep(plan.window_s)
                    speculative.append(await self._measure(load))
                    await fault()
                    await asyncio.sleep(_GRACE_S)
                    lost[name].append(await self._measure(load))
                    self._cluster.network.mend()
                    back_s[name].append(await _wait_drafting(client))
                    self._note(
                        f"round {number + 1}, {name}: plain {plain[-1]:.1f} tokens/s, "
                        f"with drafters {speculative[-1]:.1f}, behind the fault "
                        f"{lost[name][-1]:.1f}; drafting again after {back_s[name][-1]:.1f} s"
                    )
            has_restarted = (await _replica(client)).replica_id != replica_id
        return {
            "killed": paired_ratio(lost["killed"], plain[0::2]),
            "late": paired_ratio(lost["late"], plain[1::2]),
            "speculative": paired_ratio(speculative, plain),
            "back_seconds": {
                name: [round(value, 1) for value in values] for name, values in back_s.items()
            },
            "replica_restarts": int(has_restarted),
        }, load.answers

    async def _measure(self, load: SteadyLoad) -> float:
        start = time.monotonic()
        await asyncio.sleep(self._plan.window_s)
        return load.throughput(start, time.monotonic())

    async def _kill(self) -> None:
        killed = self._cluster.network.hosts[_DRAFTERS].send(signal.SIGKILL, PARTS["drafter"])
        if len(killed) != _NUM_DRAFTERS:
            raise DsparkError(f"{len(killed)} drafters ran, not {_NUM_DRAFTERS}")

    async def _delay(self) -> None:
        self._cluster.network.delay(LATE_S / 2, _DRAFTERS)


async def _wait_drafting(client: AsyncClient) -> float:
    """Seconds until all drafters are ready, and drafts come of them."""
    start = time.monotonic()
    await _until(client, lambda r: [d.state for d in r.drafters] == ["ready"] * _NUM_DRAFTERS)
    num_drafts = (await _replica(client)).speculation.num_drafts
    await _until(client, lambda r: r.speculation.num_drafts > num_drafts)
    return time.monotonic() - start


async def _until(client: AsyncClient, condition: Callable[[ReplicaStatus], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition(await _replica(client)):
        if time.monotonic() > deadline:
            raise DsparkError(f"drafters are not back after {_WAIT_S:.0f} s")
        await asyncio.sleep(_POLL_S)


async def _replica(client: AsyncClient) -> ReplicaStatus:
    status: Awaitable[Any] = client.status()
    (replica,) = (await status).replicas
    return replica
