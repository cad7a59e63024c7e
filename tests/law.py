"""A law test for speculative decoding: is the joint law of the output exactly the target's?

The parts stand alone, so that the same test can judge the pure functions
(``tests/speculative_rounds.py``), an engine or a whole cluster:

- :func:`exact_law` enumerates the law of the next few tokens, given any ``next_token_law``;
  :func:`reference_next_token_law` is a plain-Python one, independent of ``cluster``;
- :func:`law_p_value` tests samples against it;
- :func:`shift_law` plants an error of a known size, to show that the test would see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from cluster.request import SamplingParams

Floats = npt.NDArray[np.float64]
NextTokenLaw = Callable[[tuple[int, ...]], Floats]

# ------------------------------------------------------------------------------ the exact law


def exact_law(next_token_law: NextTokenLaw, *, vocab_size: int, num_tokens: int) -> Floats:
    """Joint law of the next ``num_tokens`` tokens: shape ``[vocab_size] * num_tokens``.

    Args:
        next_token_law: from the output so far to the ``[vocab_size]`` law of the next token.
    """
    law = np.zeros([vocab_size] * num_tokens)

    def visit(output: tuple[int, ...], mass: float) -> None:
        if len(output) == num_tokens:
            law[output] = mass
            return
        for token_id, prob in enumerate(next_token_law(output)):
            if prob > 0:
                visit((*output, token_id), mass * float(prob))

    visit((), 1.0)
    return law


def reference_next_token_law(
    logits: Sequence[float], params: SamplingParams, *, prompt: Sequence[int], output: Sequence[int]
) -> Floats:
    """What ``cluster.speculation.sampling`` computes for one row, in plain Python and float64."""
    scores = [score + params.logit_bias.get(i, 0.0) for i, score in enumerate(logits)]
    for i in range(len(scores)):
        count = list(output).count(i)
        if count > 0 or i in prompt:
            penalty = params.repetition_penalty
            scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
        scores[i] -= params.frequency_penalty * count
        scores[i] -= params.presence_penalty * (count > 0)
    if len(output) < params.min_tokens:
        for i in params.stop_token_ids:
            scores[i] = -math.inf
    best = max(scores)
    if params.temperature == 0:
        return np.eye(len(scores))[scores.index(best)]
    scores = [(score - best) / params.temperature for score in scores]
    if params.top_k > 0:
        kth_best = sorted(scores, reverse=True)[min(params.top_k, len(scores)) - 1]
        scores = [score if score >= kth_best else -math.inf for score in scores]
    if params.top_p < 1:
        total = sum(math.exp(score) for score in scores)
        mass, last_kept = 0.0, 0.0
        for score in sorted(scores, reverse=True):
            if mass >= params.top_p:
                break
            mass, last_kept = mass + math.exp(score) / total, score
        scores = [score if score >= last_kept else -math.inf for score in scores]
    if params.min_p > 0:
        scores = [s if s >= math.log(params.min_p) else -math.inf for s in scores]
    weights = np.exp(scores)
    return weights / weights.sum()


# ------------------------------------------------------------------------------ the statistic


def law_p_value(samples: npt.ArrayLike, law: Floats) -> float:
    """Chi-square p-value of ``[S, L]`` sampled tokens against their exact joint law.

    Tests the joint law of every prefix and the law of every single position (few cells, so small
    shifts show), with Bonferroni's correction over them. A sample that the law excludes gives 0.
    """
    tokens = np.asarray(samples)
    num_tokens = law.ndim
    axes = [tuple(range(length)) for length in range(1, num_tokens + 1)]
    axes += [(position,) for position in range(1, num_tokens)]
    p_values = []
    for kept in axes:
        dropped = tuple(set(range(num_tokens)) - set(kept))
        expected = law.sum(axis=dropped) * len(tokens)
        flat = np.ravel_multi_index([tokens[:, axis] for axis in kept], expected.shape)
        observed = np.bincount(flat, minlength=expected.size)
        p_values.append(_chi_square_p_value(observed, expected.ravel()))
    return min(1.0, min(p_values) * len(p_values))


def _chi_square_p_value(observed: npt.NDArray[np.int64], expected: Floats) -> float:
    if observed[expected == 0].any():
        return 0.0
    is_rare = expected < 8
    observed_cells = np.append(observed[~is_rare], observed[is_rare].sum())
    expected_cells = np.append(expected[~is_rare], expected[is_rare].sum())
    is_cell = expected_cells > 0
    if is_cell.sum() < 2:
        return 1.0
    error = observed_cells[is_cell] - expected_cells[is_cell]
    statistic = float((error**2 / expected_cells[is_cell]).sum())
    return float(stats.chi2.sf(statistic, is_cell.sum() - 1))


def shift_law(
    samples: npt.NDArray[np.int64], law: Floats, *, position: int, total_variation: float
) -> npt.NDArray[np.int64]:
    """Plant an error: move probability from a position's likeliest token to its neighbour.

    The joint law then differs from ``law`` by exactly ``total_variation``.
    """
    marginal = law.sum(axis=tuple(set(range(law.ndim)) - {position}))
    token_id = int(marginal.argmax())
    coins = np.random.default_rng(position).random(len(samples))
    is_moved = (samples[:, position] == token_id) & (coins < total_variation / marginal[token_id])
    shifted = samples.copy()
    shifted[is_moved, position] = (token_id + 1) % law.shape[position]
    return shifted
