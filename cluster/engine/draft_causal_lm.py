"""A causal language model as a drafter, its attention paged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from cluster.engine.attention import ATTENTION_NAME, PagedBatch
from cluster.engine.in_place import InPlaceLayers
from cluster.engine.layout import key_sources
from cluster.engine.target_model import load_model


class CausalLMNetwork:
    """An ``EntryNetwork`` on a transformers model that was loaded with paged attention.

    Its entries are tokens; features are ignored.

    Args:
        model: in evaluation mode, on its device.
    """

    runs_anchor = True
    feature_size = 0

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size: int = config.vocab_size
        self.max_position_embeddings: int = config.max_position_embeddings
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.num_layers: int = config.num_hidden_layers
        self.key_sources: Mapping[int, int] = key_sources(config.to_dict())
        self._base = model.get_decoder()
        self._head = model.get_output_embeddings()

    def forward(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        paged: PagedBatch | InPlaceLayers,
    ) -> torch.Tensor:
        """See ``EntryNetwork``."""
        output = self._base(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, paged=paged
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See ``EntryNetwork``."""
        logits: torch.Tensor = self._head(hidden).float()
        if self._soft_cap:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits


def load_causal_lm(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Loads a language model for paged attention: eval mode, no gradients.

    Raises:
        CheckpointError: it cannot be loaded, or lacks a weight.
    """
    model: PreTrainedModel = load_model(path, dtype, ATTENTION_NAME).to(device).eval()
    return model
