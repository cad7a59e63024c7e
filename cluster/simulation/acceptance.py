"""How often guesses are accepted: drawn so that requests and rounds differ as they really do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_FIT_SAMPLES = 40_000
_FIT_SEED = 7
_BISECTIONS = 40
_WIDEST_LOGIT = 40.0


class AcceptanceModel:
    """Confidences of a drafter that is right about itself.

    The chance that the guess at position k is accepted, given those before it, has the log-odds

        intercept_k + request_spread * a + round_spread * b_k

    with standard normal a (one for each request) and b_k (one for each round and position). The
    intercepts are such that over many rounds the conditional acceptance is as given: what survives
    to a late position comes from better requests, which is allowed for.

    Args:
        conditional: the mean conditional acceptance at each position, each in [0, 1].
        request_spread, round_spread: standard deviations, in log-odds.
    """

    def __init__(
        self, conditional: Sequence[float], *, request_spread: float, round_spread: float
    ) -> None:
        self.block_size = len(conditional)
        self._request_spread = request_spread
        self._round_spread = round_spread
        self._intercepts = self._fit(conditional)

    def requests(self, rng: np.random.Generator, count: int) -> Floats:
        """``[count]`` what sets the requests apart, for ``confidences``."""
        return self._request_spread * rng.standard_normal(count)

    def confidences(
        self, rng: np.random.Generator, requests: Floats, num_rounds: int, width: int
    ) -> Floats:
        """``[num_rounds, R, width]`` chances of acceptance, each given the guesses before it."""
        shape = (num_rounds, len(requests), width)
        logits = rng.standard_normal(shape)
        logits *= self._round_spread
        logits += self._intercepts[:width] + requests[:, None]
        return _sigmoid(logits)

    def _fit(self, conditional: Sequence[float]) -> Floats:
        rng = np.random.default_rng(_FIT_SEED)
        requests = self.requests(rng, _FIT_SAMPLES)
        weight = np.ones(_FIT_SAMPLES)
        intercepts = []
        for share in conditional:
            logits = requests + self._round_spread * rng.standard_normal(_FIT_SAMPLES)
            low, high = -_WIDEST_LOGIT, _WIDEST_LOGIT
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                mean = float(np.average(_sigmoid(logits + middle), weights=weight))
                low, high = (middle, high) if mean < share else (low, middle)
            intercepts.append((low + high) / 2)
            weight *= np.maximum(_sigmoid(logits + intercepts[-1]), 1e-12)
        return np.asarray(intercepts)


def _sigmoid(logits: Floats) -> Floats:
    odds = np.negative(logits)
    np.exp(odds, out=odds)
    odds += 1.0
    return np.reciprocal(odds, out=odds)
