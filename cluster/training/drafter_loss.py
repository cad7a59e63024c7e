"""The three losses of a DSpark drafter (paper, section 3; DeepSpec's ``loss.py``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from cluster.models.dspark import DSparkDrafter

CROSS_ENTROPY_WEIGHT = 0.1
TOTAL_VARIATION_WEIGHT = 0.9
CONFIDENCE_WEIGHT = 1.0
POSITION_DECAY = 4.0


@dataclass(frozen=True)
class BlockLoss:
    """Loss of one batch of blocks, with what it was made of.

    ``acceptance`` is the exact chance Σ min(p, q) that a sampled guess is accepted, detached,
    ``[B, A, block_size]``; ``confidence`` the drafter's own estimate of it, of the same shape,
    or ``None``.
    """

    total: torch.Tensor
    acceptance: torch.Tensor
    confidence: torch.Tensor | None

    def expected_length(self) -> torch.Tensor:
        """Acceptance length τ, a scalar: mean accepted guesses of a block, plus one."""
        return 1.0 + self.acceptance.cumprod(dim=-1).sum(dim=-1).mean()


def sample_anchors(
    batch: int, length: int, block_size: int, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Anchors whose whole block lies inside a sequence: int64 ``[batch, count]``, ascending,
    without repetition.

    Raises:
        ValueError: ``length`` has fewer than ``count`` such anchors.
    """
    candidates = length - block_size
    if count > candidates:
        raise ValueError(f"{length} tokens hold {candidates} anchors, not {count}")
    order = torch.rand(batch, candidates, generator=generator).argsort(dim=1)
    return order[:, :count].sort(dim=1).values


def block_loss(
    drafter: DSparkDrafter,
    token_ids: torch.Tensor,
    features: torch.Tensor,
    target_logits: torch.Tensor,
    anchors: torch.Tensor,
) -> BlockLoss:
    """Losses of the blocks behind ``anchors``, given the text that follows them.

    Args:
        drafter: the drafter in training.
        token_ids: int64 ``[B, L]``.
        features: ``[B, L, len(target_layer_ids) * d]`` of the target.
        target_logits: ``[B, L, V]`` of the target.
        anchors: int64 ``[B, A]``, each at most ``L - 1 - block_size``.
    """
    size = drafter.config.block_size
    rows = torch.arange(token_ids.shape[0], device=token_ids.device)[:, None, None]
    known = anchors[..., None] + torch.arange(size, device=token_ids.device)
    previous, labels = token_ids[rows, known], token_ids[rows, known + 1]

    hidden = drafter.packed_hidden(token_ids, drafter.project_features(features), anchors)
    log_draft = drafter.block_logits(hidden, previous).log_softmax(dim=-1)
    target = target_logits[rows, known].float().softmax(dim=-1)
    distance = (log_draft.exp() - target).abs().sum(dim=-1)
    acceptance = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)

    cross_entropy = -log_draft.gather(-1, labels[..., None]).squeeze(-1)
    loss = CROSS_ENTROPY_WEIGHT * cross_entropy + TOTAL_VARIATION_WEIGHT * distance
    confidence = None
    if drafter.confidence_head is not None:
        logit = drafter.confidence_logit(hidden, previous)
        loss = loss + CONFIDENCE_WEIGHT * F.binary_cross_entropy_with_logits(
            logit, acceptance, reduction="none"
        )
        confidence = logit.detach().sigmoid()
    decay = torch.exp(-torch.arange(size, device=token_ids.device) / POSITION_DECAY)
    total = (loss * decay).sum() / (decay.sum() * anchors.numel())
    return BlockLoss(total, acceptance, confidence)
