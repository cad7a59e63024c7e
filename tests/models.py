"""Models for tests: tiny random ones made on the spot, and the project's own trained pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from cluster.models.checkpoint import build_drafter, save_drafter
from cluster.models.dspark_config import DSparkConfig
from cluster.models.eagle3 import Eagle3Config, Eagle3Drafter
from cluster.models.eagle3_checkpoint import save_eagle3

MODELS = Path(__file__).parents[1] / "deployments" / "models"
TARGET = str(MODELS / "stdlib-7m")
DRAFTER = str(MODELS / "stdlib-7m-dspark")
PROFILE = MODELS.parent / "profiles" / "h100-8b-tp1.yaml"  # of a device, to pace them by


def save_tiny_target(folder: Path, *, seed: int = 0, scale: float = 1.0, **overrides: Any) -> str:
    """A random Qwen3 with a law that depends on what came before; returns its folder.

    ``scale`` multiplies the output head, so that the next-token law is less flat.
    """
    torch.manual_seed(seed)
    values = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **overrides,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**values))
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    model.save_pretrained(folder)
    return str(folder)


def save_tiny_drafter(folder: Path, target: str, *, seed: int = 1, **overrides: Any) -> str:
    """A random DSpark drafter for a target saved by ``save_tiny_target``; returns its folder."""
    torch.manual_seed(seed)
    target_config = Qwen3Config.from_pretrained(target)
    layers = target_config.num_hidden_layers
    values = {
        **target_config.to_dict(),
        "architectures": ["Qwen3DSparkModel"],
        "num_hidden_layers": 1,
        "num_target_layers": layers,
        "layer_types": ["full_attention"],
        "block_size": 4,
        "target_layer_ids": [-1, 0, layers - 1],
        "mask_token_id": 0,
        "num_anchors": 8,
        "markov_rank": 4,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "tie_word_embeddings": False,
        **overrides,
    }
    drafter = build_drafter(DSparkConfig.from_dict(values))
    embedding = Qwen3ForCausalLM.from_pretrained(target)
    with torch.no_grad():
        drafter.embed_tokens.weight.copy_(embedding.model.embed_tokens.weight)
        drafter.lm_head.weight.copy_(embedding.lm_head.weight)
    save_drafter(drafter, folder, dtype=torch.float32)
    return str(folder)


def save_tiny_eagle3(folder: Path, target: str, *, seed: int = 1, **overrides: Any) -> str:
    """A random EAGLE-3 drafter for a target saved by ``save_tiny_target``; returns its folder."""
    torch.manual_seed(seed)
    target_config = Qwen3Config.from_pretrained(target)
    layers = target_config.num_hidden_layers
    values = {
        **target_config.to_dict(),
        "architectures": ["Qwen3Eagle3Model"],
        "num_hidden_layers": 1,
        "num_target_layers": layers,
        "layer_types": ["full_attention"],
        "target_layer_ids": [0, layers // 2, layers - 1],
        **overrides,
    }
    drafter = Eagle3Drafter(Eagle3Config.from_dict(values))
    model = Qwen3ForCausalLM.from_pretrained(target)
    with torch.no_grad():
        drafter.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
        drafter.lm_head.weight.copy_(model.lm_head.weight)
    save_eagle3(drafter, folder, dtype=torch.float32)
    return str(folder)
