"""DSpark drafters with Gemma 4 layers (DeepSpec's ``Gemma4DSparkModel``).

All layers are of Gemma 4's full-attention kind: global head size, proportional rotary positions,
keys that serve as values where ``attention_k_eq_v`` says so.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextDecoderLayer,
    Gemma4TextRotaryEmbedding,
    Gemma4TextScaledWordEmbedding,
    apply_rotary_pos_emb,
)

from cluster.models.dspark import DSparkDrafter
from cluster.models.dspark_config import DSparkConfig

_LAYER_TYPE = "full_attention"


class Gemma4DSparkDrafter(DSparkDrafter):
    """As ``DSparkDrafter``; random weights until a checkpoint fills them."""

    def __init__(self, config: DSparkConfig) -> None:
        width, eps = config.hidden_size, config.rms_norm_eps
        gemma = Gemma4TextConfig(
            vocab_size=config.vocab_size,
            hidden_size=width,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_global_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            global_head_dim=config.head_dim,
            hidden_activation=config.hidden_act,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=eps,
            attention_bias=config.attention_bias,
            attention_k_eq_v=config.attention_k_eq_v,
            layer_types=[_LAYER_TYPE] * config.num_hidden_layers,
            rope_parameters={_LAYER_TYPE: dict(config.rope_parameters)},
            hidden_size_per_layer_input=0,
            attn_implementation="sdpa",
        )
        super().__init__(
            config,
            embed_tokens=Gemma4TextScaledWordEmbedding(
                config.vocab_size, width, None, embed_scale=width**0.5
            ),
            layers=[
                Gemma4TextDecoderLayer(gemma, index) for index in range(config.num_hidden_layers)
            ],
            norm=Gemma4RMSNorm(width, eps=eps),
            hidden_norm=Gemma4RMSNorm(width, eps=eps),
            rotary_emb=Gemma4TextRotaryEmbedding(gemma),
        )

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As ``DSparkDrafter.base_logits``, within ``final_logit_softcapping``."""
        logits = super().base_logits(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _rotary(self, like: torch.Tensor, positions: torch.Tensor) -> Any:
        return self.rotary_emb(like, positions, _LAYER_TYPE)

    def _context_entry(
        self, attention: Any, features: torch.Tensor, rotary: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = (-1, self.config.head_dim)
        keys = attention.k_proj(features).unflatten(-1, heads)
        values = keys
        if attention.v_proj is not None:
            values = attention.v_proj(features).unflatten(-1, heads)
        keys = apply_rotary_pos_emb(attention.k_norm(keys).transpose(1, 2), *rotary)
        return keys, attention.v_norm(values).transpose(1, 2)
