"""A random target of a few thousand weights, and its configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from cluster.bench.fuzz_surfaces import BLOCK_SIZE
from cluster.config import ClusterConfig


def save_tiny_target(folder: Path, *, vocab_size: int) -> None:
    """Writes its checkpoint; outputs depend on all that came before."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def fuzz_config(folder: str, *, trust_drafter: bool | None = None) -> ClusterConfig:
    """All that drafters propose is verified.

    Args:
        folder: of the target.
        trust_drafter: unset: without speculation.
    """
    document: dict[str, object] = {
        "target": {
            "model": folder,
            "dtype": "float32",
            "num_threads": 1,
            "enforce_eager": True,
            "kv_cache_memory_mb": 16,
        }
    }
    if trust_drafter is not None:
        document["speculative"] = {
            "method": "ngram",
            "num_speculative_tokens": BLOCK_SIZE,
            "draft_timeout_ms": 100,
            "trust_drafter": trust_drafter,
            "scheduler": "full",
            "switching": "always",
            "grouping": "off",
        }
    return ClusterConfig.parse(document)
