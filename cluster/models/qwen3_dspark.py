"""DSpark drafters with Qwen3 layers (DeepSpec's ``Qwen3DSparkModel``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from cluster.models.dspark import DSparkDrafter
from cluster.models.dspark_config import DSparkConfig


class Qwen3DSparkDrafter(DSparkDrafter):
    """As ``DSparkDrafter``; random weights until a checkpoint fills them."""

    def __init__(self, config: DSparkConfig) -> None:
        width, eps = config.hidden_size, config.rms_norm_eps
        qwen = Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=width,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=eps,
            attention_bias=config.attention_bias,
            hidden_act=config.hidden_act,
            rope_parameters=dict(config.rope_parameters),
            attn_implementation="sdpa",
        )
        super().__init__(
            config,
            embed_tokens=nn.Embedding(config.vocab_size, width),
            layers=[Qwen3DecoderLayer(qwen, index) for index in range(config.num_hidden_layers)],
            norm=Qwen3RMSNorm(width, eps=eps),
            hidden_norm=Qwen3RMSNorm(width, eps=eps),
            rotary_emb=Qwen3RotaryEmbedding(qwen),
        )

    def _context_entry(
        self, attention: Any, features: torch.Tensor, rotary: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = (-1, self.config.head_dim)
        keys = attention.k_norm(attention.k_proj(features).unflatten(-1, heads)).transpose(1, 2)
        values = attention.v_proj(features).unflatten(-1, heads).transpose(1, 2)
        # It rotates queries too; there are none.
        _, keys = apply_rotary_pos_emb(keys[:, :0], keys, *rotary)
        return keys, values
