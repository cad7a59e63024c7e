"""EAGLE-3's entries over paged keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from cluster.engine.attention import PagedBatch, paged_attention
from cluster.engine.in_place import InPlaceLayers
from cluster.models.eagle3 import Eagle3Drafter


class Eagle3Network:
    """An ``EntryNetwork`` on an EAGLE-3 drafter, which is in evaluation mode on its device."""

    runs_anchor = False

    def __init__(self, drafter: Eagle3Drafter) -> None:
        parameter = next(drafter.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.vocab_size = drafter.config.vocab_size
        self.feature_size = drafter.config.hidden_size
        self.max_position_embeddings = drafter.config.max_position_embeddings
        self.num_layers = drafter.config.num_hidden_layers
        self.key_sources: Mapping[int, int] = {}
        self._drafter = drafter

    def forward(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        paged: PagedBatch | InPlaceLayers,
    ) -> torch.Tensor:
        """See ``EntryNetwork``; the output may take the features' place."""

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            module: Any = SimpleNamespace(layer_idx=layer)
            query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
            attended, _ = paged_attention(module, query, key, value, None, paged=paged)
            return attended[0]

        return self._drafter(features, token_ids, positions, attend)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See ``EntryNetwork``; ``-inf`` for tokens that the drafter does not know."""
        return self._drafter.logits(hidden)
