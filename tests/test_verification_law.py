"""Speculation is lossless: the joint law of the output is exactly the target's (DESIGN, rule 1).

Every case draws 200,000 outputs of four tokens through drafting, planning and verifying and tests
them against the enumerated law. All cases together raise a false alarm with a probability of at
most 0.001. Each planted fault must be caught by the same test at the same level.
"""

from __future__ import annotations

import pytest

from cluster.request import SamplingParams
from cluster.speculation.budget import BudgetPlanner, FixedBudget, GreedyBudget, SearchBudget
from tests.law import (
    Case,
    Fault,
    RetrospectiveBudget,
    Verifier,
    generate,
    grid,
    law_p_value,
    target_law,
)

NUM_SAMPLES = 200_000

PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.7}
TRUNCATIONS: dict[str, dict[str, float]] = {
    "full": {},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.85},
    "min-p": {"min_p": 0.1},
}
PLANNERS: dict[str, type[BudgetPlanner]] = {"greedy": GreedyBudget, "search": SearchBudget}
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
    Case("greedy", Verifier.REJECTION, SamplingParams(temperature=0, **PENALTIES), GreedyBudget),
]
SLOW_CASES = [
    Case(
        f"{verifier.name}-T{temperature}-{truncation}-{'penalties' if penalties else 'plain'}"
        f"-{planner}",
        verifier,
        SamplingParams(temperature=temperature, **TRUNCATIONS[truncation], **penalties),
        PLANNERS[planner],
    )
    for verifier, temperature, truncation, penalties, planner in (
        choice.values()
        for choice in grid(
            verifier=list(Verifier),
            temperature=[0.5, 1.0, 1.5],
            truncation=list(TRUNCATIONS),
            penalties=[{}, PENALTIES],
            planner=list(PLANNERS),
        )
    )
] + [
    Case("small-steps-greedy", Verifier.REJECTION, planner=GreedyBudget, group_size=3),
    Case("small-steps-search", Verifier.REJECTION, planner=SearchBudget, group_size=3),
]
ALPHA = 0.001 / len(FAST_CASES + SLOW_CASES)


def case_p_value(case: Case, *, seed: int = 1, fault: Fault | None = None) -> float:
    samples = generate(case, num_samples=NUM_SAMPLES, seed=seed, fault=fault)
    return law_p_value(samples, target_law(case.params))


@pytest.mark.parametrize("case", FAST_CASES, ids=lambda case: case.name)
def test_output_has_the_target_law(case: Case) -> None:
    assert case_p_value(case) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_output_has_the_target_law_everywhere(case: Case) -> None:
    assert case_p_value(case, seed=2) > ALPHA


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (
            Fault.DRAFT_PROB_AS_CONFIDENCE,
            Case("greedy", Verifier.REJECTION, planner=GreedyBudget),
        ),
        (
            Fault.DRAFT_PROB_AS_CONFIDENCE,
            Case("search", Verifier.REJECTION, planner=SearchBudget),
        ),
        (Fault.SHARED_NOISE, Case("fixed", Verifier.REJECTION)),
        (Fault.NOT_RENORMALISED, Case("fixed", Verifier.REJECTION)),
        (Fault.STALE_PENALTIES, Case("fixed", Verifier.REJECTION, EVERYTHING)),
        (Fault.STALE_PENALTIES, Case("coupled", Verifier.COUPLED, EVERYTHING)),
        (None, Case("retrospective", Verifier.REJECTION, planner=RetrospectiveBudget)),
    ],
    ids=lambda value: value.name if value else "planner",
)
def test_planted_fault_is_caught(fault: Fault | None, case: Case) -> None:
    assert case_p_value(case, fault=fault) < ALPHA


def test_total_variation_of_one_percent_is_caught_at_every_position() -> None:
    case = Case("fixed", Verifier.REJECTION, planner=lambda: FixedBudget(3))
    for seed in range(4):
        assert case_p_value(case, seed=seed, fault=Fault.OUTPUT_SHIFTED) < ALPHA
