"""A simulated target replica: the engine's loop without an engine, around the same policies."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cluster.simulation.budget_memory import BudgetMemory, PassBase
from cluster.simulation.demand import DraftDemandMeter
from cluster.simulation.device import Device
from cluster.simulation.draft_links import DraftLinks, SimulatedRound
from cluster.simulation.draft_rounds import DraftRounds
from cluster.simulation.drafting import Drafting
from cluster.simulation.events import Events
from cluster.simulation.guesses import verify
from cluster.simulation.job import Job
from cluster.simulation.outcome import Outcome
from cluster.simulation.passes import Chunks, SimulatedPass
from cluster.simulation.request_queue import (
    RequestQueue,
    chunks,
    num_context_tokens,
    num_last,
    num_prompt_tokens,
)
from cluster.simulation.sequence import SimulatedSequence
from cluster.simulation.statistics import Statistics
from cluster.simulation.turns import GroupTurns
from cluster.speculation.pool_policy import DraftDemand
from cluster.speculation.speculation_policy import SpeculationPolicy
from cluster.speculation.switch import SpeculationMode

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

    Attributes:
        queue: its requests, ``num_taken_in`` so far; ``running`` and ``waiting`` are the queue's.
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
        self.queue = RequestQueue(device)
        self.running, self.waiting = self.queue.running, self.queue.waiting
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

    def submit(self, job: Job) -> bool:
        """Takes a request in now; returns False where too many wait."""
        self.num_taken_in += 1
        if len(self.waiting) >= self._device.settings.max_num_waiting and self._pass is not None:
            return False
        if self.queue.is_empty:
            self._last_finish = self._events.now
        self.waiting.append(job)
        if not self._is_finishing:
            self._cut()
            self._advance()
        return True

    def connect(self, moved: list[int]) -> None:
        """The drafters are others now; ``moved`` is as ``DraftLinks.connect`` returns it."""
        if not self.running:
            return
        lost = []
        for sequence in self.running:
            sequence.link = moved[sequence.link] if sequence.link >= 0 else -1
            if sequence.link < 0:
                lost.append(sequence)
                sequence.fed = 0
            sequence.asked = 0  # what is under way is late
        self._turns.rounds.clear()
        if self._drafts is not None:
            self._drafts.assign(lost)
        self._advance()

    def demand(self) -> DraftDemand:
        """As the replica reports it to the pool's policy."""
        count = len(self.running)
        if self._demand is None:
            return DraftDemand(num_requests=count)
        return self._demand.report(count, self._events.now)

    def _advance(self) -> None:
        """Begins the next pass, if there is one and nothing has to be waited for."""
        if self._pass is not None or self._is_finishing or self.queue.is_empty:
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
        round = self._turns.rounds.pop(group, None)
        self.queue.make_room()
        rows = [s for s in self.running if s.missing == 1 and s.group == group]
        older = [s for s in self.running if s.missing > 1 and s.group == group]
        widths = _answered(rows, round)
        start = self._start_of(group, round)
        room = self._device.settings.max_num_batched_tokens - len(rows)
        outcome = self._verify(group, rows, older, widths, room)
        room -= outcome.num_guesses
        prompts = chunks(older, room)
        prompts += self._admit(group, room - num_prompt_tokens(prompts))
        if not rows and not prompts:
            return False
        self._pass = self._make_pass(group, rows, prompts, outcome, round, start)
        if outcome.num_rounds > 1 and round is not None and self._drafting is not None:
            links = [sequence.link for sequence in rows]
            self._drafting.links.repeat(links, max(widths), outcome.num_rounds - 1)
        self._end_at(self._pass)
        return True

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
        rows: list[SimulatedSequence],
        prompts: Chunks,
        outcome: Outcome,
        round: SimulatedRound | None,
        start: float,
    ) -> SimulatedPass:
        num_tokens = len(rows) + outcome.num_guesses + num_prompt_tokens(prompts)
        context = num_context_tokens(rows) + sum([sequence.context for sequence, _ in prompts])
        promise = None
        if self._drafting is not None:
            promise = self._drafting.policy.promise(
                group,
                num_requests=len(rows) + num_last(prompts),
                num_tokens=num_tokens,
                num_context_tokens=context,
                expected_accepted=outcome.expected,
            )
        seconds = self._device.pass_seconds(
            num_tokens,
            context + sum(outcome.gained) / 2 if outcome.num_rounds > 1 else context,
            len(rows) + len(prompts),
            has_round=round is not None,
        )
        return SimulatedPass(
            group=group,
            rows=rows,
            outcome=outcome,
            prompts=prompts,
            first_end_s=start + seconds,
            cycle_s=seconds + (0.0 if round is None else start - self._events.now),
            started_s=start,
            num_tokens=num_tokens,
            num_context_tokens=context,
            promise=promise,
        )

    def _end_at(self, current: SimulatedPass) -> None:
        def end() -> None:
            if self._pass is current:
                self._finish()

        self._events.at(current.end_s, end)

    def _admit(self, group: int, room: int) -> Chunks:
        """Starts waiting requests that fit; returns them and their tokens."""
        admitted: Chunks = []
        while room > 0:
            job = self.queue.next_job(group, self._turns.num_groups)
            if job is None:
                break
            luck = 0.0
            if self._drafting is not None:
                luck = float(self._drafting.acceptance.requests(self._rng, 1)[0])
            sequence = self.queue.start(job, group, luck, self._events.now)
            if self._drafts is not None:
                self._drafts.assign([sequence])
            count = min(sequence.missing, room)
            admitted.append((sequence, count))
            room -= count
        return admitted

    def _num_rounds(
        self, rows: list[SimulatedSequence], older: list[SimulatedSequence], num_drafted: int
    ) -> int:
        """How many rounds can be computed together."""
        limit_s, run = self._device.stretch_s, self.running
        if limit_s <= 0 or not rows or older or self._turns.num_groups > 1:
            return 1
        if self.waiting and len(run) < self._device.settings.max_num_seqs:
            return 1
        if self._drafting is not None:
            is_off = self._drafting.policy.mode is SpeculationMode.PLAIN
            if num_drafted != (0 if is_off else len(rows)):  # a probe, or waiting to join
                return 1
        step_s = self._device.curve.seconds(len(rows), num_context_tokens(run))
        return int(max(min(limit_s / step_s, min([sequence.left for sequence in rows])), 1))

    def _verify(
        self,
        group: int,
        rows: list[SimulatedSequence],
        older: list[SimulatedSequence],
        widths: list[int],
        room: int,
    ) -> Outcome:
        """What becomes of the guesses, of which a pass has room for so many."""
        drafted = [row for row, width in enumerate(widths) if width]
        num_rounds = self._num_rounds(rows, older, len(drafted))
        if self._drafting is None or not drafted:
            return Outcome.plain(num_rounds, len(rows))
        self._drafting.policy.prepare(group)
        limit = room // len(drafted)
        if limit == 0:
            return Outcome.plain(num_rounds, len(rows))
        prompts = chunks(older, room)
        base = PassBase(
            num_requests=len(rows) + num_last(prompts),
            num_base_tokens=len(rows) + num_prompt_tokens(prompts),
            num_context_tokens=num_context_tokens(rows) + num_context_tokens(older),
        )
        outcome = verify(
            self._drafting,
            self._rng,
            luck=[rows[row].luck for row in drafted],
            limits=[min(widths[row], limit) for row in drafted],
            left=[rows[row].left for row in drafted],
            base=base,
            cost_model=self._device.cost_model,
            num_rounds=num_rounds,
            memory=self._budgets,
        )
        return outcome if len(drafted) == len(rows) else outcome.among(drafted, len(rows))

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
        now = self._events.now
        self._statistics.add_pass(done, now)
        num_tokens = sum(done.outcome.gained)
        for sequence, gain in zip(done.rows, done.outcome.gained, strict=True):
            sequence.context += gain
            # A prompt of which one token is left is computed as decoding sequences are.
            sequence.take(gain, now)
        for sequence, count in done.prompts:
            sequence.context += count
            sequence.missing -= count
            if sequence.missing == 0:
                sequence.missing = 1
                sequence.take(1, now)
                num_tokens += 1
        self._statistics.add_tokens(num_tokens, now)
        self._observe(done, num_tokens)
        self._last_finish = now
        ended = self.queue.remove_ended()
        if self._drafting is not None and self._drafts is not None and not self.queue.is_empty:
            self._announce(done.group, self._drafting, self._drafts)
        self._reported()
        for job in ended:
            self._ended(job)
        self._is_finishing = False
        self._advance()

    def _observe(self, done: SimulatedPass, num_tokens: int) -> None:
        """What the engine learns of a pass."""
        promise, now, num_rounds = done.promise, self._events.now, done.outcome.num_rounds
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
        self._drafting.policy.delivered(
            promise, num_tokens, now - self._last_finish, now, num_passes=num_rounds
        )

    def _announce(self, group: int, drafting: Drafting, drafts: DraftRounds) -> None:
        """Decides how to go on, and starts the group's next round where that is by drafting."""
        now = self._events.now
        order = drafting.policy.announce(
            self.queue.load(self._turns.num_groups),
            now,
            is_ready=bool(drafting.links.links),
            max_draft_tokens=drafting.max_tokens,
        )
        round = drafts.start(group, order, now)
        if round is not None:
            self._turns.rounds[group] = round


def _answered(rows: list[SimulatedSequence], round: SimulatedRound | None) -> list[int]:
    """Guesses that have come for each; its round is over."""
    if round is None:
        return [0] * len(rows)
    widths = [s.asked if round.is_answered[s.link] else 0 for s in rows]
    for sequence in rows:
        sequence.asked = 0
    return widths
