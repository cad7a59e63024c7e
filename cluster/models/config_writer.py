"""The keys of ``config.json`` that DSpark and EAGLE-3 drafters write alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class DrafterNetwork(Protocol):
    """What both drafters' configurations say about their layers; names are Qwen3's."""

    @property
    def architecture(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def rms_norm_eps(self) -> float: ...

    @property
    def attention_bias(self) -> bool: ...

    @property
    def hidden_act(self) -> str: ...

    @property
    def rope_parameters(self) -> Mapping[str, Any]: ...

    @property
    def attention_k_eq_v(self) -> bool: ...

    @property
    def final_logit_softcapping(self) -> float | None: ...


def network_keys(network: DrafterNetwork) -> dict[str, Any]:
    """Sizes and what else every architecture calls the same."""
    return {
        "architectures": [network.architecture],
        "vocab_size": network.vocab_size,
        "hidden_size": network.hidden_size,
        "intermediate_size": network.intermediate_size,
        "num_hidden_layers": network.num_hidden_layers,
        "num_attention_heads": network.num_attention_heads,
        "num_key_value_heads": network.num_key_value_heads,
        "head_dim": network.head_dim,
        "max_position_embeddings": network.max_position_embeddings,
        "rms_norm_eps": network.rms_norm_eps,
        "attention_bias": network.attention_bias,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def qwen3_keys(network: DrafterNetwork) -> dict[str, Any]:
    """What Qwen3 calls by names of its own."""
    return {
        "model_type": "qwen3",
        "hidden_act": network.hidden_act,
        "rope_parameters": dict(network.rope_parameters),
    }


def gemma4_keys(network: DrafterNetwork) -> dict[str, Any]:
    """What Gemma 4 calls by names of its own; a drafter's layers are its global ones."""
    return {
        "model_type": "gemma4_text",
        "hidden_activation": network.hidden_act,
        "global_head_dim": network.head_dim,
        "num_global_key_value_heads": network.num_key_value_heads,
        "attention_k_eq_v": network.attention_k_eq_v,
        "final_logit_softcapping": network.final_logit_softcapping,
        "rope_parameters": {"full_attention": dict(network.rope_parameters)},
    }
