"""A target's context features and logits in one pass, for training and evaluating drafters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import Cache, PreTrainedModel


class FeatureTarget:
    """A frozen target that also gives its residual stream after chosen layers.

    Features are taken before the final norm, which ``output_hidden_states`` does not give for
    the last layer.
    """

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int]) -> None:
        """``layer_ids``: 0-based layers; -1 is the embedding."""
        self._model = model.eval().requires_grad_(False)
        self._captured: dict[int, torch.Tensor] = {}
        self._layer_ids = tuple(layer_ids)
        decoder = model.get_decoder()
        for layer_id in self._layer_ids:
            module = decoder.embed_tokens if layer_id == -1 else decoder.layers[layer_id]
            module.register_forward_hook(self._hook(layer_id))

    @property
    def model(self) -> PreTrainedModel:
        """The target itself."""
        return self._model

    @torch.no_grad()
    def run(
        self, token_ids: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over int64 ``[B, L]`` tokens, after those in ``cache``, which is extended.

        Returns:
            ``(features [B, L, len(layer_ids) * d], logits [B, L, V])``.
        """
        output = self._model(
            input_ids=token_ids, past_key_values=cache, use_cache=cache is not None
        )
        features = torch.cat([self._captured[layer_id] for layer_id in self._layer_ids], dim=-1)
        self._captured.clear()
        return features, output.logits

    def _hook(self, layer_id: int) -> Callable[..., None]:
        def capture(module: torch.nn.Module, inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            assert isinstance(tensor, torch.Tensor)
            self._captured[layer_id] = tensor

        return capture
