"""What becomes of the guesses of a simulated round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.simulation.budget_memory import BudgetMemory, PassBase
from cluster.simulation.drafting import Drafting
from cluster.speculation.budget import survival_of
from cluster.speculation.cost_model import CostModel

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Of a round, or of several that do not differ.

    Attributes:
        tokens: ``[rounds, rows]`` output tokens.
        admitted: ``[rounds, rows]`` guesses verified.
        expected: how many of these should be accepted in a round.
    """

    tokens: Integers
    admitted: Integers
    expected: float

    @classmethod
    def plain(cls, num_rounds: int, num_rows: int) -> Outcome:
        """Of passes without guesses."""
        tokens = np.ones((num_rounds, num_rows), dtype=np.int64)
        return cls(tokens, np.zeros_like(tokens), 0.0)


def verify(
    drafting: Drafting,
    rng: np.random.Generator,
    *,
    luck: Floats,
    limits: Integers,
    left: Integers,
    base: PassBase,
    cost_model: CostModel,
    num_rounds: int,
    memory: BudgetMemory | None,
) -> Outcome:
    """Draws confidences, has the budget's policy admit guesses, and draws what is accepted.

    Args:
        luck: ``[rows]`` of the requests.
        limits: ``[rows]`` guesses there are; 0: it was not drafted for.
        left: ``[rows]`` output tokens still to come.
        num_rounds: that do not differ; the result ends with the first that ends a sequence.
        memory: of budgets, where they are not planned every time.
    """
    drafted = np.flatnonzero(limits)
    plain = Outcome.plain(num_rounds, len(limits))
    if not len(drafted):
        return plain
    limits = limits[drafted]
    width = max(limits.tolist())
    confidences = drafting.acceptance.confidences(rng, luck[drafted], num_rounds, width)
    ahead = np.arange(width)
    confidences *= ahead < limits[:, None]
    total = None if memory is None else memory.recall(limits, base)
    if total is None:
        first = drafting.budget.plan(
            confidences[0],
            limits,
            cost_model=cost_model,
            num_requests=base.num_requests,
            num_base_tokens=base.num_base_tokens,
            num_context_tokens=base.num_context_tokens,
        )
        if not drafting.is_profile_kept:
            drafting.profile.observe(survival_of(confidences[0], limits), limits)
        total = int(first.sum())
        if memory is not None:
            memory.keep(limits, base, total)
        others = confidences[1:]
        admitted = (
            first[None]
            if num_rounds == 1
            else np.concatenate([first[None], admit_best(others, total)])
        )
    else:
        admitted = admit_best(confidences, total)
    is_admitted = ahead < admitted[:, :, None]
    survival = np.cumprod(confidences[0], axis=1)
    expected = float(survival[is_admitted[0]].sum())
    is_accepted = (rng.random(confidences.shape) < confidences) & is_admitted
    tokens = plain.tokens
    tokens[:, drafted] += np.logical_and.accumulate(is_accepted, axis=2).sum(axis=2)
    all_admitted = plain.admitted
    all_admitted[:, drafted] = admitted
    made = tokens.cumsum(axis=0)
    ends = np.flatnonzero((made >= left).any(axis=1))
    if len(ends):
        last = int(ends[0]) + 1
        tokens, all_admitted, made = tokens[:last], all_admitted[:last], made[:last]
        tokens[-1] -= np.maximum(made[-1] - left, 0)
    return Outcome(tokens, all_admitted, expected)


def admit_best(confidences: Floats, total: int) -> Integers:
    """``[rounds, rows]`` how much of each proposal is among the ``total`` of its round that are
    likeliest to survive, as ``cluster.speculation.budget`` ranks them."""
    num_rounds, num_rows, width = confidences.shape
    if num_rows == 1:  # they fall, so the best are the first
        candidates = (confidences > 0).sum(axis=2)
        return np.minimum(candidates, total)
    survival = np.cumprod(confidences, axis=2).transpose(0, 2, 1).reshape(num_rounds, -1)
    if total >= num_rows * width:
        return (confidences > 0).sum(axis=2)
    best = np.argsort(-survival, axis=1, kind="stable")[:, :total] % num_rows
    offsets = num_rows * np.arange(num_rounds)[:, None]
    counts = np.bincount((best + offsets).ravel(), minlength=num_rounds * num_rows)
    return counts.reshape(num_rounds, num_rows)
