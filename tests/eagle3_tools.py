"""Tiny random EAGLE-3 drafters, and the plainest cache that can serve one."""

from __future__ import annotations

import math
from typing import Any

import torch

from cluster.models.eagle3 import Attend, Eagle3Config, Eagle3Drafter
from cluster.models.eagle3_config import GEMMA4, LLAMA, QWEN3
from tests.reference_eagle3 import ReferenceEagle3

ARCHITECTURES = (QWEN3, GEMMA4, LLAMA)
VOCAB = 50
WIDTH = 16
NUM_LAYERS = 8


def make_eagle3_config(architecture: str = QWEN3, **changes: Any) -> Eagle3Config:
    """A small drafter of a target of ``NUM_LAYERS`` layers; Llama's knows 20 of 50 tokens."""
    values: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "target_layer_ids": (1, 3, 4),
        "draft_vocab_size": 20 if architecture == LLAMA else VOCAB,
        "num_target_layers": None if architecture == LLAMA else NUM_LAYERS,
    }
    if architecture == GEMMA4:
        values |= {
            "hidden_act": "gelu_pytorch_tanh",
            "attention_k_eq_v": True,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 10000.0,
            },
        }
    return Eagle3Config(**(values | changes))


def make_eagle3(architecture: str = QWEN3, **changes: Any) -> Eagle3Drafter:
    """A random drafter whose every weight matters; reduced vocabularies are spread out."""
    torch.manual_seed(0)
    drafter = Eagle3Drafter(make_eagle3_config(architecture, **changes)).eval()
    drafter.requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.normal_(std=0.3)
    if architecture == GEMMA4:
        drafter.layers[0].layer_scalar.fill_(0.7)
    if drafter.config.has_vocabulary_map:
        size = drafter.config.draft_vocab_size
        drafter.set_draft_token_ids(torch.randperm(VOCAB)[:size].sort().values)
    return drafter


def make_reference(drafter: Eagle3Drafter) -> ReferenceEagle3:
    """The plain network with the same weights, at the start of a sequence."""
    config = drafter.config
    family = {QWEN3: "qwen3", GEMMA4: "gemma4", LLAMA: "llama"}[config.architecture]
    return ReferenceEagle3(
        weights=drafter.state_dict(),
        family=family,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rotated=config.rope_parameters.get("partial_rotary_factor", 1.0),
        cap=config.final_logit_softcapping,
    )


class PlainCache:
    """Keys and values of any number of sequences, by position; a later write replaces an earlier
    one, and a query sees positions up to its own, as in serving."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, owners: torch.Tensor, positions: torch.Tensor) -> Attend:
        """For one pass over entries of sequences ``owners [N]`` at ``positions [N]``."""
        places = list(zip(owners.tolist(), positions.tolist(), strict=True))

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            assert layer == 0
            self._entries |= {place: (key[row], value[row]) for row, place in enumerate(places)}
            return torch.stack([self._one(query[row], *place) for row, place in enumerate(places)])

        return attend

    def _one(self, query: torch.Tensor, owner: int, position: int) -> torch.Tensor:
        seen = [self._entries[owner, past] for past in range(position + 1)]
        groups = len(query) // len(seen[0][0])
        keys = torch.stack([key for key, _ in seen]).repeat_interleave(groups, dim=1)
        values = torch.stack([value for _, value in seen]).repeat_interleave(groups, dim=1)
        scores = torch.einsum("hd,nhd->hn", query, keys) / math.sqrt(query.shape[-1])
        return torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), values)
