"""Proposals: what the verifier relies on is checked, and both sides restore the same law."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import MalformedProposalError
from cluster.speculation.proposal import (
    DraftProposal,
    dequantize_draft_probs,
    quantize_draft_probs,
)

VALID = DraftProposal(
    draft_token_ids=(3, 1),
    confidences=(0.9, 0.0),
    draft_prob_token_ids=np.array([[3, 0, 7], [1, 2, 3]], dtype=np.int32),
    draft_prob_values=np.array([[0.5, 0.25, 0.0], [1.0, 0.0, 0.0]], dtype=np.float16),
)


def with_values(*row: float) -> DraftProposal:
    values = np.array([row, [1, 0, 0]], dtype=np.float16)
    return replace(VALID, draft_prob_values=values)


def with_prob_ids(*row: int) -> DraftProposal:
    return replace(VALID, draft_prob_token_ids=np.array([row, [1, 2, 3]], dtype=np.int32))


@pytest.mark.parametrize(
    "proposal",
    [
        VALID,
        DraftProposal(draft_token_ids=(), confidences=()),
        DraftProposal(draft_token_ids=(7, 7), confidences=(1.0, 1.0)),
        replace(
            VALID,
            draft_token_ids=(),
            confidences=(),
            draft_prob_token_ids=np.zeros((0, 3), np.int32),
            draft_prob_values=np.zeros((0, 3), np.float16),
        ),
    ],
)
def test_valid_proposals_pass(proposal: DraftProposal) -> None:
    proposal.validate(vocab_size=8, max_tokens=2)


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (replace(VALID, draft_token_ids=(3, 1, 1)), "3 tokens drafted"),
        (replace(VALID, draft_token_ids=(3,)), "2 confidences for 1"),
        (replace(VALID, draft_token_ids=(3, 8)), "draft_token_ids has an id outside"),
        (replace(VALID, draft_token_ids=(-1, 1)), "draft_token_ids has an id outside"),
        (replace(VALID, confidences=(0.9, float("nan"))), "confidences"),
        (replace(VALID, confidences=(0.9, 1.01)), "confidences"),
        (replace(VALID, confidences=(-0.1, 1.0)), "confidences"),
        (replace(VALID, draft_prob_values=None), "both"),
        (replace(VALID, draft_prob_token_ids=None), "both"),
        (replace(VALID, draft_prob_values=np.ones((2, 3), np.float32)), "float16"),
        (replace(VALID, draft_prob_values=np.ones((2, 2), np.float16)), "shapes"),
        (replace(VALID, draft_token_ids=(3,), confidences=(0.9,)), "2 rows"),
        (with_prob_ids(3, 0, 8), "draft_prob_token_ids has an id outside"),
        (with_prob_ids(3, 0, -1), "draft_prob_token_ids has an id outside"),
        (with_prob_ids(3, 0, 3), "repeat"),
        (with_values(0.5, float("nan"), 0), "draft_prob_values"),
        (with_values(0.5, float("inf"), 0), "draft_prob_values"),
        (with_values(0.5, -0.1, 0), "draft_prob_values"),
        (with_values(1.5, 0, 0), "draft_prob_values"),
        (with_values(0, 0.5, 0), "no probability"),
        (with_prob_ids(4, 0, 7), "no probability"),
    ],
)
def test_malformed_proposals_are_named(proposal: DraftProposal, message: str) -> None:
    with pytest.raises(MalformedProposalError, match=message):
        proposal.validate(vocab_size=8, max_tokens=2)


def test_quantizing_keeps_the_top_and_restores_a_law() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.0, 0.4], [1.0, 0.0, 0.0, 0.0]])
    token_ids, values = quantize_draft_probs(probs, top_k=2)
    assert token_ids.dtype == torch.int32
    assert values.dtype == torch.float16
    assert token_ids[0].tolist() == [1, 3]
    restored = dequantize_draft_probs(values)
    torch.testing.assert_close(restored, torch.tensor([[5 / 9, 4 / 9], [1, 0]]), rtol=1e-3, atol=0)


def test_rounding_to_zero_leaves_a_token_out() -> None:
    probs = torch.tensor([1 - 1e-9, 1e-9])
    _, values = quantize_draft_probs(probs, top_k=5)
    assert dequantize_draft_probs(values).tolist() == [1.0, 0.0]


def test_padding_rows_stay_zero() -> None:
    assert dequantize_draft_probs(torch.zeros(2, 3, dtype=torch.float16)).sum() == 0


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_restored_law_has_the_same_bits_in_any_order(seed: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.randn(300, generator=generator) * 4).softmax(0)
    _, values = quantize_draft_probs(probs, top_k)
    order = torch.randperm(len(values), generator=generator)
    assert torch.equal(dequantize_draft_probs(values)[order], dequantize_draft_probs(values[order]))
    assert dequantize_draft_probs(values).sum().item() == pytest.approx(1.0, abs=1e-6)
