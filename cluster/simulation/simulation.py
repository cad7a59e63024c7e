"""A whole fleet: replicas, the pool of drafters, the router, and what is asked of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import QueueFullError
from cluster.request import Priority
from cluster.routing.admission import Admission, Admitted
from cluster.routing.replica_loads import ReplicaLoad
from cluster.routing.replica_picker import Prompt, ReplicaPicker
from cluster.simulation.acceptance import AcceptanceModel
from cluster.simulation.budget_memory import BudgetMemory
from cluster.simulation.device import Device
from cluster.simulation.draft_links import DraftLinks
from cluster.simulation.drafters import SimulatedDrafter
from cluster.simulation.drafting import Drafting
from cluster.simulation.events import Events
from cluster.simulation.figures import fleet_figures
from cluster.simulation.fleet import Fleet
from cluster.simulation.job import Job
from cluster.simulation.plan_memory import PlanMemory
from cluster.simulation.pool import DrafterPool
from cluster.simulation.replica import SimulatedReplica
from cluster.simulation.statistics import Statistics
from cluster.simulation.workload import ClosedLoop
from cluster.speculation.budget import make_budget
from cluster.speculation.cost_model import CostModel
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.pool_policy import DraftDemand, PoolPolicy, PoolTiming
from cluster.speculation.speculation_plan import plan_speculation
from cluster.speculation.speculation_policy import SpeculationPolicy
from cluster.speculation.survival_profile import SurvivalProfile
from cluster.speculation.switch import SpeculationMode


@dataclass(frozen=True, kw_only=True)
class Detail:
    """How finely a fleet is simulated.

    Attributes:
        stretch_s: passes of a replica that do not differ are computed together for at most so long;
            0: one by one, with every round an event. Above 0, rounds find an average queue on their
            drafter, replicas share what they have learnt, and nobody takes turns in two groups.
        sample_s: time between two rows of the timeline.
    """

    stretch_s: float = 0.0
    sample_s: float = 1.0


class FleetSimulation:
    """Simulates a fleet once. Deterministic by the fleet's ``seed``.

    Args:
        fleet: what is simulated.
        detail: how finely.
    """

    def __init__(self, fleet: Fleet, detail: Detail | None = None) -> None:
        self._fleet = fleet
        self.config = fleet.config
        self._detail = detail or Detail()
        self.events = Events()
        self.statistics = Statistics()
        self._rng = np.random.default_rng(self.config.seed)
        self._curve = fleet.target.scaled(self.config.time_scale)
        self._draft_curve: DraftCurve | None = None
        self._acceptance: AcceptanceModel | None = None
        acceptance = self.config.acceptance
        if fleet.drafter is not None and acceptance is not None:
            self._draft_curve = fleet.drafter.scaled(self.config.time_scale)
            self._acceptance = AcceptanceModel(
                acceptance.conditional,
                request_spread=acceptance.request_spread,
                round_spread=acceptance.round_spread,
            )
        self._shared = (CostModel(self._curve), SurvivalProfile(), PlanMemory(self.events))
        self._budgets = BudgetMemory(self.events)
        self.pool = self._make_pool()
        self.replicas = [self._make_replica(i) for i in range(self.config.target.num_replicas)]
        self._picker = ReplicaPicker(seed=self.config.seed)
        self._slots = [self._picker.add() for _ in self.replicas]
        self._index_of = {slot: index for index, slot in enumerate(self._slots)}
        for slot in self._slots:
            self._picker.connect(slot, None)
        limit = self.config.router.max_queued_tokens
        self._admission = (
            None
            if limit is None
            else Admission(limit, clock=lambda: self.events.now, seed=self.config.seed)
        )
        self._admitted: dict[int, Admitted] = {}
        self._busy: dict[int, None] = {}
        self._num_open = 0
        self._arrivals: Iterator[Job] = iter(())
        self._has_arrivals = False
        self._closed: ClosedLoop | None = None
        self._num_jobs = 0
        self._sampled = (0.0, 0, 0.0)
        self._connect_drafters()

    def run_closed(self, loop: ClosedLoop) -> dict[str, Any]:
        """Serves a closed loop; returns its figures."""
        self._closed = loop
        self.statistics.since_s = loop.warm_up_s
        for job in loop.first_jobs():
            self.events.at(0.0, functools.partial(self._arrive, job))
        self._num_jobs = loop.concurrency
        end_s = loop.warm_up_s + loop.duration_s
        return self._run(end_s, goes_on=lambda: True)

    def run_open(self, jobs: Iterable[Job]) -> dict[str, Any]:
        """Serves requests that come by themselves, to the last one's end; returns the figures."""
        self._arrivals = iter(jobs)
        self._next_arrival()
        return self._run(np.inf, goes_on=lambda: self._has_arrivals or self._num_open > 0)

    def _run(self, until_s: float, goes_on: Callable[[], bool]) -> dict[str, Any]:
        started = time.process_time()
        self.pool.watch(self._demands, goes_on)
        self._sample_while(goes_on)
        self.events.run(until_s, goes_on)
        seconds = time.process_time() - started
        return fleet_figures(self, seconds)

    def modes(self) -> dict[str, float]:
        """Seconds of all replicas in each mode."""
        total: dict[str, float] = {}
        for replica in self.replicas:
            if replica.policy is not None:
                for mode, s in replica.policy.switch.seconds_in_mode(self.events.now).items():
                    total[str(mode)] = total.get(str(mode), 0.0) + s
        return total

    def num_flips(self) -> int:
        """Times that speculation went off or on, all replicas together."""
        return sum(r.policy.switch.num_flips for r in self.replicas if r.policy is not None)

    def _make_pool(self) -> DrafterPool:
        drafter, curve = self.config.drafter, self._draft_curve
        if drafter is None or curve is None:
            return DrafterPool(
                None, initial=0, start_s=0.0, make=_no_drafter, changed=_nothing, events=self.events
            )
        policy, initial, network_ms = None, drafter.min_replicas, drafter.network_ms
        if drafter.is_colocated:
            initial, network_ms = self.config.target.num_replicas, 0.0
        elif drafter.is_elastic:
            timing = PoolTiming(**self.config.pool.model_dump())
            policy = PoolPolicy(drafter.min_replicas, drafter.max_replicas, timing)
        return DrafterPool(
            policy,
            initial=initial,
            start_s=drafter.start_s,
            make=lambda: SimulatedDrafter(curve, network_ms / 1e3, self.events),
            changed=self._connect_drafters,
            events=self.events,
        )

    def _make_replica(self, index: int) -> SimulatedReplica:
        is_coarse = self._detail.stretch_s > 0
        cost_model, profile, plans = self._shared
        if not is_coarse:
            cost_model, profile = CostModel(self._curve), SurvivalProfile()
        return SimulatedReplica(
            Device(
                settings=self.config.target,
                curve=self._curve,
                cost_model=cost_model,
                prefix_hit_rate=self.config.router.prefix_hit_rate,
                stretch_s=self._detail.stretch_s,
            ),
            self._make_drafting(cost_model, profile, plans if is_coarse else None),
            events=self.events,
            rng=np.random.default_rng([self.config.seed, index]),
            statistics=self.statistics,
            ended=functools.partial(self._end, index),
            reported=functools.partial(self._report, index),
            budgets=self._budgets if is_coarse else None,
        )

    def _make_drafting(
        self, cost_model: CostModel, profile: SurvivalProfile, plans: PlanMemory | None
    ) -> Drafting | None:
        settings, drafter = self.config.speculative, self.config.drafter
        curve, acceptance = self._draft_curve, self._acceptance
        max_tokens = acceptance.block_size if acceptance is not None else 0
        if settings.num_speculative_tokens is not None:
            max_tokens = min(max_tokens, settings.num_speculative_tokens)
        if drafter is None or curve is None or acceptance is None or max_tokens == 0:
            return None
        network_s = 0.0 if drafter.is_colocated else drafter.network_ms / 1e3
        links = DraftLinks(curve, network_s, self.events, is_estimated=plans is not None)
        # A device that does both by itself can hide neither behind the other.
        has_groups = plans is None and not drafter.is_colocated
        policy = SpeculationPolicy(
            cost_model=cost_model,
            profile=profile,
            predict_round=links.predict,
            switching=settings.switching,
            grouping=settings.grouping if has_groups else "off",
            drafts_whole_blocks=settings.scheduler == "full",
            values_drafters=drafter.is_elastic,
            plan=plan_speculation if plans is None else plans,
        )
        return Drafting(
            policy=policy,
            budget=make_budget(settings.scheduler, profile),
            profile=profile,
            is_profile_kept=settings.scheduler == "search",
            links=links,
            acceptance=acceptance,
            max_tokens=max_tokens,
            timeout_s=settings.draft_timeout_ms / 1e3 * self.config.time_scale,
        )

    def _connect_drafters(self) -> None:
        """Gives every replica its share of the drafters that are ready."""
        drafters, config = self.pool.drafters, self.config.drafter
        for index, replica in enumerate(self.replicas):
            if replica.links is None or config is None:
                continue
            count = 1 if config.is_colocated else min(config.per_replica, len(drafters))
            chosen = [drafters[(index * count + k) % len(drafters)] for k in range(count)]
            if [link.drafter for link in replica.links.links] != chosen:
                replica.connect(replica.links.connect(chosen))

    def _next_arrival(self) -> None:
        job = next(self._arrivals, None)
        self._has_arrivals = job is not None
        if job is not None:
            self.events.at(job.arrival_s, functools.partial(self._arrive_and_go_on, job))

    def _arrive_and_go_on(self, job: Job) -> None:
        self._next_arrival()
        self._arrive(job)

    def _arrive(self, job: Job) -> None:
        """Admits a request, picks its replica, and hands it over."""
        job.arrival_s = self.events.now
        if self._admission is not None:
            try:
                admitted = self._admission.admit(
                    prompt_tokens=job.num_prompt_tokens,
                    output_tokens=job.num_output_tokens,
                    num_choices=1,
                    priority=Priority.DEFAULT,
                )
            except QueueFullError:
                self.statistics.num_refused += 1
                return
            self._admitted[job.number] = admitted
        index = 0
        if len(self.replicas) > 1:
            prompt = Prompt(range(job.num_prompt_tokens), job.num_output_tokens)
            slot = self._picker.pick(prompt)
            index = self._index_of[slot] if slot is not None else 0
            self._picker.sent(self._slots[index], str(job.number), prompt)
        job.slot = index
        self._num_open += 1
        self._busy[index] = None
        if not self.replicas[index].submit(job):
            self.statistics.num_refused += 1
            self._close(index, job)

    def _end(self, index: int, job: Job) -> None:
        job.ended_s = self.events.now
        self.statistics.add_job(job)
        self._close(index, job)
        if self._closed is not None:
            following = self._closed.job(self._num_jobs, job.user)
            self._num_jobs += 1
            self._arrive(following)

    def _close(self, index: int, job: Job) -> None:
        self._num_open -= 1
        if len(self.replicas) > 1:
            self._picker.ended(self._slots[index], str(job.number))
        admitted = self._admitted.pop(job.number, None)
        if admitted is not None:
            admitted.advance(0, job.num_output_tokens)

    def _report(self, index: int) -> None:
        """A replica's step is over, and its report with it."""
        replica = self.replicas[index]
        if not replica.running and not replica.waiting:
            self._busy.pop(index, None)
        if len(self.replicas) == 1:
            return
        load = ReplicaLoad(
            num_queued_tokens=replica.queue.num_queued_tokens,
            num_free_tokens=replica.queue.num_free_tokens,
            mean_output_tokens=replica.queue.mean_output_tokens,
        )
        self._picker.report(self._slots[index], load, num_counted=replica.num_taken_in)

    def _demands(self) -> list[DraftDemand]:
        demands = [self.replicas[index].demand() for index in self._busy]
        if len(self._busy) < len(self.replicas):
            # Of those without requests it counts only whether one had stopped speculating.
            is_off = any(
                r.policy is not None and r.policy.mode is SpeculationMode.PLAIN
                for i, r in enumerate(self.replicas)
                if i not in self._busy
            )
            demands.append(DraftDemand(num_requests=0, is_off=is_off))
        return demands

    def _sample_while(self, goes_on: Callable[[], bool]) -> None:
        def sample() -> None:
            self._sample()
            if goes_on():
                self.events.at(self.events.now + self._detail.sample_s, sample)

        self.events.at(self._detail.sample_s, sample)

    def _sample(self) -> None:
        since, num_tokens, busy_s = self._sampled
        now, statistics = self.events.now, self.statistics
        self._sampled = now, statistics.num_output_tokens, self.pool.busy_s
        span_s = max(now - since, 1e-9)
        busy = [self.replicas[index] for index in self._busy]
        policies = [r.policy for r in busy if r.policy is not None]
        modes = {str(m): sum(p.mode is m for p in policies) for m in SpeculationMode}
        ready = len(self.pool.drafters)
        statistics.timeline.append(
            {
                "time_s": round(now, 3),
                "throughput": round((statistics.num_output_tokens - num_tokens) / span_s, 1),
                "running": sum(len(r.running) for r in busy),
                "waiting": sum(len(r.waiting) for r in busy),
                "modes": modes,
                "drafters": ready,
                "drafters_wanted": self.pool.wanted,
                "drafter_utilisation": round(
                    (self.pool.busy_s - busy_s) / span_s / max(ready, 1), 3
                ),
            }
        )


def _no_drafter() -> SimulatedDrafter:
    raise RuntimeError("this fleet has no drafters")


def _nothing() -> None:
    pass
