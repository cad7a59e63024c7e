"""Groups of a simulated replica's sequences that take turns, each with its round under way."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.simulation.draft_links import SimulatedRound
from cluster.simulation.sequence import SimulatedSequence


class GroupTurns:
    """Whose pass is next.

    Attributes:
        num_groups: 1, or more while one is verified and others are drafted for.
        rounds: under way, by group.
    """

    def __init__(self) -> None:
        self.num_groups = 1
        self.rounds: dict[int, SimulatedRound] = {}
        self._next = 0

    def order(self) -> list[int]:
        """The groups, the one whose turn it is first."""
        return [(self._next + offset) % self.num_groups for offset in range(self.num_groups)]

    def took(self, group: int) -> None:
        """The group has begun its pass."""
        self._next = (group + 1) % self.num_groups

    def wait_until(self, group: int, now: float) -> float | None:
        """The deadline of the group's round; ``None`` where there is nothing to wait for."""
        round = self.rounds.get(group)
        return None if round is None or round.is_over(now) else round.deadline_s

    def regroup(
        self, num_groups: int, running: Sequence[SimulatedSequence], num_links: int
    ) -> None:
        """Forms other groups, while nothing has to be waited for.

        What was drafted stays with its sequence, whichever group that is in now.
        """
        for sequence in running:
            round = self.rounds.get(sequence.group)
            if round is not None and not round.is_answered[sequence.link]:
                sequence.asked = 0
        answered = SimulatedRound([True] * num_links, 0, 0.0)
        self.rounds = dict.fromkeys(range(num_groups), answered) if self.rounds else {}
        for index, sequence in enumerate(running):
            sequence.group = index % num_groups
        self.num_groups, self._next = num_groups, 0
