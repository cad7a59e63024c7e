"""A simulated target replica: the engine's loop without an engine, around the same policies."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cluster.simulation.budget_memory import BudgetMemory, PassBase
from cluster.simulation.demand import DraftDemandMeter
from cluster.simulation.device import Device
from cluster.simulation.draft_links import DraftLinks, SimulatedRound
from cluster.simulation.draft_rounds import DraftRounds
from cluster.simulation.drafting import Drafting
from cluster.simulation.events import Events
from cluster.simulation.guesses import Outcome, verify
from cluster.simulation.job import Job
from cluster.simulation.passes import SimulatedPass
from cluster.simulation.request_queue import Chunks, RequestQueue
from cluster.simulation.running import Running
from cluster.simulation.statistics import Statistics
from cluster.simulation.turns import GroupTurns
from cluster.speculation.pool_policy import DraftDemand
from cluster.speculation.speculation_policy import SpeculationPolicy
from cluster.speculation.switch import SpeculationMode

Integers = npt.NDArray[np.int64]

# Of passes that are computed together with others, every so manieth teaches the shared cost model.
_OBSERVED_EVERY = 16


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
        budgets: shared by replicas of which all is shared that is learnt.
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
        budgets: BudgetMemory | None = None,
    ) -> None:
        self._device = device
        self._drafting = drafting
        self._events = events
        self._rng = rng
        self._statistics = statistics
        self._ended = ended
        self._reported = reported
        self._budgets = budgets
        self._queue = RequestQueue(device)
        self._drafts = (
            None if drafting is None else DraftRounds(drafting, self.running, self._advance)
        )
        self.num_taken_in = 0
        self._num_passes = 0
        self._turns = GroupTurns()
        self._pass: SimulatedPass | None = None
        self._is_finishing = False
        self._last_finish = 0.0
        self._demand = None if drafting is None else DraftDemandMeter(drafting)

    @property
    def policy(self) -> SpeculationPolicy | None:
        """What decides here."""
        return None if self._drafting is None else self._drafting.policy

    @property
    def links(self) -> DraftLinks | None:
        """Its drafters."""
        return None if self._drafting is None else self._drafting.links

    @property
    def running(self) -> Running:
        """Its sequences."""
        return self._queue.running

    @property
    def waiting(self) -> deque[Job]:
        """Requests that have not started, or were preempted."""
        return self._queue.waiting

    @property
    def num_free_tokens(self) -> float:
        """That fit into its cache."""
        return self._queue.num_free_tokens

    @property
    def num_queued_tokens(self) -> float:
        """As ``Scheduler.num_queued_tokens``."""
        return self._queue.num_queued_tokens

    @property
    def mean_output_tokens(self) -> float:
        """How long outputs are here."""
        return self._queue.mean_output_tokens

    @property
    def num_preemptions(self) -> int:
        """So far."""
        return self._queue.num_preemptions

    def submit(self, job: Job) -> bool:
        """Takes a request in now; returns False where too many wait."""
        self.num_taken_in += 1
        if len(self.waiting) >= self._device.settings.max_num_waiting and self._pass is not None:
            return False
        if self._queue.is_empty:
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
        self._turns.rounds.clear()  # what is under way is late
        run.asked[:] = 0
        if self._drafts is not None:
            self._drafts.assign(np.flatnonzero(lost))
        self._advance()

    def demand(self) -> DraftDemand:
        """As the replica reports it to the pool's policy."""
        count = len(self.running)
        if self._demand is None:
            return DraftDemand(num_requests=count)
        return self._demand.report(count, self._events.now)

    def _advance(self) -> None:
        """Begins the next pass, if there is one and nothing has to be waited for."""
        if self._pass is not None or self._is_finishing or self._queue.is_empty:
            return
        if not self._regroup():
            return
        for group in self._turns.order():
            if self._waits(group):
                return
            if self._begin(group):
                self._turns.took(group)
                return

    def _waits(self, group: int) -> bool:
        """Whether the group's round is still to be waited for."""
        until_s = self._turns.wait_until(group, self._events.now)
        if until_s is None:
            return False
        self._events.at(until_s, self._advance)
        return True

    def _regroup(self) -> bool:
        """Goes over to as many groups as should take turns. Returns False while it cannot."""
        wanted = 1 if self._drafting is None else self._drafting.policy.num_groups
        if wanted == self._turns.num_groups:
            return True
        if any(self._waits(group) for group in range(self._turns.num_groups)):
            return False
        num_links = 0 if self._drafting is None else len(self._drafting.links.links)
        self._turns.regroup(wanted, self.running, num_links)
        return True

    def _begin(self, group: int) -> bool:
        """Starts the group's next pass; returns whether there is anything in it."""
        settings, queue, run = self._device.settings, self._queue, self.running
        round = self._turns.rounds.pop(group, None)
        queue.make_room()
        member = run.group == group
        is_decoding = run.missing == 1
        rows = np.flatnonzero(member & is_decoding)
        older = np.flatnonzero(member & ~is_decoding).tolist()
        widths = self._answered(rows, round)
        start = self._start_of(group, round)
        room = settings.max_num_batched_tokens - len(rows)
        chunks = queue.chunks(older, room)
        base = PassBase(
            num_requests=len(rows) + self._queue.num_last(chunks),
            num_base_tokens=len(rows) + sum(count for _, count in chunks),
            num_context_tokens=self._queue.context(rows, older),
        )
        outcome = self._verify(group, rows, older, widths, base)
        num_verified = sum(outcome.admitted[0].tolist()) if len(rows) else 0
        chunks = queue.chunks(older, room - num_verified)
        chunks += self._admit(group, room - num_verified - sum(count for _, count in chunks))
        if not len(rows) and not chunks:
            return False
        done = self._make_pass(group, rows, chunks, outcome, round, start)
        if len(done.tokens) > 1 and round is not None and self._drafting is not None:
            links = self._drafting.links
            sessions = np.bincount(run.link[rows], minlength=len(links.links))
            links.repeat(sessions, max(widths.tolist(), default=1), len(done.tokens) - 1)
        self._pass = done
        self._end_at(done)
        return True

    def _answered(self, rows: Integers, round: SimulatedRound | None) -> Integers:
        """``[rows]`` guesses that have come for each."""
        if round is None:
            return np.zeros(len(rows), dtype=np.int64)
        run = self.running
        widths: Integers = run.asked[rows] * round.is_answered[run.link[rows]]
        run.asked[rows] = 0
        return widths

    def _start_of(self, group: int, round: SimulatedRound | None) -> float:
        """When the group's next pass starts."""
        now = self._events.now
        if round is None:
            start = now
        else:
            start = now if round.ready_s == math.inf else min(round.ready_s, round.deadline_s)
        if self._drafting is not None:
            if round is None:
                self._drafting.policy.drop_round(group)
            else:
                self._drafting.policy.waited(max(start - self._last_finish, 0.0))
        return start

    def _make_pass(
        self,
        group: int,
        rows: Integers,
        chunks: Chunks,
        outcome: Outcome,
        round: SimulatedRound | None,
        start: float,
    ) -> SimulatedPass:
        tokens, num_verified = outcome.tokens, outcome.admitted.sum(axis=1)
        num_tokens = len(rows) + int(num_verified[0]) + sum(count for _, count in chunks)
        context = self._queue.context(rows, [i for i, _ in chunks])
        promise = None
        if self._drafting is not None:
            promise = self._drafting.policy.promise(
                group,
                num_requests=len(rows) + self._queue.num_last(chunks),
                num_tokens=num_tokens,
                num_context_tokens=context,
                expected_accepted=outcome.expected,
            )
        mean_context = context + float(tokens.sum()) / 2 if len(tokens) > 1 else context
        seconds = self._device.pass_seconds(
            num_tokens, mean_context, len(rows) + len(chunks), has_round=round is not None
        )
        return SimulatedPass(
            group=group,
            rows=rows,
            tokens=tokens,
            prompts=chunks,
            first_end_s=start + seconds,
            cycle_s=seconds + (0.0 if round is None else start - self._events.now),
            started_s=start,
            num_tokens=num_tokens,
            num_context_tokens=context,
            num_verified=num_verified,
            num_accepted=tokens.sum(axis=1) - len(rows),
            promise=promise,
        )

    def _end_at(self, current: SimulatedPass) -> None:
        def end() -> None:
            if self._pass is current:
                self._finish()

        self._events.at(current.end_s, end)

    def _admit(self, group: int, room: int) -> Chunks:
        """Starts waiting requests that fit; returns their places and tokens."""
        chunks: Chunks = []
        while room > 0:
            job = self._queue.next_job(group, self._turns.num_groups)
            if job is None:
                break
            luck = 0.0
            if self._drafting is not None:
                luck = float(self._drafting.acceptance.requests(self._rng, 1)[0])
            index, missing = self._queue.start(job, group, luck, self._events.now)
            if self._drafts is not None:
                self._drafts.assign(np.asarray([index]))
            count = min(missing, room)
            chunks.append((index, count))
            room -= count
        return chunks

    def _num_rounds(self, rows: Integers, prompts: list[int], widths: Integers) -> int:
        """How many rounds can be computed together."""
        limit_s, run = self._device.stretch_s, self.running
        if limit_s <= 0 or not len(rows) or prompts or self._turns.num_groups > 1:
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
        step_s = float(self._device.curve.seconds(len(rows), run.num_context_tokens))
        return int(max(min(limit_s / step_s, min(run.left[rows].tolist())), 1))

    def _verify(
        self, group: int, rows: Integers, prompts: list[int], widths: Integers, base: PassBase
    ) -> Outcome:
        """What becomes of the guesses."""
        num_rounds = self._num_rounds(rows, prompts, widths)
        num_drafted = np.count_nonzero(widths)
        if self._drafting is None or not num_drafted:
            return Outcome.plain(num_rounds, len(rows))
        room = self._device.settings.max_num_batched_tokens - len(rows)
        self._drafting.policy.prepare(group)
        return verify(
            self._drafting,
            self._rng,
            luck=self.running.luck[rows],
            limits=np.minimum(widths, room // num_drafted),
            left=self.running.left[rows],
            base=base,
            cost_model=self._device.cost_model,
            num_rounds=num_rounds,
            memory=self._budgets,
        )

    def _cut(self) -> None:
        """Ends passes that were computed together with the one that is under way now."""
        current = self._pass
        if current is None:
            return
        cut = current.cut(self._events.now)
        if cut is not current:
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
        statistics.add_pass(done, run.last_s[done.rows], now)
        run.last_s[done.rows] = now
        for row, gain in zip(done.rows.tolist(), gained.tolist(), strict=True):
            job = run.jobs[row]
            job.num_made += gain
            # A prompt of which one token is left is computed as decoding sequences are.
            if math.isnan(job.first_token_s):
                job.first_token_s = now
        for row, count in done.prompts:
            num_tokens += self._finish_prompt(row, count)
        statistics.add_tokens(num_tokens, now)
        self._observe(done, num_tokens, num_rounds)
        self._last_finish = now
        ended = self._queue.remove_ended()
        if self._drafting is not None and self._drafts is not None and not self._queue.is_empty:
            self._announce(done.group, self._drafting, self._drafts)
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

    def _observe(self, done: SimulatedPass, num_tokens: int, num_rounds: int) -> None:
        """What the engine learns of a pass."""
        promise, now = done.promise, self._events.now
        self._num_passes += 1
        is_observed = self._budgets is None or self._num_passes % _OBSERVED_EVERY == 1
        is_grouped = promise is not None and promise.mode is SpeculationMode.GROUPED
        if num_rounds == 1 and is_observed and not is_grouped:
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

    def _announce(self, group: int, drafting: Drafting, drafts: DraftRounds) -> None:
        """Decides how to go on, and starts the group's next round where that is by drafting."""
        now = self._events.now
        order = drafting.policy.announce(
            self._queue.load(self._turns.num_groups),
            now,
            is_ready=bool(drafting.links.links),
            max_draft_tokens=drafting.max_tokens,
        )
        round = drafts.start(group, self.running.group == group, order, now)
        if round is not None:
            self._turns.rounds[group] = round
