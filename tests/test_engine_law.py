"""The engine is lossless: engine, scheduler, sampler and a drafter over gRPC keep the target's law.

What ``tests/test_verification_law.py`` shows of the pure functions is shown here of the real parts:
the joint law of four successive tokens, each from whatever round produced it, against the law
enumerated from plain transformers. Requests of several cases share every batch. 10,000 samples
reject a law that is 3% off at any position, the 200,000 of --full one that is 1% off. All cases
together raise a false alarm with a probability of at most 0.001.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.request import SamplingParams, TokenSource
from tests.engine_law import (
    NUM_TOKENS,
    Case,
    Fault,
    Samples,
    generate,
    method_settings,
    save_pair,
    target_law,
)
from tests.law import law_p_value, shift_law

NUM_SAMPLES = 10_000
NUM_FULL_SAMPLES = 200_000
NUM_FAST_SAMPLES = 4_000

PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.7,
}
PLAIN = Case("plain", SamplingParams())
FAST_CASES = [
    Case(
        "everything",
        SamplingParams(temperature=0.9, top_k=5, top_p=0.95, min_p=0.02, **PENALTIES),
    ),
    Case("coupled", SamplingParams(temperature=1.2), is_coupled=True),
]
# Drafters that are not trusted are judged by tests/test_verification_law.py.
# Cases by what the engine is configured with; those of one configuration run side by side.
SLOW_CASES: dict[str, tuple[dict[str, Any], list[Case]]] = {
    "full": (
        {"scheduler": "full"},
        [
            Case("cold", SamplingParams(temperature=0.5)),
        ],
    ),
    "prefix": (
        {"scheduler": "prefix"},
        [
            Case("hot-min-p-penalties", SamplingParams(temperature=1.5, min_p=0.1, **PENALTIES)),
            Case("coupled", SamplingParams(top_p=0.85, **PENALTIES), is_coupled=True),
        ],
    ),
}
# The other ways of drafting, with whole blocks or with a budget.
METHODS = [
    pytest.param("draft_model", "full"),
    pytest.param("ngram", "prefix", marks=pytest.mark.slow),
    pytest.param("eagle3", "prefix", marks=pytest.mark.slow),
    pytest.param("draft_model", "prefix", marks=pytest.mark.full),
    pytest.param("ngram", "full", marks=pytest.mark.full),
    pytest.param("eagle3", "full", marks=pytest.mark.full),
]
METHOD_CASE = FAST_CASES[0]
NUM_METHOD_SAMPLES = 2_000
METHOD_TOKEN_COSTS = {"draft_model": 0.25, "ngram": 0.1, "eagle3": 0.25}
ALPHA = 0.001 / (
    len(FAST_CASES)
    + len(METHODS)
    + 3 * len(FAST_CASES)
    + 2 * sum(len(cases) for _, cases in SLOW_CASES.values())
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("law"))


def check_speculation(samples: Samples, scheduler: str) -> None:
    """Without it the test would only be one of plain decoding, or of no choice."""
    num_samples = len(samples.tokens)
    assert samples.num_late_proposals == 0
    assert samples.num_draft_tokens > num_samples
    share = samples.num_draft_tokens / samples.num_proposed_tokens
    assert share == 1 if scheduler == "full" else 0.1 < share < 0.9
    for source in (TokenSource.ACCEPTED, TokenSource.RECOVERED, TokenSource.BONUS):
        assert samples.sources[source] > num_samples / 50, source


@pytest.mark.timeout(600)
def test_output_has_the_target_law(pair: tuple[str, str]) -> None:
    samples = generate(*pair, FAST_CASES, num_samples=NUM_FAST_SAMPLES, scheduler="prefix")
    for case in FAST_CASES:
        check_speculation(samples[case.name], "prefix")
        law = target_law(pair[0], case.params)
        assert law_p_value(samples[case.name].tokens, law) > ALPHA, case.name


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("method", "scheduler"), METHODS)
def test_output_has_the_target_law_however_drafts_are_made(
    pair: tuple[str, str], method: str, scheduler: str, tmp_path: Path
) -> None:
    speculative = method_settings(method, pair[0], tmp_path) | {"scheduler": scheduler}
    samples = generate(
        *pair,
        [METHOD_CASE],
        num_samples=NUM_METHOD_SAMPLES,
        token_cost=METHOD_TOKEN_COSTS[method],
        **speculative,
    )[METHOD_CASE.name]
    check_speculation(samples, scheduler)
    law = target_law(pair[0], METHOD_CASE.params)
    assert law_p_value(samples.tokens, law) > ALPHA
    shifted = shift_law(samples.tokens, law, position=0, total_variation=0.1)
    assert law_p_value(shifted, law) < ALPHA


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SLOW_CASES)
@pytest.mark.parametrize(
    ("num_samples", "total_variation"),
    [
        pytest.param(NUM_SAMPLES, 0.03, marks=pytest.mark.slow),
        pytest.param(NUM_FULL_SAMPLES, 0.01, marks=pytest.mark.full),
    ],
    ids=["some", "full"],
)
def test_output_has_the_target_law_everywhere(
    pair: tuple[str, str], name: str, num_samples: int, total_variation: float
) -> None:
    speculative, cases = SLOW_CASES[name]
    samples = generate(*pair, cases, num_samples=num_samples, **speculative)
    for case in cases:
        check_speculation(samples[case.name], name)
        tokens, law = samples[case.name].tokens, target_law(pair[0], case.params)
        assert law_p_value(tokens, law) > ALPHA, case.name
        for position in range(NUM_TOKENS):
            shifted = shift_law(tokens, law, position=position, total_variation=total_variation)
            assert law_p_value(shifted, law) < ALPHA, (case.name, position)


@pytest.mark.parametrize(
    "num_samples", [4_000, pytest.param(20_000, marks=pytest.mark.full)], ids=["few", "many"]
)
@pytest.mark.timeout(1800)
def test_output_has_the_target_law_while_load_and_policy_change(
    pair: tuple[str, str], num_samples: int
) -> None:
    """The asynchronous scheduler, the switch and groups, all in one run (issue 5)."""
    samples = generate(*pair, FAST_CASES, num_samples=num_samples, is_changing=True)
    for case in FAST_CASES:
        sampled = samples[case.name]
        assert sampled.num_late_proposals == 0
        assert sampled.num_draft_tokens > num_samples / 2
        law = target_law(pair[0], case.params)
        assert law_p_value(sampled.tokens, law) > ALPHA, case.name
        shifted = shift_law(sampled.tokens, law, position=1, total_variation=0.1)
        assert law_p_value(shifted, law) < ALPHA


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "num_samples", "speculative"),
    [
        (Fault.SHARED_NOISE, 5_000, {"scheduler": "full"}),
        (Fault.NOT_RENORMALISED, 5_000, {"scheduler": "full", "draft_top_k": 2}),
        (Fault.DRAFT_PROB_AS_CONFIDENCE, 10_000, {"scheduler": "prefix"}),
        # Online calibration would soon let nothing reach what this planner asks for.
        (Fault.RETROSPECTIVE, 20_000, {"scheduler": "prefix", "online_calibration": False}),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_planted_fault_is_caught(
    pair: tuple[str, str], fault: Fault, num_samples: int, speculative: dict[str, Any]
) -> None:
    samples = generate(*pair, [PLAIN], num_samples=num_samples, fault=fault, **speculative)
    check_speculation(samples[PLAIN.name], speculative["scheduler"])
    assert law_p_value(samples[PLAIN.name].tokens, target_law(pair[0], PLAIN.params)) < ALPHA
