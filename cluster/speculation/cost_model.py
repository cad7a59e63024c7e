"""What a step costs, and what it is expected to yield: the one cost model (DESIGN, rule 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import overload

import numpy as np
import numpy.typing as npt

from cluster.speculation.monotone_table import Sizes
from cluster.speculation.verify_curve import VerifyCurve

Floats = npt.NDArray[np.float64]

# One step may tell at most that it took this many times longer, or shorter, than predicted: a
# machine's hiccup is no news about the next step.
_MAX_SURPRISE = math.log(2.0)
# A surprise is first of all news about the machine (a neighbour, a clock rate), which concerns
# every size; only what stays at one size, time after time, is news about that size.
_LOCAL_SHARE = 0.1
# A pass tells at most that so many times its own time went by around it.
_MAX_HOST_SHARE = 1.0


class CostModel:
    """Time of a whole step by batch tokens and context, and of a pass with its round of drafting.

    Guarantees: predicted times are positive and never fall with more tokens or more context,
    whatever is observed; one observation changes no prediction within the curve's grid by more
    than a factor of ``2 ** (1.1 * smoothing)``.

    Observations scale the whole curve, and slowly move the points nearest to them.

    Around a pass that verifies guesses the host has work that no curve knows: it takes proposals,
    chooses among them, and hands on what was accepted. That is learnt too (``observe_host``), since
    who makes twice the passes for the same tokens pays it twice.

    Args:
        curve: the measured verify curve; a mapping gives seconds by number of batch tokens, for
            where context costs nothing.
        draft_seconds: round trip of the round of drafting at hand (drafter's queue and network
            included); whoever plans a round sets it.
        smoothing: weight of a new observation, in (0, 1].

    Raises:
        ConfigError: a mapping that is no curve.
        ValueError: the other two are out of range.
    """

    def __init__(
        self,
        curve: VerifyCurve | Mapping[int, float],
        *,
        draft_seconds: float = 0.0,
        smoothing: float = 0.1,
    ) -> None:
        if not 0 <= draft_seconds < math.inf:
            raise ValueError("draft_seconds must be finite and not negative")
        if not 0 < smoothing <= 1:
            raise ValueError("smoothing must be in (0, 1]")
        self._curve = curve if isinstance(curve, VerifyCurve) else VerifyCurve.of_tokens(curve)
        self._smoothing = smoothing
        self._scale = 1.0
        self._host_seconds = 0.0
        self.draft_seconds = draft_seconds
        self.num_groups = 1  # of sequences that take turns; set with ``draft_seconds``

    @overload
    def verify_seconds(self, num_tokens: float, num_context_tokens: float = 0) -> float: ...
    @overload
    def verify_seconds(self, num_tokens: Sizes, num_context_tokens: float = 0) -> Floats: ...
    def verify_seconds(
        self, num_tokens: float | Sizes, num_context_tokens: float = 0
    ) -> float | Floats:
        """Seconds of steps, drafting excluded.

        Args:
            num_tokens: batch tokens, guesses and prompt chunks included; any shape.
            num_context_tokens: cached tokens that they look back on, summed over sequences.
        """
        return self._scale * self._curve.seconds(num_tokens, num_context_tokens)

    def observe_verify(
        self, num_tokens: int, seconds: float, *, num_context_tokens: int = 0
    ) -> None:
        """Learn from a measured step; times that are not positive are ignored."""
        if not 0 < seconds < math.inf:
            return
        predicted = float(self.verify_seconds(num_tokens, num_context_tokens))
        surprise = math.log(seconds / predicted)
        change = self._smoothing * min(max(surprise, -_MAX_SURPRISE), _MAX_SURPRISE)
        self._scale *= math.exp(change)
        self._curve = self._curve.corrected(
            num_tokens, num_context_tokens, math.exp(_LOCAL_SHARE * change)
        )

    @property
    def host_seconds(self) -> float:
        """Seconds between passes that verify guesses, beyond what of their rounds shows."""
        return max(self._host_seconds, 0.0)

    def observe_host(self, seconds: float, pass_seconds: float) -> None:
        """Learn from a drafted pass.

        Args:
            seconds: by which it took longer than ``pass_seconds`` would say without host work; less
                than 0 where it was faster.
            pass_seconds: promised, positive.
        """
        limit = _MAX_HOST_SHARE * pass_seconds
        seconds = min(max(seconds, -limit), limit)
        self._host_seconds += self._smoothing * (seconds - self._host_seconds)

    def replace_curve(self, curve: VerifyCurve) -> None:
        """Puts a newly measured curve in the old one's place; what is known of the machine stays.

        That is how much longer than measured steps take here and now.
        """
        self._curve = curve

    def pass_seconds(
        self,
        num_tokens: float | Sizes,
        num_context_tokens: float,
        *,
        draft_seconds: float | Floats,
        num_groups: int,
    ) -> Floats:
        """Seconds from one drafted pass to the next: host work, and what of the round shows.

        A group's cycle is its pass and its round; in that time every other group has its pass. So
        with G groups a pass takes its own time, or a G-th of the cycle where that is longer.

        Args:
            num_tokens: batch tokens of the pass; any shape.
            num_context_tokens: as in ``verify_seconds``.
            draft_seconds: round trip of the group's round; any shape that goes with the tokens'.
            num_groups: G; 1 hides nothing.
        """
        seconds = self.verify_seconds(num_tokens, num_context_tokens) + self.host_seconds
        return np.maximum(seconds, (seconds + draft_seconds) / num_groups)

    def expected_goodput(
        self,
        *,
        num_requests: int,
        survival_sum: npt.ArrayLike,
        num_tokens: Sizes,
        num_context_tokens: int = 0,
    ) -> Floats:
        """Expected tokens per second of a step that verifies a drafted round.

        Args:
            num_requests: requests that sample in this step; each yields one token for certain.
            survival_sum: sum of the admitted drafted tokens' survival probabilities; any shape.
            num_tokens: batch tokens of the step, the admitted ones included; the same shape.
            num_context_tokens: as in ``verify_seconds``.

        Returns:
            ``(num_requests + survival_sum) / pass_seconds(...)`` with ``self.draft_seconds``.
        """
        tokens = num_requests + np.asarray(survival_sum, dtype=np.float64)
        seconds = self.pass_seconds(
            num_tokens,
            num_context_tokens,
            draft_seconds=self.draft_seconds,
            num_groups=self.num_groups,
        )
        return np.asarray(tokens / seconds)
