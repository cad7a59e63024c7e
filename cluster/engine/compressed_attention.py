"""The attention of DeepSeek-V4 in a pass over many sequences: each with its own cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from cluster.engine.compressed_cache import SequencePart

COMPRESSED_ATTENTION_NAME = "dspark_compressed"
_QUERIES_AT_ONCE = 256  # bounds the scores of a prompt chunk: heads x so many x keys


class PerSequenceAttention(nn.Module):
    """Runs a layer's attention for each sequence of a pass, with the sequence's own cache."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        position_ids: torch.Tensor,
        paged: list[SequencePart],
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """As the layer's attention.

        Args:
            hidden_states: ``[1, N, hidden_size]``.
            position_embeddings: by kind, cosine and sine ``[1, N, x]``.
            position_ids: ``[1, N]``.
            paged: the sequences, in order; their rows make up all N.
        """
        outputs = []
        for part in paged:
            output, _weights = self.attention(
                hidden_states[:, part.rows],
                position_embeddings={
                    kind: (cos[:, part.rows], sin[:, part.rows])
                    for kind, (cos, sin) in position_embeddings.items()
                },
                position_ids=position_ids[:, part.rows],
                attention_mask=part.mask,
                past_key_values=part.cache,
            )
            outputs.append(output)
        return torch.cat(outputs, dim=1), None


def attend_per_sequence(decoder: Any) -> None:
    """Wraps the attention of every layer, in place."""
    for layer in decoder.layers:
        layer.self_attn = PerSequenceAttention(layer.self_attn)


def compressed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    s_aux: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of all heads to one sequence's keys, which are its values too, with a sink a head.

    Args:
        query: ``[1, heads, S, head_dim]``; ``key`` and ``value``: the same
            ``[1, 1, keys, head_dim]``.
        attention_mask: ``[1, 1, S, keys]``, added to the scores.
        scaling: of the scores; ``s_aux``: ``[heads]``, a score that takes part and has no value.

    Returns:
        ``[1, S, heads, head_dim]`` and ``None`` (no weights).
    """
    keys = key[0, 0]
    sinks = s_aux.to(query.dtype).view(-1, 1, 1)
    outputs = []
    for start in range(0, query.shape[2], _QUERIES_AT_ONCE):
        part = query[0, :, start : start + _QUERIES_AT_ONCE]
        num_heads, num_queries = part.shape[:2]
        scores = (part.flatten(0, 1) @ keys.T).view(num_heads, num_queries, -1) * scaling
        scores += attention_mask[0, :, start : start + num_queries]
        scores = torch.cat([scores, sinks.expand(-1, num_queries, 1)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32)[..., :-1].to(query.dtype)
        outputs.append((weights.flatten(0, 1) @ keys).view(num_heads, num_queries, -1))
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(COMPRESSED_ATTENTION_NAME, compressed_attention)
