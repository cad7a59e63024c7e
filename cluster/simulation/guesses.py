"""What becomes of the guesses of a simulated round."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.simulation.budget_memory import BudgetMemory, PassBase
from cluster.simulation.drafting import Drafting
from cluster.simulation.outcome import Outcome
from cluster.speculation.budget import survival_of
from cluster.speculation.cost_model import CostModel

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Rounds that are drawn at a time: how many there will be is known only when a sequence has ended.
_BLOCK_ROUNDS = 128


def verify(
    drafting: Drafting,
    rng: np.random.Generator,
    *,
    luck: list[float],
    limits: list[int],
    left: list[int],
    base: PassBase,
    cost_model: CostModel,
    num_rounds: int,
    memory: BudgetMemory | None,
) -> Outcome:
    """Draws confidences, has the budget's policy admit guesses, and draws what is accepted.

    Args:
        luck: of each request that was drafted for.
        limits: guesses that there are of each, at least 1.
        left: output tokens still to come of each.
        num_rounds: that do not differ; the result ends with the first that ends a sequence.
        memory: of budgets, where they are not planned every time.
    """
    lucks, counts, missing = np.asarray(luck), np.asarray(limits), np.asarray(left)
    ahead = np.arange(max(limits))
    total = None if memory is None else memory.recall(limits, base)
    expected = 0.0
    blocks: list[Integers] = []
    for start in range(0, num_rounds, _BLOCK_ROUNDS):
        size = min(num_rounds - start, _BLOCK_ROUNDS)
        confidences = drafting.acceptance.confidences(rng, lucks, size, len(ahead))
        if min(limits) < len(ahead):
            confidences *= ahead < counts[:, None]
        if total is None:
            total = _plan(drafting, confidences[0], counts, base, cost_model)
            if memory is not None:
                memory.keep(limits, base, total)
        is_admitted = ahead < admit_best(confidences, counts, total)[:, :, None]
        if start == 0:
            expected = float(confidences[0].cumprod(axis=1)[is_admitted[0]].sum())
        tokens = _first_false((rng.random(confidences.shape) < confidences) & is_admitted)
        tokens += 1  # the target's own
        made = tokens.cumsum(axis=0)
        blocks.append(tokens)
        if (made[-1] >= missing).any():
            end = int((made >= missing).any(axis=1).argmax())
            tokens[end] -= np.maximum(made[end] - missing, 0)
            blocks[-1] = tokens[: end + 1]
            break
        missing = missing - made[-1]
    tokens = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return Outcome.guessed(tokens, min(total or 0, sum(limits)), expected)


def _plan(
    drafting: Drafting,
    confidences: Floats,
    limits: Integers,
    base: PassBase,
    cost_model: CostModel,
) -> int:
    """How many guesses of a round are verified in all; which, ``admit_best`` says."""
    admitted = drafting.budget.plan(
        confidences,
        limits,
        cost_model=cost_model,
        num_requests=base.num_requests,
        num_base_tokens=base.num_base_tokens,
        num_context_tokens=base.num_context_tokens,
    )
    if not drafting.is_profile_kept:
        drafting.profile.observe(survival_of(confidences, limits), limits)
    return int(admitted.sum())


def admit_best(confidences: Floats, limits: Integers, total: int) -> Integers:
    """``[rounds, rows]`` how much of each proposal is among the ``total`` of its round that are
    likeliest to survive, as ``cluster.speculation.budget`` ranks them; ``[1, rows]`` where it is
    the same in all rounds."""
    num_rounds, num_rows = confidences.shape[:2]
    if num_rows == 1 or total >= limits.sum():  # survival falls, so the best of a row are the first
        return np.minimum(limits, total)[None]
    survival = np.cumprod(confidences, axis=2).transpose(0, 2, 1).reshape(num_rounds, -1)
    best = np.argsort(-survival, axis=1, kind="stable")[:, :total] % num_rows
    offsets = num_rows * np.arange(num_rounds)[:, None]
    counts = np.bincount((best + offsets).ravel(), minlength=num_rounds * num_rows)
    return counts.reshape(num_rounds, num_rows)


def _first_false(flags: npt.NDArray[np.bool_]) -> Integers:
    """Along the last axis; its length where there is none."""
    padded = np.zeros((*flags.shape[:-1], flags.shape[-1] + 1), dtype=np.bool_)
    padded[..., :-1] = flags
    return padded.argmin(axis=-1)
