"""The DSpark draft module of DeepSeek-V4 (DeepSeek-AI, 2026; ``inference/model.py`` beside the
published weights): sliding-window attention with shared keys and values and attention sinks,
mixture-of-experts layers, and several residual streams.

Published weights keep keys and values in fp8 while they run; here they stay in the dtype of the
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4Experts,
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
    DeepseekV4TopKRouter,
    apply_rotary_pos_emb,
)

from cluster.models import deepseek_v4_names, deepseek_v4_weights
from cluster.models.deepseek_v4_config import DeepSeekV4DSparkConfig
from cluster.models.dspark import DSparkDrafter
from cluster.models.dspark_config import DSparkConfig

# Layers without compression use this one of the target's two sets of rotary positions.
_ROTARY = "main"


class DeepSeekV4DSparkDrafter(DSparkDrafter):
    """As ``DSparkDrafter``; random weights until a checkpoint fills them.

    The heads read the residual streams' weighted sum: the confidence head as it is, the output
    head after the final norm. The sums' weights, sinks and the routers' biases stay fp32.
    """

    config: DeepSeekV4DSparkConfig

    def __init__(self, config: DSparkConfig) -> None:
        if not isinstance(config, DeepSeekV4DSparkConfig):
            raise TypeError(f"needs a DeepSeekV4DSparkConfig, not {type(config).__name__}")
        width, eps = config.hidden_size, config.rms_norm_eps
        network = _network_config(config)
        super().__init__(
            config,
            embed_tokens=nn.Embedding(config.vocab_size, width),
            layers=[
                DeepseekV4DecoderLayer(network, index) for index in range(config.num_hidden_layers)
            ],
            norm=DeepseekV4RMSNorm(width, eps=eps),
            hidden_norm=DeepseekV4RMSNorm(width, eps=eps),
            rotary_emb=DeepseekV4RotaryEmbedding(network),
            confidence_bias=False,
        )
        self.hc_head = DeepseekV4HyperHead(network)
        self.apply(_initialize)

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As ``DSparkDrafter.base_logits``; the final norm is part of it."""
        return super().base_logits(self.norm(hidden))

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """All weights under the published names, ``mtp.*`` and the target's two."""
        return deepseek_v4_weights.to_published(self.state_dict(), self.config.num_hidden_layers)

    def load_checkpoint_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As ``DSparkDrafter.load_checkpoint_tensors``; experts are joined, which copies them."""
        state = deepseek_v4_weights.to_network(tensors, self.config.num_hidden_layers)
        self.load_state_dict(state, assign=True)

    def is_float32(self, name: str) -> bool:
        """As ``DSparkDrafter.is_float32``."""
        names = deepseek_v4_names.published_names(self.config.num_hidden_layers)
        return deepseek_v4_names.is_float32(names.get(name, name))

    def _rotary(self, like: torch.Tensor, positions: torch.Tensor) -> Any:
        return {_ROTARY: self.rotary_emb(like, positions, layer_type=_ROTARY)}

    def _context_entry(
        self, attention: Any, features: torch.Tensor, rotary: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shared = attention.kv_norm(attention.kv_proj(features))[:, None]
        shared = apply_rotary_pos_emb(shared, *rotary[_ROTARY])
        return shared, shared

    def _attention_mask(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))

    def _enter(self, embedded: torch.Tensor) -> torch.Tensor:
        return embedded[:, :, None].repeat(1, 1, self.config.target["hc_mult"], 1)

    def _leave(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.hc_head(hidden)


def _network_config(config: DeepSeekV4DSparkConfig) -> DeepseekV4Config:
    """transformers' configuration of the module: as many layers as stages, none compressed."""
    target, stages = config.target, config.num_hidden_layers
    same = (
        "hc_mult",
        "hc_sinkhorn_iters",
        "hc_eps",
        "q_lora_rank",
        "o_lora_rank",
        "o_groups",
        "qk_rope_head_dim",
        "sliding_window",
        "routed_scaling_factor",
        "swiglu_limit",
    )
    return DeepseekV4Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.intermediate_size,
        num_hidden_layers=stages,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        n_routed_experts=config.num_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        layer_types=["sliding_attention"] * stages,
        mlp_layer_types=["moe"] * stages,
        attn_implementation="eager",
        experts_implementation="eager",
        **{key: target[key] for key in same},
    )


def _initialize(module: nn.Module) -> None:
    """transformers' initialisation of what is no plain linear layer."""
    if isinstance(module, DeepseekV4HyperConnection | DeepseekV4HyperHead):
        for name, value in module.named_parameters(recurse=False):
            if name.endswith("fn"):
                nn.init.normal_(value, std=0.02)
            else:
                nn.init.constant_(value, 1.0 if name.endswith("scale") else 0.0)
    elif isinstance(module, DeepseekV4TopKRouter | DeepseekV4Experts):
        for value in module.parameters(recurse=False):
            nn.init.normal_(value, std=0.02)
    elif isinstance(module, DeepseekV4DecoderLayer):
        nn.init.zeros_(module.self_attn.sinks)
