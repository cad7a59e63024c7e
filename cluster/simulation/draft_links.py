"""A replica's drafters, and what it has learnt of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.simulation.drafters import DraftAnswer, SimulatedDrafter
from cluster.simulation.events import Events
from cluster.speculation.draft_assignment import DrafterLoad, choose_drafter
from cluster.speculation.draft_cost import DraftCost, spread_round_s
from cluster.speculation.draft_curve import DraftCurve


@dataclass(eq=False)
class DraftLink:
    """One of the drafters that a replica uses."""

    drafter: SimulatedDrafter
    cost: DraftCost


@dataclass(eq=False)
class SimulatedRound:
    """A round under way.

    Attributes:
        is_answered: by link.
        num_open: parts without an answer.
        deadline_s: nothing is waited for beyond it.
        ready_s: when the last answer is in; infinite while that is not known.
    """

    is_answered: list[bool]
    num_open: int
    deadline_s: float
    ready_s: float = math.inf

    def is_over(self, now: float) -> bool:
        """Whether there is nothing to wait for."""
        return self.num_open == 0 or now >= self.deadline_s


class DraftLinks:
    """Sends rounds to drafters and learns from their answers, as an engine's client does.

    Attributes:
        links: to the drafters of now.
        compute_s: of all passes so far that had sequences of this replica in them.
    """

    def __init__(
        self, curve: DraftCurve, network_s: float, events: Events, *, is_estimated: bool
    ) -> None:
        self._curve = curve
        self.network_s = network_s
        self._events = events
        self._is_estimated = is_estimated
        self.links: list[DraftLink] = []
        self._last_costs = [DraftCost(curve)]
        self.compute_s = 0.0

    def connect(self, drafters: list[SimulatedDrafter]) -> list[int]:
        """Uses these drafters from now on.

        Returns:
            For each former link its index among the new ones, or -1: its sessions are lost.
        """
        former = {id(link.drafter): link for link in self.links}
        links = [former.get(id(d)) or DraftLink(d, DraftCost(self._curve)) for d in drafters]
        place = {id(link.drafter): index for index, link in enumerate(links)}
        moved = [place.get(id(link.drafter), -1) for link in self.links]
        self.links = links
        if links:
            self._last_costs = [link.cost for link in links]
        return moved

    def predict(self, num_sessions: float, num_tokens: int, *, added_drafters: int = 0) -> float:
        """As ``DraftClient.predicted_round_s``."""
        return spread_round_s(
            self._last_costs,
            num_sessions,
            num_tokens,
            self._events.now,
            added_drafters=added_drafters,
        )

    def queue_s(self) -> float:
        """Expected wait of a round on its drafter."""
        waits = [cost.queue_s(self._events.now) for cost in self._last_costs]
        return sum(waits) / len(waits)

    def choose(self, num_sessions: Sequence[int]) -> int:
        """The link for a new session, by the sessions on each."""
        if len(self.links) == 1:
            return 0
        now = self._events.now
        loads = [
            DrafterLoad(count, max(link.cost.round_trip_s(max(count, 1), 1, now), 1e-9))
            for link, count in zip(self.links, num_sessions, strict=True)
        ]
        return choose_drafter(loads)

    def send(
        self, asked: Sequence[tuple[int, int]], wait_s: float, answered: Callable[[], None]
    ) -> SimulatedRound:
        """Starts a round now.

        Args:
            asked: of each of its sequences, the link and the tokens to draft.
            wait_s: until its deadline.
            answered: called when all answers are in, unless they were estimated.
        """
        now = self._events.now
        parts: dict[int, list[int]] = {}
        for index, num_tokens in asked:
            parts.setdefault(index, []).append(num_tokens)
        round = SimulatedRound([False] * len(self.links), len(parts), now + wait_s)
        for index, widths in sorted(parts.items()):
            link, size, tokens = self.links[index], len(widths), max(widths)
            if self._is_estimated:
                answer = link.drafter.estimate(size, tokens)
                self._learn(link, size, tokens, answer)
                round.is_answered[index] = True
                ready_s = now + self.network_s + answer.queue_s + answer.compute_s
                round.ready_s = (
                    ready_s if round.ready_s == math.inf else max(round.ready_s, ready_s)
                )
                round.num_open = 0
            else:
                link.drafter.submit(size, tokens, self._take(round, index, size, tokens, answered))
        return round

    def repeat(self, links: Sequence[int], tokens: int, num_rounds: int) -> None:
        """Counts further rounds like one that was estimated, of sequences with these links."""
        for index, size in sorted(Counter(links).items()):
            drafter = self.links[index].drafter
            self.compute_s += num_rounds * drafter.work(size, tokens, num_rounds)

    def _take(
        self,
        round: SimulatedRound,
        index: int,
        size: int,
        tokens: int,
        answered: Callable[[], None],
    ) -> Callable[[DraftAnswer], None]:
        link = self.links[index]

        def take(answer: DraftAnswer) -> None:
            self._learn(link, size, tokens, answer)
            round.is_answered[index] = True
            round.num_open -= 1
            if round.num_open == 0:
                answered()

        return take

    def _learn(self, link: DraftLink, size: int, tokens: int, answer: DraftAnswer) -> None:
        self.compute_s += answer.compute_s
        link.cost.observe(
            size,
            tokens,
            compute_s=answer.compute_s,
            queue_s=answer.queue_s,
            network_s=self.network_s,
            now=self._events.now,
        )
