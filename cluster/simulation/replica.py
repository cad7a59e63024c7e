"""A simulated target replica: the engine's loop without an engine, around the same policies."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cluster.simulation.acceptance import AcceptanceModel
from cluster.simulation.draft_links import DraftLinks, SimulatedRound
from cluster.simulation.events import Events
from cluster.simulation.fleet import TargetFleet
from cluster.simulation.job import Job
from cluster.simulation.running import Running
from cluster.simulation.statistics import Statistics
from cluster.speculation.budget import BudgetPlanner, SearchBudget, survival_of
from cluster.speculation.cost_model import CostModel
from cluster.speculation.pool_policy import DraftDemand
from cluster.speculation.speculation_plan import PassLoad
from cluster.speculation.speculation_policy import (
    OrderKind,
    PassPromise,
    RoundOrder,
    SpeculationPolicy,
)
from cluster.speculation.survival_profile import SurvivalProfile
from cluster.speculation.switch import SpeculationMode
from cluster.speculation.verify_curve import VerifyCurve

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_MAX_INLINE_FEATURES = 16  # of a round; a sequence that lacks more joins one round later
_PROBED_SEQUENCES = 4
_FIRST_MEAN_OUTPUT_TOKENS = 128.0
_MEAN_OUTPUT_WEIGHT = 0.05
_DEMAND_PERIOD_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """What a replica speculates with.

    Attributes:
        budget: plans each round; keeps ``profile`` current if it is a ``SearchBudget``.
        max_tokens: of a round.
    """

    policy: SpeculationPolicy
    budget: BudgetPlanner
    profile: SurvivalProfile
    links: DraftLinks
    acceptance: AcceptanceModel
    max_tokens: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a replica computes with.

    Attributes:
        curve: true seconds of a pass; the cost model has to find out.
        prefix_hit_rate: share of prompt tokens that need not be computed.
        stretch_s: passes that do not differ are computed together for as long as this; 0: never.
    """

    settings: TargetFleet
    curve: VerifyCurve
    cost_model: CostModel
    prefix_hit_rate: float = 0.0
    stretch_s: float = 0.0


@dataclass(eq=False)
class _Pass:
    """A pass under way, or several that do not differ.

    Attributes:
        rows: decoding sequences in it, by their place.
        tokens: ``[rounds, rows]`` that each gains.
        prompts: other sequences and how many of their tokens are computed.
        first_end_s: of the first pass; each further one ends ``cycle_s`` later.
        num_verified, num_accepted: guesses in each round.
        promise: of one round; unset without a speculator.
    """

    group: int
    rows: Integers
    tokens: Integers
    prompts: list[tuple[int, int]]
    first_end_s: float
    cycle_s: float
    started_s: float
    num_tokens: int
    num_context_tokens: int
    num_verified: Integers
    num_accepted: Integers
    promise: PassPromise | None
    is_cut: bool = False

    @property
    def end_s(self) -> float:
        """When the last round ends."""
        return self.first_end_s + (len(self.tokens) - 1) * self.cycle_s


