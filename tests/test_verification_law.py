"""Speculation is lossless: the joint law of the output is exactly the target's (DESIGN, rule 1).

Every case draws 50,000 outputs of four tokens through drafting, planning and verifying and tests
them against the enumerated law: enough to reject one that is 1% off at any position. With --full,
every combination of settings does with 200,000; without it, every two settings meet in some case.
All cases together raise a false alarm with a probability of at most 0.001. Each planted fault must
be caught by the same test at the same level.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cluster.request import SamplingParams
from cluster.speculation.budget import BudgetPlanner, FixedBudget, GreedyBudget, SearchBudget
from tests.law import law_p_value, shift_law
from tests.speculative_rounds import (
    Case,
    Fault,
    RetrospectiveBudget,
    Verifier,
    generate,
    target_law,
)

NUM_SAMPLES = 50_000
NUM_FULL_SAMPLES = 200_000

PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.7,
}
TRUNCATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.85},
    "min-p": {"min_p": 0.1},
}
PLANNERS: list[type[BudgetPlanner]] = [GreedyBudget, SearchBudget]
EVERYTHING = SamplingParams(
    temperature=0.9,
    top_k=5,
    top_p=0.95,
    min_p=0.02,
    min_tokens=2,
    stop_token_ids=(0,),
    logit_bias={2: 0.5},
    **PENALTIES,
)

FAST_CASES = [
    Case("rejection", Verifier.REJECTION, planner=GreedyBudget),
    Case("rejection-everything", Verifier.REJECTION, EVERYTHING, SearchBudget),
    Case("rejection-hot", Verifier.REJECTION, SamplingParams(temperature=1.5), SearchBudget),
    Case("one-hot", Verifier.ONE_HOT, SamplingParams(temperature=0.5, top_p=0.9), GreedyBudget),
    Case("coupled", Verifier.COUPLED, EVERYTHING, GreedyBudget),
    Case("coupled-retrospective", Verifier.COUPLED, planner=RetrospectiveBudget),
]
GRID = list(itertools.product(Verifier, (0.5, 1.0, 1.5), TRUNCATIONS, ({}, PENALTIES)))
FULL_CASES = [
    Case(
        f"{verifier.name}-T{temperature}-{truncation}-{'penalties' if penalties else 'plain'}",
        verifier,
        SamplingParams(temperature=temperature, **TRUNCATIONS[truncation], **penalties),
        PLANNERS[i // 3 % 2],
    )
    for i, (verifier, temperature, truncation, penalties) in enumerate(GRID)
]
SMALL_STEPS = [
    Case("small-steps-greedy", Verifier.REJECTION, planner=GreedyBudget, group_size=3),
    Case("small-steps-search", Verifier.REJECTION, planner=SearchBudget, group_size=3),
]


def is_of_pairs(verifier: int, temperature: int, truncation: int, has_penalties: int) -> bool:
    """Whether the case, by its places in the grid's lists, is among those that cover all pairs."""
    both = verifier + truncation
    return temperature == both % 3 and has_penalties == both % 2


PLACES = itertools.product(range(len(Verifier)), range(3), range(len(TRUNCATIONS)), range(2))
PAIR_CASES = [case for case, places in zip(FULL_CASES, PLACES, strict=True) if is_of_pairs(*places)]
# Three more are further down.
ALPHA = 0.001 / (len(FAST_CASES + PAIR_CASES + FULL_CASES) + 2 * len(SMALL_STEPS) + 3)


def case_p_value(
    case: Case, *, num_samples: int = NUM_SAMPLES, seed: int = 1, fault: Fault | None = None
) -> float:
    samples = generate(case, num_samples=num_samples, seed=seed, fault=fault)
    return law_p_value(samples, target_law(case.params))


@pytest.mark.parametrize("case", FAST_CASES, ids=lambda case: case.name)
def test_output_has_the_target_law(case: Case) -> None:
    assert case_p_value(case) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PAIR_CASES, *SMALL_STEPS], ids=lambda case: case.name)
def test_output_has_the_target_law_for_all_pairs_of_settings(case: Case) -> None:
    assert case_p_value(case, seed=2) > ALPHA


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [*FULL_CASES, *SMALL_STEPS], ids=lambda case: case.name)
def test_output_has_the_target_law_everywhere(case: Case) -> None:
    assert case_p_value(case, num_samples=NUM_FULL_SAMPLES, seed=5) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("planner", PLANNERS)
def test_requests_of_a_step_stay_independent(planner: type[BudgetPlanner]) -> None:
    """Requests compete for one budget, and yet their joint law is the product of their laws."""
    case = Case("pairs", Verifier.REJECTION, planner=planner, group_size=2)
    samples = generate(case, num_samples=NUM_SAMPLES, seed=3)[:, :2].reshape(-1, 4)
    law = target_law(case.params).sum(axis=(2, 3))
    assert law_p_value(samples, np.multiply.outer(law, law)) > ALPHA


def test_greedy_output_is_the_target_greedy_output() -> None:
    params = SamplingParams(temperature=0, **PENALTIES)
    samples = generate(Case("greedy", Verifier.REJECTION, params), num_samples=100, seed=3)
    assert law_p_value(samples, target_law(params)) == 1.0  # the law is one-hot: 0 or 1


FAULTY = [
    (None, Case("retrospective", Verifier.REJECTION, planner=RetrospectiveBudget)),
    (Fault.DRAFT_PROB_AS_CONFIDENCE, Case("greedy", Verifier.REJECTION, planner=GreedyBudget)),
    (Fault.DRAFT_PROB_AS_CONFIDENCE, Case("search", Verifier.REJECTION, planner=SearchBudget)),
    (Fault.SHARED_NOISE, Case("fixed", Verifier.REJECTION)),
    (Fault.NOT_RENORMALISED, Case("fixed", Verifier.REJECTION)),
    (Fault.STALE_PENALTIES, Case("fixed", Verifier.REJECTION, SamplingParams(**PENALTIES))),
    (Fault.STALE_PENALTIES, Case("coupled", Verifier.COUPLED, EVERYTHING)),
]


@pytest.mark.parametrize(
    ("fault", "case"), FAULTY, ids=lambda value: value.name if value else "planner"
)
def test_planted_fault_is_caught(fault: Fault | None, case: Case) -> None:
    # The illegal planner shifts the law by less than the others do.
    num_samples = NUM_FULL_SAMPLES if fault is None else NUM_SAMPLES
    assert case_p_value(case, num_samples=num_samples, fault=fault) < ALPHA


def test_total_variation_of_one_percent_is_caught_at_every_position() -> None:
    case = Case("fixed", Verifier.REJECTION, planner=lambda: FixedBudget(3))
    samples = generate(case, num_samples=NUM_SAMPLES, seed=4)
    law = target_law(case.params)
    assert law_p_value(samples, law) > ALPHA
    for position in range(law.ndim):
        shifted = shift_law(samples, law, position=position, total_variation=0.01)
        assert law_p_value(shifted, law) < ALPHA
