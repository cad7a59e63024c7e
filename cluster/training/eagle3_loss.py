"""Training-time test of an EAGLE-3 drafter (Li et al., 2025; DeepSpec's ``eagle3/loss.py``).

The drafter is unrolled as in serving: the first guess behind an anchor rests on the target's
features, every later one on the drafter's own output at the step before, with the text's own
tokens in between. DeepSpec unrolls behind every position; here only sampled anchors are, as for
blocks, so that a step's cost is that of the guesses which are learned.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cluster.models.eagle3 import Eagle3Drafter
from cluster.training.drafter_loss import BlockLoss


def unrolled_hidden(
    drafter: Eagle3Drafter, token_ids: torch.Tensor, projected: torch.Tensor, anchors: torch.Tensor
) -> torch.Tensor:
    """Runs ``ttt_length`` steps behind many anchors of each sequence.

    A step sees the entries of the target's features before its anchor, and its own chain's.

    Args:
        drafter: the drafter.
        token_ids: int64 ``[B, L]``.
        projected: ``[B, L, d]`` from ``project_features``.
        anchors: int64 ``[B, A]``, from 1: positions of the last token that is known.

    Returns:
        ``[B, A, ttt_length, d]``: step k's state predicts token ``anchor + 1 + k``.
    """
    batch, length = token_ids.shape
    count = anchors.shape[1]
    rows = torch.arange(batch, device=token_ids.device)[:, None]
    # Entry t pairs the features of t with token t + 1, so the last position has none.
    places = torch.arange(length - 1, device=token_ids.device)
    keys, values = (
        part.unflatten(0, (batch, length - 1)).transpose(1, 2)
        for part in drafter.context_kv(
            projected[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), places.repeat(batch)
        )
    )
    # The entry right before the anchor is the first of the chain.
    mask = (places < anchors[..., None] - 1)[:, None]
    own = torch.eye(count, dtype=torch.bool, device=token_ids.device).expand(batch, 1, -1, -1)

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        nonlocal keys, values, mask
        query, key, value = (
            part.unflatten(0, (batch, count)).transpose(1, 2) for part in (query, key, value)
        )
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        mask = torch.cat([mask, own], dim=-1)
        attended = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
        )
        return attended.transpose(1, 2).flatten(0, 1)

    hidden = projected[rows, anchors - 1].flatten(0, 1)
    steps = []
    for step in range(drafter.config.ttt_length):
        tokens = token_ids[rows, (anchors + step).clamp(max=length - 1)]
        hidden = drafter(hidden, tokens.flatten(), (anchors - 1 + step).flatten(), attend)
        steps.append(hidden)
    return torch.stack(steps, dim=1).unflatten(0, (batch, count))


def eagle3_loss(
    drafter: Eagle3Drafter,
    token_ids: torch.Tensor,
    features: torch.Tensor,
    target_logits: torch.Tensor,
    anchors: torch.Tensor,
    counted: torch.Tensor | None = None,
) -> BlockLoss:
    """Cross-entropy to the target's whole law at every step; step k weighs
    ``step_loss_decay ** k``.

    With a reduced vocabulary the target's law is that of the tokens which the drafter knows, and
    nothing is learned where the target's first choice is none of them. Acceptance is counted with
    the whole law everywhere.

    Args:
        drafter: the drafter in training.
        token_ids: int64 ``[B, L]``.
        features: ``[B, L, len(target_layer_ids) * d]`` of the target.
        target_logits: ``[B, L, V]`` of the target.
        anchors: int64 ``[B, A]``, from 1, and at most ``L - 1 - ttt_length`` unless ``counted``
            says which guesses lie inside.
        counted: bool ``[B, A, ttt_length]``; ``None`` counts all.
    """
    config = drafter.config
    hidden = unrolled_hidden(drafter, token_ids, drafter.project_features(features), anchors)
    log_draft = drafter.draft_logits(hidden).log_softmax(dim=-1)

    steps = torch.arange(config.ttt_length, device=token_ids.device)
    rows = torch.arange(token_ids.shape[0], device=token_ids.device)[:, None, None]
    known = (anchors[..., None] + steps).clamp(max=token_ids.shape[1] - 1)
    logits = target_logits[rows, known].float()
    law = logits.softmax(dim=-1)
    weights = config.step_loss_decay ** steps.float().expand(known.shape)
    if counted is not None:
        weights = weights * counted
    if config.draft_vocab_size < config.vocab_size:
        in_vocabulary = drafter.draft_token_ids()
        law, soft = law[..., in_vocabulary], logits[..., in_vocabulary].softmax(dim=-1)
        weights = weights * drafter.t2d[logits.argmax(dim=-1)]
    else:
        soft = law
    acceptance = torch.minimum(log_draft.detach().exp(), law).sum(dim=-1)
    cross_entropy = -(soft * log_draft).sum(dim=-1)
    weight = weights.sum().clamp(min=1e-6)
    total = (cross_entropy * weights).sum() / weight
    return BlockLoss(
        total=total,
        weight=weight,
        terms={"cross_entropy": total.detach()},
        acceptance=acceptance.clamp(max=1.0),
        counted=counted,
    )
