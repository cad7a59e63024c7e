"""Drafting for a few sequences while nothing else is drafted, to see what it would bring."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engine.sequence import Sequence

_MAX_SEQUENCES = 4
_MAX_ROUNDS = 3
_LONGEST_S = 1.0


@dataclass(eq=False)
class DraftProbe:
    """A few rounds of a few sequences, which had no draft session.

    Attributes:
        sequences: those that are drafted for.
        started: monotonic seconds.
        num_rounds: asked for so far.
        waited_s: for their answers, by all sequences of the pass.
    """

    sequences: list[Sequence]
    started: float
    num_rounds: int = 0
    waited_s: float = 0.0

    @classmethod
    def of(cls, sequences: list[Sequence], now: float) -> DraftProbe:
        """With the shortest of ``sequences``: a drafter needs the features of all their tokens."""
        able = [
            s
            for s in sequences
            if s.num_missing_tokens == 1 and not s.request.speculation.is_off and s.room > 1
        ]
        return cls(sorted(able, key=lambda s: s.num_computed_tokens)[:_MAX_SEQUENCES], now)

    def members(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those of ``sequences`` that are probed."""
        probed = set(self.sequences)
        return [sequence for sequence in sequences if sequence in probed]

    def waited(self, seconds: float) -> None:
        """Counts the time that a pass waited for a round."""
        self.waited_s += seconds

    def is_over(self, now: float) -> bool:
        """Whether it has seen enough, or will see nothing."""
        return self.num_rounds >= _MAX_ROUNDS or now - self.started > _LONGEST_S
