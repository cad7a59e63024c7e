"""Targets of every served architecture, at a size that costs a second, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    Gemma4Config,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.test_text import small_tokenizer

VOCAB_SIZE = 80
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA4: dict[str, Any] = {
    **SMALL,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "final_logit_softcapping": 5.0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK_V4: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
    **EXPERTS,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
    "num_hash_layers": 1,
    "n_routed_experts": 4,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    # With few heads the indexer's ReLU makes scores exactly 0, and ties have no right answer.
    "index_n_heads": 24,
    "index_head_dim": 8,
    "index_topk": 3,
    "sliding_window": 8,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 4,
}
TARGETS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "llama": LlamaConfig(**SMALL),
    "gemma4": Gemma4TextConfig(
        **{**GEMMA4, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
    ),
    "gemma4-shared-keys": Gemma4TextConfig(
        **{
            **GEMMA4,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 3,
            "hidden_size_per_layer_input": 8,
            "use_double_wide_mlp": True,
        }
    ),
    "gemma4-experts": Gemma4TextConfig(
        **{
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        }
    ),
    "deepseek-v3": DeepseekV3Config(
        **{
            **SMALL,
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 12,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        }
    ),
    "deepseek-v4": DeepseekV4Config(**DEEPSEEK_V4),
}
OTHERS: dict[str, PretrainedConfig] = {
    "llama-with-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "mistral-sliding-window": MistralConfig(**SMALL, sliding_window=12),
    "gemma4-with-vision": Gemma4Config(
        text_config={**GEMMA4, "num_global_key_value_heads": 2, "pad_token_id": 0},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
    ),
}
# What a new model sets to nothing or to one, so that leaving it out would not be seen.
_SMALL_WEIGHTS = ("bias", "sinks", "position_bias", "base", "e_score_correction_bias")


def save_target(config: PretrainedConfig, folder: Path) -> str:
    """A random model of this configuration, with a tokenizer; returns its folder."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(_SMALL_WEIGHTS):
                tensor.normal_(std=0.2)
            elif name.endswith(("layer_scalar", "per_expert_scale")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("tid2eid"):
                experts = model.config.n_routed_experts
                tensor.copy_(torch.rand(len(tensor), experts).argsort()[:, : tensor.shape[1]])
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)
