"""How many drafted tokens of each request to verify.

A request's tokens are verified as a prefix. The *survival* of token k is the chance that it and
all before it are accepted: the product of the confidences c_1 ... c_k. The planners weigh the
expected tokens of a step against its time (``CostModel.expected_goodput``).

Rejection sampling stays exact only if the choice to verify token k does not depend on token k or
on anything computed from it (DESIGN, rule 3; DSpark, appendix A). c_k may depend on the tokens
before k alone, so a planner may let tokens 1 ... k-1 and c_1 ... c_k decide about token k, and not
c_{k+1}. Each planner's docstring says why it keeps this. All visit candidates in one order: by
falling survival, ties to the smaller k and then to the lower row. Survival never rises with k, so
a request's candidates are visited in turn, and the next one to visit follows from tokens that were
admitted before. A rule that only looks at what was visited so far, this candidate's confidence
included, therefore sees no token that it has not yet admitted, of this or of another request.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.speculation.cost_model import CostModel
from cluster.speculation.survival_profile import SurvivalProfile

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_WHOLE_BLOCK = 1 << 20  # more than any has


class BudgetPlanner(Protocol):
    """Decides a step's budget; ``plan`` is called once a step, after the proposals are in."""

    def plan(
        self,
        confidences: Floats,
        num_candidates: Integers,
        *,
        cost_model: CostModel,
        num_requests: int,
        num_base_tokens: int,
        num_context_tokens: int = 0,
    ) -> Integers:
        """Choose how long a prefix of each request's drafted tokens to verify.

        Args:
            confidences: ``[R, K]`` in [0, 1]; entries behind ``num_candidates`` are not read.
            num_candidates: ``[R]`` int64, drafted tokens of each request, 0 to K.
            cost_model: what the step costs.
            num_requests: requests that sample in this step, with and without a proposal.
            num_base_tokens: batch tokens that the step has anyway: one for each request that
                samples and those of the prefill chunks.
            num_context_tokens: cached tokens of all sequences in the step.

        Returns:
            ``[R]`` int64, from 0 to ``num_candidates``.
        """


