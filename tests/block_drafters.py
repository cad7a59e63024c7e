"""Drafters that guess a block at once, as published: configurations at full size and reduced, and
random weights for the reduced ones."""

from __future__ import annotations

from typing import Any

import torch

from cluster.models.checkpoint import build_drafter
from cluster.models.deepseek_v4_config import DeepSeekV4DSparkConfig
from cluster.models.dspark import DSparkDrafter
from cluster.models.dspark_config import DSparkConfig

NUM_STAGES = 3

# deepseek-ai/dspark_qwen3_14b_block7, as its config.json has it.
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 7,
    "bos_token_id": 151643,
    "confidence_head_with_markov": True,
    "dtype": "bfloat16",
    "enable_confidence_head": True,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17408,
    "layer_types": ["full_attention"] * 5,
    "markov_head_type": "vanilla",
    "markov_rank": 256,
    "mask_token_id": 151669,
    "max_position_embeddings": 40960,
    "max_window_layers": 40,
    "model_type": "qwen3",
    "num_anchors": 512,
    "num_attention_heads": 40,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 40,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "sliding_window": None,
    "target_layer_ids": [1, 10, 19, 28, 37],
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# deepseek-ai/dspark_gemma4_12b_block7, as its config.json has it.
GEMMA4: dict[str, Any] = {
    "architectures": ["Gemma4DSparkModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "block_size": 7,
    "bos_token_id": 2,
    "confidence_head_with_markov": True,
    "dtype": "bfloat16",
    "enable_confidence_head": True,
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3840,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 15360,
    "layer_types": ["full_attention"] * 5,
    "markov_head_type": "vanilla",
    "markov_rank": 256,
    "mask_token_id": 4,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_anchors": 512,
    "num_attention_heads": 16,
    "num_experts": None,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_kv_shared_layers": 0,
    "num_target_layers": 48,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        "rope_theta": None,
        "rope_type": "default",
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024,
    "target_layer_ids": [5, 17, 29, 41, 46],
    "target_model_type": "gemma4_unified",
    "target_text_model_type": "gemma4_unified_text",
    "tie_word_embeddings": False,
    "top_k_experts": None,
    "transformers_version": "5.10.2",
    "use_bidirectional_attention": "vision",
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}

# deepseek-ai/DeepSeek-V4-Flash-DSpark: the target's config.json, with its draft module's keys.
DEEPSEEK_V4: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "compress_rope_theta": 160000,
    "dspark_block_size": 5,
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 129280,
}

_REDUCED: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "max_position_embeddings": 64}
_REDUCED_DEEPSPEC: dict[str, Any] = {
    **_REDUCED,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "block_size": 4,
    "target_layer_ids": [-1, 1, 2],
    "num_target_layers": 3,
    "mask_token_id": 7,
    "num_anchors": 3,
    "markov_rank": 5,
}

TINY_QWEN3: dict[str, Any] = {**QWEN3, **_REDUCED_DEEPSPEC}
TINY_GEMMA4: dict[str, Any] = {
    **GEMMA4,
    **_REDUCED_DEEPSPEC,
    "global_head_dim": 8,
    "final_logit_softcapping": 6.0,
}
# Its window is shorter than the tests' contexts.
TINY_DEEPSEEK_V4: dict[str, Any] = {
    **{k: v for k, v in DEEPSEEK_V4.items() if k not in ("quantization_config", "expert_dtype")},
    **_REDUCED,
    "compress_ratios": [0, 4, 128, 0, 0, 0],
    "dspark_block_size": 4,
    "dspark_markov_rank": 5,
    "dspark_noise_token_id": 7,
    "dspark_target_layer_ids": [0, 1, 2],
    "hc_mult": 3,
    "head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 5,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "o_groups": 2,
    "o_lora_rank": 6,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "sliding_window": 5,
    "swiglu_limit": 1.0,
}


def read_config(data: dict[str, Any]) -> DSparkConfig:
    """What the loader makes of a published configuration."""
    if "dspark_block_size" in data:
        return DeepSeekV4DSparkConfig.from_target(data, NUM_STAGES)
    return DSparkConfig.from_dict(data)


def make_drafter(data: dict[str, Any], **changes: Any) -> DSparkDrafter:
    """A drafter whose every weight is random and matters; the same one each time."""
    drafter = build_drafter(read_config({**data, **changes})).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for value in drafter.state_dict(keep_vars=True).values():
        value.data.normal_(std=0.3, generator=generator)
    return drafter
