"""Verification case by case; its law is tested in ``test_verification_law``."""

from __future__ import annotations

import torch

from cluster.speculation.verification import (
    PADDING_TOKEN_ID,
    Verification,
    verify_coupled,
    verify_rejection,
)

VOCAB_SIZE = 4
NEVER, ALWAYS = 0.999999, 0.0  # uniforms that reject or accept wherever that has a chance


def reject(
    target_probs: list[list[list[float]]],
    drafted: list[list[int]],
    uniforms: list[list[float]],
    *,
    draft_probs: list[list[list[float]]] | None = None,
    num_draft_tokens: list[int] | None = None,
) -> Verification:
    """Dense draft probabilities, and recovery noise that prefers the likeliest token."""
    draft_token_ids = torch.tensor(drafted, dtype=torch.int64).reshape(len(target_probs), -1)
    num_requests, num_columns = draft_token_ids.shape
    prob_token_ids = torch.arange(VOCAB_SIZE).expand(num_requests, num_columns, VOCAB_SIZE)
    return verify_rejection(
        target_probs=torch.tensor(target_probs),
        draft_token_ids=draft_token_ids,
        draft_prob_token_ids=None if draft_probs is None else prob_token_ids,
        draft_prob_values=None if draft_probs is None else torch.tensor(draft_probs),
        num_draft_tokens=torch.tensor(num_draft_tokens or [num_columns] * num_requests),
        accept_uniforms=torch.tensor(uniforms).reshape(num_requests, num_columns),
        recovery_noise=torch.ones(num_requests, VOCAB_SIZE),
    )


def outputs(verification: Verification) -> list[list[int]]:
    assert torch.equal(verification.num_output_tokens, verification.num_accepted_tokens + 1)
    rows = verification.output_token_ids.tolist()
    counts = verification.num_output_tokens.tolist()
    for row, count in zip(rows, counts, strict=True):
        assert all(token_id == PADDING_TOKEN_ID for token_id in row[count:])
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


LAW = [0.1, 0.2, 0.3, 0.4]


def test_all_accepted_ends_in_a_bonus_token() -> None:
    verification = reject([[LAW, LAW, LAW]], [[0, 1]], [[ALWAYS, ALWAYS]], draft_probs=[[LAW, LAW]])
    assert outputs(verification) == [[0, 1, 3]]
    assert verification.is_bonus.tolist() == [True]


def test_first_rejection_ends_the_block_with_the_residual() -> None:
    draft = [0.0, 0.1, 0.1, 0.8]  # 3 is accepted with 0.5; the residual prefers 2
    verification = reject(
        [[LAW, LAW, LAW]], [[3, 3]], [[NEVER, ALWAYS]], draft_probs=[[draft, draft]]
    )
    assert outputs(verification) == [[2]]
    assert verification.is_bonus.tolist() == [False]


def test_number_of_draft_tokens_cuts_each_row() -> None:
    verification = reject(
        [[LAW, LAW, LAW]] * 3,
        [[0, 1], [0, -1], [-1, -1]],
        [[ALWAYS, ALWAYS]] * 3,
        draft_probs=[[LAW, LAW]] * 3,
        num_draft_tokens=[2, 1, 0],
    )
    assert outputs(verification) == [[0, 1, 3], [0, 3], [3]]
    assert verification.is_bonus.tolist() == [True, True, True]


def test_block_of_no_columns_is_plain_decoding() -> None:
    verification = reject([[LAW]], [[]], [[]])
    assert outputs(verification) == [[3]]
    assert verification.is_bonus.tolist() == [True]


def test_zero_residual_falls_back_to_the_target() -> None:
    """What rounding can do: rejected though the target is nowhere above the draft."""
    above = [0.11, 0.2, 0.3, 0.4]
    verification = reject([[LAW, LAW]], [[0]], [[NEVER]], draft_probs=[[above]])
    assert outputs(verification) == [[3]]
    assert verification.is_bonus.tolist() == [False]


def test_without_a_draft_law_the_drafted_token_is_not_recovered() -> None:
    verification = reject([[LAW, LAW]] * 2, [[3], [3]], [[0.39], [0.41]])
    assert outputs(verification) == [[3, 3], [2]]


def test_one_hot_target_is_greedy_verification() -> None:
    one_hot = [0.0, 1.0, 0.0, 0.0]
    verification = reject(
        [[one_hot, one_hot]] * 2,
        [[1], [2]],
        [[NEVER], [ALWAYS]],
        draft_probs=[[[0.0, 0.5, 0.5, 0.0]]] * 2,
    )
    assert outputs(verification) == [[1, 1], [1]]


def test_token_that_the_target_excludes_is_always_rejected() -> None:
    target = [0.0, 0.0, 0.0, 1.0]
    verification = reject([[target, target]], [[0]], [[ALWAYS]], draft_probs=[[LAW]])
    assert outputs(verification) == [[3]]


def test_coupled_outputs_are_the_targets_own_picks() -> None:
    verification = verify_coupled(
        target_picks=torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]),
        draft_token_ids=torch.tensor([[1, 2], [1, 0], [0, 2], [1, 2]]),
        num_draft_tokens=torch.tensor([2, 2, 2, 1]),
    )
    assert outputs(verification) == [[1, 2, 3], [1, 2], [1], [1, 2]]
    assert verification.is_bonus.tolist() == [True, False, False, True]
