"""Multi-head latent attention over the paged cache (DeepSeek-V2, section 2.1; DeepSeek-V3).

A token's keys and values of all heads are projections of one latent, with one rotary key beside it.
The cache holds these two, as transformers' own caches do, and not what they expand to: for
DeepSeek-V3 576 values a token and layer in place of 40960. Nor are they expanded to attend: queries
are projected into the space of latents, and what they gather there is projected to values. The
model still expands each pass's own tokens, in vain, which costs as much as these two projections.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface

from cluster.engine.attention import PagedBatch, attend, refuse_absent

LATENT_ATTENTION_NAME = "dspark_latent"


class LatentStore:
    """Stands where a layer expects its transformers ``Cache``, and stores into pages instead."""

    def __init__(self, paged: PagedBatch) -> None:
        self._paged = paged

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a pass's tokens; returns them alone.

        Args:
            key_states: latents, ``[1, 1, N, rank]``.
            value_states: rotary keys, ``[1, 1, N, rotary_dim]``.
            layer_idx: of the layer.
        """
        latents = torch.cat([key_states, value_states], dim=-1)[0].transpose(0, 1)
        self._paged.cache.store(layer_idx, latents, latents[..., :0], self._paged.slots)
        return key_states, value_states


def latent_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: PagedBatch,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attends every query to its own sequence's latents, which ``LatentStore`` has stored.

    Args:
        module: with ``kv_b_proj``, whose weight expands a latent to each head's key and value.
        query: ``[1, heads, N, key_dim + rotary_dim]``; ``key`` and ``value``: this pass's tokens
            expanded, unused.
        attention_mask: must be unset; causality follows from positions.
        scaling: of the scores; ``paged``: this pass's layout.
        others: what else a layer hands over.

    Returns:
        ``[1, N, heads, value_dim]`` and ``None`` (no weights).

    Raises:
        ConfigError: the layer asks for something that is not here.
    """
    refuse_absent(module, attention_mask, others)
    latents, _ = paged.cache.read(cast(int, module.layer_idx))
    weight = cast(nn.Linear, module.kv_b_proj).weight
    key_dim, rank = cast(int, module.qk_nope_head_dim), weight.shape[1]
    expand = weight.view(query.shape[1], -1, rank)
    to_keys, to_values = expand[:, :key_dim], expand[:, key_dim:]
    absorbed = torch.cat([query[0, ..., :key_dim] @ to_keys, query[0, ..., key_dim:]], dim=-1)
    gathered = attend(
        absorbed.transpose(0, 1), latents, latents[..., :rank], paged, scaling, sliding_window=None
    )
    output = gathered.transpose(0, 1) @ to_values.transpose(1, 2)
    return output.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(LATENT_ATTENTION_NAME, latent_attention)