class SimulatedReplica:
    """One target replica.

    Args:
        device: its target.
        drafting: unset: it decodes plainly.
        events: simulated time.
        rng: of acceptance.
        statistics: of the fleet.
        ended: called with each request that has its last token.
        reported: called behind each pass.
    """

    def __init__(
        self,
        device: Device,
        drafting: Drafting | None,
        *,
        events: Events,
        rng: np.random.Generator,
        statistics: Statistics,
        ended: Callable[[Job], None],
        reported: Callable[[], None],
    ) -> None:
        self._device = device
        self._drafting = drafting
        self._events = events
        self._rng = rng
        self._statistics = statistics
        self._ended = ended
        self._reported = reported
        self.waiting: deque[Job] = deque()
        self.running = Running(device.settings.max_num_seqs)
        self.num_taken_in = 0
        self.mean_output_tokens = _FIRST_MEAN_OUTPUT_TOKENS
        self._num_groups, self._next_group = 1, 0
        self._rounds: dict[int, SimulatedRound] = {}
        self._pass: _Pass | None = None
        self._is_finishing = False
        self._last_finish = 0.0
        self._demand_since = (0.0, 0.0)
        self._demand = 0.0

    @property
    def policy(self) -> SpeculationPolicy | None:
        """What decides here."""
        return None if self._drafting is None else self._drafting.policy

    @property
    def links(self) -> DraftLinks | None:
        """Its drafters."""
        return None if self._drafting is None else self._drafting.links

    @property
    def num_free_tokens(self) -> float:
        """That fit into its cache."""
        return self._free()

    @property
    def num_queued_tokens(self) -> float:
        """As ``Scheduler.num_queued_tokens``."""
        mean, run = self.mean_output_tokens, self.running
        queued = float((run.missing + np.minimum(run.left, mean)).sum()) if len(run) else 0.0
        return queued + sum(job.num_prompt_tokens + mean for job in self.waiting)

    def submit(self, job: Job) -> bool:
        """Takes a request in now; returns False where too many wait."""
        self.num_taken_in += 1
        if len(self.waiting) >= self._device.settings.max_num_waiting and self._pass is not None:
            return False
        if not len(self.running) and not self.waiting:
            self._last_finish = self._events.now
        self.waiting.append(job)
        if not self._is_finishing:
            self._cut()
            self._advance()
        return True

    def connect(self, moved: list[int]) -> None:
        """The drafters are others now; ``moved`` is as ``DraftLinks.connect`` returns it."""
        run = self.running
        if not len(run):
            return
        place = np.asarray([*moved, -1], dtype=np.int64)
        run.link[:] = place[run.link]
        lost = run.link < 0
        run.fed[lost] = run.asked[lost] = 0
        self._rounds.clear()  # what is under way is late
        run.asked[:] = 0
        self._assign(np.flatnonzero(lost))
        self._advance()

    def demand(self) -> DraftDemand:
        """As the replica reports it to the pool's policy."""
        drafting, now = self._drafting, self._events.now
        if drafting is None:
            return DraftDemand(num_requests=len(self.running))
        since, compute_s = self._demand_since
        if now - since >= _DEMAND_PERIOD_S:
            self._demand = (drafting.links.compute_s - compute_s) / (now - since)
            self._demand_since = now, drafting.links.compute_s
        policy = drafting.policy
        return DraftDemand(
            num_requests=len(self.running),
            is_off=policy.mode is SpeculationMode.PLAIN,
            draft_seconds_per_second=self._demand,
            draft_queue_seconds=drafting.links.queue_s(),
            goodput=policy.goodput,
            goodput_plain=policy.goodput_plain,
            goodput_added=policy.goodput_added,
            goodput_removed=policy.goodput_removed,
        )

    def _advance(self) -> None:
        """Begins the next pass, if there is one and nothing has to be waited for."""
        if self._pass is not None or self._is_finishing or not self._regroup():
            return
        for offset in range(self._num_groups):
            group = (self._next_group + offset) % self._num_groups
            if self._waits(group):
                return
            if self._begin(group):
                self._next_group = (group + 1) % self._num_groups
                return

    def _waits(self, group: int) -> bool:
        """Whether the group's round is still to be waited for."""
        round = self._rounds.get(group)
        if round is None or round.is_over(self._events.now):
            return False
        self._events.at(round.deadline_s, self._advance)
        return True

    def _regroup(self) -> bool:
        """Goes over to as many groups as should take turns. Returns False while it cannot."""
        wanted = 1 if self._drafting is None else self._drafting.policy.num_groups
        if wanted == self._num_groups:
            return True
        if any(self._waits(group) for group in range(self._num_groups)):
            return False
        run = self.running
        for group, round in self._rounds.items():
            members = np.flatnonzero(run.group == group)
            run.asked[members] *= round.is_answered[run.link[members]]
        # What was drafted stays with its sequence, whichever group that is in now.
        answered = SimulatedRound(np.ones(len(self._links()), dtype=np.bool_), 0, 0.0)
        self._rounds = dict.fromkeys(range(wanted), answered) if self._rounds else {}
        run.group[:] = np.arange(len(run)) % wanted
        self._num_groups, self._next_group = wanted, 0
        return True

    def _links(self) -> list[object]:
        return [] if self._drafting is None else list(self._drafting.links.links)

    def _begin(self, group: int) -> bool:
        """Starts the group's next pass; returns whether there is anything in it."""
        settings, run, now = self._device.settings, self.running, self._events.now
        round = self._rounds.pop(group, None)
        self._make_room()
        member = run.group == group
        is_decoding = run.missing == 1
        rows = np.flatnonzero(member & is_decoding)
        older = np.flatnonzero(member & ~is_decoding).tolist()
        widths = np.zeros(len(rows), dtype=np.int64)
        start = now
        if round is not None:
            widths = run.asked[rows] * round.is_answered[run.link[rows]]
            run.asked[rows] = 0
            start = now if round.ready_s == math.inf else min(round.ready_s, round.deadline_s)
        if self._drafting is not None:
            if round is None:
                self._drafting.policy.drop_round(group)
            else:
                self._drafting.policy.waited(max(start - self._last_finish, 0.0))
        room = settings.max_num_batched_tokens - len(rows)
        chunks = self._chunks(older, room)
        base_tokens = len(rows) + sum(count for _, count in chunks)
        num_sampling = len(rows) + sum(run.missing[i] == count for i, count in chunks)
        context = int(run.context[rows].sum()) + sum(int(run.context[i]) for i in older)
        num_rounds = self._num_rounds(rows, older, widths)
        tokens, admitted, expected = self._verify(
            group, rows, widths, num_sampling, base_tokens, context, num_rounds
        )
        num_verified = int(admitted[0].sum()) if len(admitted) else 0
        chunks = self._chunks(older, room - num_verified)
        chunks += self._admit(group, room - num_verified - sum(count for _, count in chunks))
        if not len(rows) and not chunks:
            return False
        num_tokens = len(rows) + num_verified + sum(count for _, count in chunks)
        context = int(run.context[rows].sum()) + sum(int(run.context[i]) for i, _ in chunks)
        promise = None
        if self._drafting is not None:
            promise = self._drafting.policy.promise(
                group,
                num_requests=len(rows) + sum(run.missing[i] == count for i, count in chunks),
                num_tokens=num_tokens,
                num_context_tokens=context,
                expected_accepted=expected,
            )
        mean_context = context + tokens.sum() / 2 if len(tokens) > 1 else context
        seconds = float(self._device.curve.seconds(num_tokens, mean_context))
        seconds += settings.host_step_ms / 1e3
        seconds += settings.host_sequence_ms / 1e3 * (len(rows) + len(chunks))
        seconds += settings.host_round_ms / 1e3 if round is not None else 0.0
        cycle_s = seconds + (0.0 if round is None else start - now)
        self._pass = _Pass(
            group=group,
            rows=rows,
            tokens=tokens,
            prompts=chunks,
            first_end_s=start + seconds,
            cycle_s=cycle_s,
            started_s=start,
            num_tokens=num_tokens,
            num_context_tokens=context,
            num_verified=admitted.sum(axis=1),
            num_accepted=tokens.sum(axis=1) - len(rows),
            promise=promise,
        )
        if len(tokens) > 1 and round is not None and self._drafting is not None:
            links = self._drafting.links
            sessions = np.bincount(run.link[rows], minlength=len(links.links))
            links.repeat(sessions, int(widths.max(initial=1)), len(tokens) - 1)
        self._end_at(self._pass)
        return True

    def _end_at(self, current: _Pass) -> None:
        def end() -> None:
            if self._pass is current:
                self._finish()

        self._events.at(current.end_s, end)

    def _chunks(self, rows: list[int], room: int) -> list[tuple[int, int]]:
        """How many prompt tokens of which sequences fit."""
        chunks = []
        for row in rows:
            if room <= 0:
                break
            count = min(int(self.running.missing[row]), room)
            chunks.append((row, count))
            room -= count
        return chunks

    def _admit(self, group: int, room: int) -> list[tuple[int, int]]:
        """Starts waiting requests that fit; returns their places and tokens."""
        settings, run = self._device.settings, self.running
        chunks = []
        while self.waiting and room > 0 and len(run) < settings.max_num_seqs:
            sizes = np.bincount(run.group, minlength=self._num_groups)
            if int(sizes.argmin()) != group:
                break
            job = self.waiting[0]
            num_tokens = job.num_prompt_tokens + job.num_made
            if len(run) and self._free() < num_tokens + 1 + len(run):
                break
            self.waiting.popleft()
            cached = min(int(num_tokens * self._device.prefix_hit_rate), num_tokens - 1)
            if math.isnan(job.started_s):
                job.started_s = self._events.now
            luck = 0.0
            if self._drafting is not None:
                luck = float(self._drafting.acceptance.requests(self._rng, 1)[0])
            index = run.add(
                job,
                missing=num_tokens - cached,
                context=cached,
                left=job.num_output_tokens - job.num_made,
                group=group,
                luck=luck,
                last_s=self._events.now,
            )
            self._assign(np.asarray([index]))
            count = min(num_tokens - cached, room)
            chunks.append((index, count))
            room -= count
        return chunks

    def _free(self) -> float:
        capacity = self._device.settings.kv_cache_tokens
        return math.inf if capacity is None else capacity - int(self.running.context.sum())

    def _make_room(self) -> None:
        """Preempts the latest sequences while the next pass would not fit in the cache."""
        run = self.running
        while len(run) > 1 and self._free() < len(run):
            latest = max(range(len(run)), key=lambda i: run.jobs[i].number)
            self.waiting.appendleft(run.jobs[latest])
            run.keep(np.arange(len(run)) != latest)
            self._statistics.num_preemptions += 1

    def _num_rounds(self, rows: Integers, prompts: list[int], widths: Integers) -> int:
        """How many rounds can be computed together."""
        limit_s, run = self._device.stretch_s, self.running
        if limit_s <= 0 or not len(rows) or prompts or self._num_groups > 1:
            return 1
        if self.waiting and len(run) < self._device.settings.max_num_seqs:
            return 1
        drafting = self._drafting
        if drafting is not None:
            if 0 < np.count_nonzero(widths) < len(rows):
                return 1
            is_off = drafting.policy.mode is SpeculationMode.PLAIN
            if is_off == bool(widths.any()):  # a probe, or waiting to join
                return 1
        step_s = float(self._device.curve.seconds(len(rows), float(run.context.sum())))
        return int(max(min(limit_s / step_s, int(run.left[rows].min())), 1))

    def _verify(
        self,
        group: int,
        rows: Integers,
        widths: Integers,
        num_sampling: int,
        base_tokens: int,
        context: int,
        num_rounds: int,
    ) -> tuple[Integers, Integers, float]:
        """Output tokens ``[rounds, rows]``, guesses verified ``[rounds, rows]``, and how many of
        the latter should be accepted in a round. Ends with the first round that ends a sequence."""
        run, settings = self.running, self._device.settings
        left = run.left[rows]
        drafted = np.flatnonzero(widths)
        if not len(drafted) or self._drafting is None:
            ones = np.ones((num_rounds, len(rows)), dtype=np.int64)
            return ones, np.zeros_like(ones), 0.0
        drafting = self._drafting
        share = (settings.max_num_batched_tokens - len(rows)) // len(drafted)
        limits = np.minimum(widths[drafted], share)
        width = int(limits.max())
        admitted = np.zeros((num_rounds, len(rows)), dtype=np.int64)
        if width == 0:
            return np.ones_like(admitted), admitted, 0.0
        luck = run.luck[rows[drafted]]
        confidences = drafting.acceptance.confidences(self._rng, luck, num_rounds, width)
        confidences *= np.arange(width) < limits[:, None]
        drafting.policy.prepare(group)
        first = drafting.budget.plan(
            confidences[0],
            limits,
            cost_model=self._device.cost_model,
            num_requests=num_sampling,
            num_base_tokens=base_tokens,
            num_context_tokens=context,
        )
        survival = survival_of(confidences[0], limits)
        if not isinstance(drafting.budget, SearchBudget):
            drafting.profile.observe(survival, limits)
        expected = float(survival[np.arange(width) < first[:, None]].sum())
        admitted[0, drafted] = first
        if num_rounds > 1:
            admitted[1:, drafted] = _admit_best(confidences[1:], int(first.sum()))
        is_accepted = self._rng.random(confidences.shape) < confidences
        is_accepted &= np.arange(width) < admitted[:, drafted][:, :, None]
        tokens = np.ones_like(admitted)
        tokens[:, drafted] += np.cumprod(is_accepted, axis=2, dtype=np.int64).sum(axis=2)
        total = tokens.cumsum(axis=0)
        ends = np.flatnonzero((total >= left).any(axis=1))
        if len(ends):
            last = int(ends[0]) + 1
            tokens, admitted, total = tokens[:last], admitted[:last], total[:last]
            tokens[-1] -= np.maximum(total[-1] - left, 0)
        return tokens, admitted, expected

    def _cut(self) -> None:
        """Ends passes that were computed together with the one that is under way now."""
        current = self._pass
        if current is None or len(current.tokens) == 1 or current.is_cut:
            return
        passed_s = max(self._events.now - current.first_end_s, 0.0)
        count = min(math.ceil(passed_s / current.cycle_s) + 1, len(current.tokens))
        if count < len(current.tokens):
            cut = replace(
                current,
                tokens=current.tokens[:count],
                num_verified=current.num_verified[:count],
                num_accepted=current.num_accepted[:count],
                is_cut=True,
            )
            self._pass = cut
            self._end_at(cut)

    def _finish(self) -> None:
        """Hands out a pass's tokens, ends what is done, and decides how to go on."""
        done = self._pass
        if done is None:
            return
        self._pass, self._is_finishing = None, True
        run, now, statistics = self.running, self._events.now, self._statistics
        num_rounds = len(done.tokens)
        gained = done.tokens.sum(axis=0)
        run.context[done.rows] += gained
        run.left[done.rows] -= gained
        num_tokens = int(gained.sum())
        is_counted = now >= statistics.since_s
        if is_counted and len(done.rows):
            statistics.add_gaps(done.first_end_s - run.last_s[done.rows])
            if num_rounds > 1:
                statistics.add_gaps(np.asarray([done.cycle_s]), len(done.rows) * (num_rounds - 1))
            statistics.num_steps += num_rounds
            statistics.num_rounds += num_rounds * len(done.rows)
            statistics.num_verified += int(done.num_verified.sum())
            statistics.num_accepted += int(done.num_accepted.sum())
            verified = float(done.num_verified.sum())
            statistics.add_budget(len(done.rows), verified, num_rounds)
        run.last_s[done.rows] = now
        for row, gain in zip(done.rows.tolist(), gained.tolist(), strict=True):
            job = run.jobs[row]
            job.num_made += gain
            # A prompt of which one token is left is computed as decoding sequences are.
            if math.isnan(job.first_token_s):
                job.first_token_s = now
        for row, count in done.prompts:
            num_tokens += self._finish_prompt(row, count)
        if is_counted:
            statistics.num_output_tokens += num_tokens
        self._observe(done, num_tokens, num_rounds)
        self._last_finish = now
        ended = self._remove_ended()
        if self._drafting is not None:
            self._announce(done.group, self._drafting)
        self._reported()
        for job in ended:
            self._ended(job)
        self._is_finishing = False
        self._advance()

    def _finish_prompt(self, row: int, count: int) -> int:
        """Counts computed tokens of a prompt in; returns the output tokens that came of it."""
        run, now = self.running, self._events.now
        run.context[row] += count
        run.missing[row] -= count
        if run.missing[row] > 0:
            return 0
        run.missing[row] = 1
        run.left[row] -= 1
        job = run.jobs[row]
        job.num_made += 1
        if math.isnan(job.first_token_s):
            job.first_token_s = now
        run.last_s[row] = now
        return 1

    def _observe(self, done: _Pass, num_tokens: int, num_rounds: int) -> None:
        """What the engine learns of a pass."""
        promise, now = done.promise, self._events.now
        if num_rounds == 1 and (promise is None or promise.mode is not SpeculationMode.GROUPED):
            self._device.cost_model.observe_verify(
                done.num_tokens,
                done.first_end_s - done.started_s,
                num_context_tokens=done.num_context_tokens,
            )
        if promise is None or self._drafting is None:
            return
        if num_rounds > 1:
            promise = replace(
                promise, tokens=promise.tokens * num_rounds, seconds=promise.seconds * num_rounds
            )
        self._drafting.policy.delivered(promise, num_tokens, now - self._last_finish, now)

    def _remove_ended(self) -> list[Job]:
        run = self.running
        is_over = run.left <= 0
        if not is_over.any():
            return []
        ended = [run.jobs[i] for i in np.flatnonzero(is_over).tolist()]
        run.keep(~is_over)
        for job in ended:
            change = job.num_output_tokens - self.mean_output_tokens
            self.mean_output_tokens += change * _MEAN_OUTPUT_WEIGHT
        return ended

    def _load(self) -> PassLoad:
        """What passes have to do, all groups together."""
        run, settings = self.running, self._device.settings
        num_decoding = int((run.missing == 1).sum())
        room = settings.max_num_batched_tokens * self._num_groups - num_decoding
        chunks = self._chunks(np.flatnonzero(run.missing > 1).tolist(), room)
        return PassLoad(
            num_requests=num_decoding + sum(run.missing[i] == count for i, count in chunks),
            num_drafting=num_decoding,
            num_base_tokens=num_decoding + sum(count for _, count in chunks),
            num_context_tokens=int(run.context.sum()),
        )

    def _announce(self, group: int, drafting: Drafting) -> None:
        """Decides how to go on, and starts the group's next round where that is by drafting."""
        run = self.running
        order = drafting.policy.announce(
            self._load(),
            self._events.now,
            is_ready=bool(drafting.links.links),
            max_draft_tokens=drafting.max_tokens,
        )
        member = run.group == group
        if order.kind is OrderKind.PROBE:
            if not run.probed.any():
                able = np.flatnonzero(member & (run.missing == 1) & (run.left > 1))
                run.probed[
                    able[np.argsort(run.context[able], kind="stable")[:_PROBED_SEQUENCES]]
                ] = 1
            member &= run.probed == 1
        elif run.probed.any():
            if drafting.policy.mode is SpeculationMode.PLAIN:
                run.fed[run.probed == 1] = 0  # their sessions are closed
            run.probed[:] = 0
        if order.kind is not OrderKind.NOTHING and drafting.links.links:
            self._start_round(group, member, order, drafting)

    def _start_round(
        self, group: int, member: npt.NDArray[np.bool_], order: RoundOrder, drafting: Drafting
    ) -> None:
        run, now = self.running, self._events.now
        block = drafting.max_tokens
        max_inline = max(_MAX_INLINE_FEATURES, block + 1)
        lacking = run.context - run.fed
        in_bulk = (run.fed == 0) | (lacking > max_inline) | (run.missing > 1)
        in_bulk &= member & (lacking > 0)
        widths = np.minimum(block if order.max_tokens is None else order.max_tokens, run.left - 1)
        is_there = now - run.fed_s >= drafting.links.network_s
        joins = member & ~in_bulk & (lacking > 0) & is_there & (widths > 0)
        run.fed[in_bulk] = run.context[in_bulk]
        run.fed_s[in_bulk] = now
        run.fed[joins] = run.context[joins]
        rows = np.flatnonzero(joins)
        num_tokens = int(widths[rows].max(initial=0))
        if len(rows):
            run.asked[rows] = widths[rows]
            wait_s = min(order.wait_s, drafting.timeout_s)
            self._rounds[group] = drafting.links.send(
                run.link[rows], widths[rows], wait_s, self._advance
            )
        drafting.policy.sent(group, len(rows), num_tokens)

    def _assign(self, rows: Integers) -> None:
        """Gives sequences a drafter each."""
        if self._drafting is None or not self._drafting.links.links:
            return
        links, run = self._drafting.links, self.running
        for row in rows.tolist():
            others = np.arange(len(run)) != row
            counts = np.bincount(run.link[others & (run.link >= 0)], minlength=len(links.links))
            run.link[row] = links.choose(counts)


def _admit_best(confidences: Floats, total: int) -> Integers:
    """``[rounds, rows]`` how much of each proposal is among the ``total`` of its round that are
    likeliest to survive, as ``budget`` ranks them."""
    num_rounds, num_rows, _width = confidences.shape
    survival = np.cumprod(confidences, axis=2).transpose(0, 2, 1).reshape(num_rounds, -1)
    if total >= survival.shape[1]:
        return (confidences > 0).sum(axis=2)
    best = np.argsort(-survival, axis=1, kind="stable")[:, :total] % num_rows
    offsets = num_rows * np.arange(num_rounds)[:, None]
    counts = np.bincount((best + offsets).ravel(), minlength=num_rounds * num_rows)
    return counts.reshape(num_rounds, num_rows)
