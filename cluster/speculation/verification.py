"""Deciding which drafted tokens stand, and what follows them.

Two verifiers, over batches padded to K drafted tokens a request:

- *rejection* (Leviathan et al., 2023, algorithm 1; Chen et al., 2023, algorithm 2) accepts a
  drafted token x with probability min(1, target(x)/draft(x)) and otherwise resamples from the
  residual, so that the output has exactly the target's law;
- *coupled* accepts a drafted token that equals the target's own pick (see ``coupling``).

A mixed batch is split by verifier. Nothing here draws random numbers. The caller passes the
noise, and must draw it from streams independent of each other, of the one the drafter sampled
with, and of every earlier round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.speculation.sampling import sample_from_probs

PADDING_TOKEN_ID = -1


@dataclass(frozen=True, eq=False)
class Verification:
    """Outcome of one round for R requests.

    The outputs of request r are ``output_token_ids[r, : num_output_tokens[r]]``: its accepted
    tokens and then one more, *bonus* when every drafted token was accepted (none drafted
    included) and *recovered* when one was rejected.
    """

    num_accepted_tokens: torch.Tensor  # [R] int64
    output_token_ids: torch.Tensor  # [R, K+1] int64, PADDING_TOKEN_ID behind the outputs
    is_bonus: torch.Tensor  # [R] bool, of the last output
    # [R, K] float32, of rejection: the chance of acceptance before the token was drawn, sum over x
    # of min(target(x), draft(x)); given the drafted tokens before, and behind `num_draft_tokens`
    # without meaning. None of coupled verification, whose outcome has no chance in it.
    acceptance: torch.Tensor | None = None

    @property
    def num_output_tokens(self) -> torch.Tensor:
        """``[R]`` int64, from 1 to K+1."""
        return self.num_accepted_tokens + 1


def verify_rejection(
    *,
    target_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    draft_prob_token_ids: torch.Tensor | None,
    draft_prob_values: torch.Tensor | None,
    num_draft_tokens: torch.Tensor,
    accept_uniforms: torch.Tensor,
    recovery_noise: torch.Tensor,
) -> Verification:
    """Rejection sampling of a batch of drafted blocks.

    Without draft probabilities (both ``None``) the drafter's law is taken to be one-hot at the
    token it drafted: accepted with target(x), else the target without x. That is lossless
    whatever the drafter did, so it serves drafters that are not trusted and n-gram drafts. For one
    such request in a mixed batch give the row its drafted token with the value 1. A target row
    that is one-hot (temperature 0) makes this greedy verification.

    Args:
        target_probs: ``[R, K+1, V]`` float32; row k is the target's processed law after the
            first k drafted tokens. Rows behind ``num_draft_tokens`` are not read.
        draft_token_ids: ``[R, K]`` int64; entries behind ``num_draft_tokens`` are not read but
            must be ids of the vocabulary or negative.
        draft_prob_token_ids: ``[R, K, T]`` int64, support of the law each token was sampled from.
        draft_prob_values: ``[R, K, T]`` float32, its probabilities, each row summing to one (see
            ``proposal.dequantize_draft_probs``); zero where a row is shorter than T. The drafted
            token's own must be above zero.
        num_draft_tokens: ``[R]`` int64, how many of the K to verify; 0 is plain decoding.
        accept_uniforms: ``[R, K]`` float in [0, 1).
        recovery_noise: ``[R, V]`` float32, standard exponential, for the last output.

    Returns:
        The verification, on the tensors' device.
    """
    num_requests, num_columns = draft_token_ids.shape
    rows = torch.arange(num_requests, device=target_probs.device)
    drafted = draft_token_ids.clamp(min=0)
    if draft_prob_token_ids is None or draft_prob_values is None:
        draft_prob_token_ids = drafted.unsqueeze(-1)
        draft_prob_values = torch.ones_like(draft_prob_token_ids, dtype=target_probs.dtype)

    is_drafted = draft_prob_token_ids == drafted.unsqueeze(-1)
    draft_prob = (draft_prob_values * is_drafted).sum(dim=-1)
    target_prob = target_probs[:, :num_columns].gather(2, drafted.unsqueeze(-1)).squeeze(-1)
    num_accepted = _leading_accepted(accept_uniforms * draft_prob < target_prob, num_draft_tokens)

    is_bonus = num_accepted == num_draft_tokens
    last_target_probs = target_probs[rows, num_accepted]
    residual = last_target_probs
    if num_columns > 0:
        rejected = num_accepted.clamp(max=num_columns - 1)  # of bonus rows: read, then masked
        rejected_values = draft_prob_values[rows, rejected].masked_fill(is_bonus.unsqueeze(-1), 0)
        residual = last_target_probs.scatter_add(
            1, draft_prob_token_ids[rows, rejected], -rejected_values
        ).clamp_(min=0)
        # Only rounding can reject where target and draft agree; the target's law is then right.
        residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, last_target_probs)
    last_token_ids = sample_from_probs(residual, recovery_noise)
    target_at_support = target_probs[:, :num_columns].gather(2, draft_prob_token_ids)
    acceptance = torch.minimum(target_at_support, draft_prob_values).sum(dim=-1)
    return _assemble(draft_token_ids, num_accepted, last_token_ids, is_bonus, acceptance)


def verify_coupled(
    *,
    target_picks: torch.Tensor,
    draft_token_ids: torch.Tensor,
    num_draft_tokens: torch.Tensor,
) -> Verification:
    """Accept drafted tokens as long as they equal the target's own picks.

    The outputs are the target's picks whatever was drafted, so they do not depend on the drafter,
    the budget or the load.

    Args:
        target_picks: ``[R, K+1]`` int64; column k is the target's pick (``coupled_pick``, or the
            argmax) after the first k drafted tokens.
        draft_token_ids: ``[R, K]`` int64; entries behind ``num_draft_tokens`` are not read.
        num_draft_tokens: ``[R]`` int64, how many of the K to verify; 0 is plain decoding.

    Returns:
        The verification, on the tensors' device.
    """
    num_columns = draft_token_ids.shape[1]
    num_accepted = _leading_accepted(
        target_picks[:, :num_columns] == draft_token_ids, num_draft_tokens
    )
    last_token_ids = target_picks.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
    is_bonus = num_accepted == num_draft_tokens
    return _assemble(draft_token_ids, num_accepted, last_token_ids, is_bonus)


def _leading_accepted(is_accepted: torch.Tensor, num_draft_tokens: torch.Tensor) -> torch.Tensor:
    """Length of the unbroken run of acceptances from the start; ``[R, K]`` bool -> ``[R]``."""
    columns = torch.arange(is_accepted.shape[1], device=is_accepted.device)
    is_verified = columns < num_draft_tokens.unsqueeze(1)
    return (is_accepted & is_verified).to(torch.int64).cumprod(dim=1).sum(dim=1)


def _assemble(
    draft_token_ids: torch.Tensor,
    num_accepted: torch.Tensor,
    last_token_ids: torch.Tensor,
    is_bonus: torch.Tensor,
    acceptance: torch.Tensor | None = None,
) -> Verification:
    num_requests, num_columns = draft_token_ids.shape
    columns = torch.arange(num_columns + 1, device=draft_token_ids.device)
    last_column = num_accepted.unsqueeze(1)
    output = torch.cat([draft_token_ids, draft_token_ids.new_zeros(num_requests, 1)], dim=1)
    output = torch.where(columns < last_column, output, PADDING_TOKEN_ID)
    output = output.scatter(1, last_column, last_token_ids.unsqueeze(1))
    return Verification(
        num_accepted_tokens=num_accepted,
        output_token_ids=output,
        is_bonus=is_bonus,
        acceptance=acceptance,
    )
