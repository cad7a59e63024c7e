"""The three losses of a DSpark drafter (paper, section 3; DeepSpec's ``loss.py``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from cluster.models.dspark import DSparkDrafter


@dataclass(frozen=True)
class LossWeights:
    """What each loss counts (DSpark, section 3); slot k of a block counts exp(-k / decay)."""

    cross_entropy: float = 0.1
    total_variation: float = 0.9
    confidence: float = 1.0
    position_decay: float = 4.0


@dataclass(frozen=True)
class BlockLoss:
    """Loss of one batch of blocks, with what it was made of.

    Attributes:
        total: a scalar, the mean over what is counted.
        weight: the weights of what ``total`` is the mean of, summed; a scalar.
        terms: each loss by name, unweighted by ``LossWeights``; detached scalars.
        acceptance: the exact chance Σ min(p, q) that a sampled guess is accepted, detached,
            ``[B, A, block_size]``.
        confidence: the drafter's own estimate of it, of the same shape, or ``None``.
        counted: bool, of the same shape: the guesses that are counted; ``None``: all.
    """

    total: torch.Tensor
    weight: torch.Tensor
    terms: dict[str, torch.Tensor]
    acceptance: torch.Tensor
    confidence: torch.Tensor | None = None
    counted: torch.Tensor | None = None

    def expected_length(self) -> torch.Tensor:
        """Acceptance length τ, a scalar: mean accepted guesses of a block, plus one."""
        accepted, _, counts = self.position_sums()
        return 1.0 + (accepted / counts.clamp(min=1)).sum()

    def position_sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(chance that everything up to a position is accepted, that it is if all before it
        are, number of guesses)``, each summed over the blocks: fp32 ``[block_size]``."""
        counted = torch.ones_like(self.acceptance)
        if self.counted is not None:
            counted = self.counted.float()
        survival = self.acceptance.cumprod(dim=-1)
        sums = [(part * counted).flatten(0, -2).sum(dim=0) for part in (survival, self.acceptance)]
        return sums[0], sums[1], counted.flatten(0, -2).sum(dim=0)


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


def sample_answer_anchors(
    answers: torch.Tensor, block_size: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors before answer tokens; a block may reach beyond the answer's end.

    Args:
        answers: bool ``[B, L]``, the tokens that are learned.
        block_size: guesses behind each anchor.
        count: anchors of each sequence.
        generator: of the choice.

    Returns:
        ``(anchors int64 [B, count], counted bool [B, count, block_size])``. Where a sequence has
        fewer anchors, nothing is counted behind the others.
    """
    batch, length = answers.shape
    scores = torch.rand(batch, length - 1, generator=generator)
    order = scores.masked_fill(~answers[:, 1:], 2.0).argsort(dim=1)[:, :count]
    anchors = torch.zeros(batch, count, dtype=torch.int64)
    anchors[:, : order.shape[1]] = order
    usable = torch.arange(count) < answers[:, 1:].sum(dim=1, keepdim=True)
    labels = anchors[..., None] + 1 + torch.arange(block_size)
    learned = answers[torch.arange(batch)[:, None, None], labels.clamp(max=length - 1)]
    counted = learned & (labels < length) & usable[..., None]
    return anchors, counted.cumprod(dim=-1).bool()


def block_loss(
    drafter: DSparkDrafter,
    token_ids: torch.Tensor,
    features: torch.Tensor,
    target_logits: torch.Tensor,
    anchors: torch.Tensor,
    counted: torch.Tensor | None = None,
    weights: LossWeights | None = None,
) -> BlockLoss:
    """Losses of the blocks behind ``anchors``, given the text that follows them.

    Args:
        drafter: the drafter in training.
        token_ids: int64 ``[B, L]``.
        features: ``[B, L, len(target_layer_ids) * d]`` of the target.
        target_logits: ``[B, L, V]`` of the target.
        anchors: int64 ``[B, A]``, each at most ``L - 1 - block_size`` unless ``counted`` says
            which guesses lie inside.
        counted: bool ``[B, A, block_size]``; ``None`` counts all.
        weights: of the losses; the paper's by default.
    """
    weights = weights or LossWeights()
    size = drafter.config.block_size
    rows = torch.arange(token_ids.shape[0], device=token_ids.device)[:, None, None]
    known = anchors[..., None] + torch.arange(size, device=token_ids.device)
    last = token_ids.shape[1] - 1
    known, following = known.clamp(max=last), (known + 1).clamp(max=last)
    previous, labels = token_ids[rows, known], token_ids[rows, following]

    hidden = drafter.packed_hidden(token_ids, drafter.project_features(features), anchors)
    log_draft = drafter.block_logits(hidden, previous).log_softmax(dim=-1)
    target = target_logits[rows, known].float().softmax(dim=-1)
    distance = (log_draft.exp() - target).abs().sum(dim=-1)
    acceptance = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)

    cross_entropy = -log_draft.gather(-1, labels[..., None]).squeeze(-1)
    loss = weights.cross_entropy * cross_entropy + weights.total_variation * distance
    terms = {"cross_entropy": cross_entropy, "total_variation": distance}
    confidence = None
    if drafter.confidence_head is not None:
        logit = drafter.confidence_logit(hidden, previous)
        terms["confidence"] = F.binary_cross_entropy_with_logits(
            logit, acceptance, reduction="none"
        )
        loss = loss + weights.confidence * terms["confidence"]
        confidence = logit.detach().sigmoid()
    decay = torch.exp(-torch.arange(size, device=token_ids.device) / weights.position_decay)
    weight = decay.sum() * anchors.numel()
    if counted is not None:
        decay = decay * counted
        weight = decay.sum().clamp(min=1e-6)
    return BlockLoss(
        total=(loss * decay).sum() / weight,
        weight=weight,
        terms={name: (term.detach() * decay).sum() / weight for name, term in terms.items()},
        acceptance=acceptance,
        confidence=confidence,
        counted=counted,
    )