class FixedBudget:
    """Always verifies the first ``num_speculative_tokens``; legal because it looks at nothing."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self._num_speculative_tokens = num_speculative_tokens

    def plan(
        self,
        confidences: Floats,
        num_candidates: Integers,
        *,
        cost_model: CostModel,
        num_requests: int,
        num_base_tokens: int,
        num_context_tokens: int = 0,
    ) -> Integers:
        """See :meth:`BudgetPlanner.plan`."""
        return np.minimum(num_candidates, self._num_speculative_tokens)


class GreedyBudget:
    """DSpark's hardware-aware prefix scheduler (algorithm 1): greedy with an early stop.

    Takes candidates in order and stops for good at the first whose addition lowers the expected
    tokens per second. Legal: whether a candidate is reached and taken depends on it and on those
    before it in the order, never on one behind it. Looking past a fall, or going back to the best
    prefix seen, would break that.
    """

    def plan(
        self,
        confidences: Floats,
        num_candidates: Integers,
        *,
        cost_model: CostModel,
        num_requests: int,
        num_base_tokens: int,
        num_context_tokens: int = 0,
    ) -> Integers:
        """See :meth:`BudgetPlanner.plan`."""
        survival = survival_of(confidences, num_candidates)
        order = _visiting_order(survival)
        ordered = survival.ravel(order="F")[order]
        goodput = _goodput_by_budget(
            ordered, cost_model, num_requests, num_base_tokens, num_context_tokens
        )
        is_fall = goodput[1:] < goodput[:-1]
        budget = int(is_fall.argmax()) if is_fall.any() else len(order)
        return _admit(order[:budget], len(num_candidates))


class SearchBudget:
    """Searches all totals, with confidences of earlier rounds only (DSpark, section 5.2).

    The best total may lie behind a step of the verify curve, where :class:`GreedyBudget` stops.
    Legal: the total comes from a profile of earlier rounds' survival, fixed before anything of
    this round was sampled; the current confidences only rank, and whether a candidate is among
    the first ``total`` of the order depends on those before it. A tie of totals goes to the
    smaller one. The first round has no profile and plans as :class:`GreedyBudget`.

    Args:
        profile: of earlier rounds, to which each planned round is added; unset: one of its own.
    """

    def __init__(self, profile: SurvivalProfile | None = None) -> None:
        self._profile = SurvivalProfile() if profile is None else profile
        self._is_first = True

    def plan(
        self,
        confidences: Floats,
        num_candidates: Integers,
        *,
        cost_model: CostModel,
        num_requests: int,
        num_base_tokens: int,
        num_context_tokens: int = 0,
    ) -> Integers:
        """See :meth:`BudgetPlanner.plan`; then remembers this round's survival."""
        survival = survival_of(confidences, num_candidates)
        order = _visiting_order(survival)
        if len(order) == 0:
            return np.zeros_like(num_candidates)
        columns = np.arange(confidences.shape[1])
        counts = (num_candidates[:, None] > columns).sum(axis=0)
        expected = -np.sort(-np.concatenate(self._profile.expected(counts)))
        self._profile.observe(survival, num_candidates)
        is_first, self._is_first = self._is_first, False
        if is_first:
            return GreedyBudget().plan(
                confidences,
                num_candidates,
                cost_model=cost_model,
                num_requests=num_requests,
                num_base_tokens=num_base_tokens,
                num_context_tokens=num_context_tokens,
            )
        goodput = _goodput_by_budget(
            expected, cost_model, num_requests, num_base_tokens, num_context_tokens
        )
        return _admit(order[: int(goodput.argmax())], len(num_candidates))


def make_budget(scheduler: str, profile: SurvivalProfile) -> BudgetPlanner:
    """The planner by its name in the configuration (``speculative.scheduler``).

    Args:
        scheduler: "full", "prefix" or "search".
        profile: of earlier rounds; "search" keeps it current itself, the others do not.
    """
    if scheduler == "full":
        return FixedBudget(_WHOLE_BLOCK)
    return GreedyBudget() if scheduler == "prefix" else SearchBudget(profile)


def survival_of(confidences: Floats, num_candidates: Integers) -> Floats:
    """``[R, K]`` products of confidences; -1 where there is no candidate."""
    columns = np.arange(confidences.shape[1])
    is_candidate = columns < num_candidates[:, None]
    return np.where(is_candidate, np.cumprod(confidences, axis=1, dtype=np.float64), -1.0)


def _visiting_order(survival: Floats) -> Integers:
    """Candidates by falling survival, ties to the smaller k, then the lower row.

    Returns:
        Indices ``k * R + r`` (column-major) into ``survival``, real candidates only.
    """
    flat = survival.ravel(order="F")
    order = np.argsort(-flat, kind="stable")
    return order[: int((flat >= 0).sum())]


def _goodput_by_budget(
    ordered_survival: Floats,
    cost_model: CostModel,
    num_requests: int,
    num_base_tokens: int,
    num_context_tokens: int,
) -> Floats:
    """``[C+1]`` expected tokens per second when the first 0 ... C candidates are taken."""
    survival_sum = np.concatenate([[0.0], np.cumsum(ordered_survival)])
    num_tokens = num_base_tokens + np.arange(len(survival_sum))
    return cost_model.expected_goodput(
        num_requests=num_requests,
        survival_sum=survival_sum,
        num_tokens=num_tokens,
        num_context_tokens=num_context_tokens,
    )


def _admit(admitted: Integers, num_rows: int) -> Integers:
    """Admitted candidates by row; a prefix of each row, as the order visits k before k+1."""
    return np.bincount(admitted % num_rows, minlength=num_rows).astype(np.int64)
