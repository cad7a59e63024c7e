"""Features that a drafter cannot use, because they were cached for a former one."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence
from cluster.speculation.cost_model import CostModel


class FeatureRefresh:
    """Has running sequences computed again, so that the drafter of now gets their features.

    Guarantees: sequences are marked until their features are the drafter's own, and nothing is
    drafted for them until then; they are computed again one at a time, so that the others go on,
    and only while nobody waits: first tokens come before anybody's drafts.

    Args:
        scheduler: the engine's.
        cost_model: says where it pays.
    """

    def __init__(self, scheduler: Scheduler, cost_model: CostModel) -> None:
        self._scheduler = scheduler
        self._cost_model = cost_model
        self._outdated: deque[Sequence] = deque()

    def mark(self, sequences: Collection[Sequence], *, are_read: bool, are_kept: bool) -> None:
        """Takes note of another drafter.

        Args:
            sequences: all of the engine's.
            are_read: whether the drafter reads features at all.
            are_kept: whether it reads the same as the former one.
        """
        for sequence in sequences:
            if not are_read:
                sequence.has_outdated_features = False
            elif not are_kept:
                sequence.has_outdated_features = sequence.num_computed_tokens > 0
        self._outdated = deque(s for s in sequences if s.has_outdated_features)

    def advance(self) -> None:
        """Starts over with the next sequence, if there is one and nobody waits."""
        while self._outdated and not self._scheduler.waiting:
            sequence = self._outdated[0]
            if sequence.is_in_flight:
                return
            self._outdated.popleft()
            is_running = sequence in self._scheduler.running
            if is_running and sequence.has_outdated_features and self._pays(sequence):
                self._scheduler.preempt(sequence)

    def _pays(self, sequence: Sequence) -> bool:
        """Whether it takes less time than to decode plainly what is left."""
        recompute_s = self._cost_model.verify_seconds(sequence.num_computed_tokens)
        return bool(recompute_s < sequence.room * self._cost_model.verify_seconds(1))
