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
        self._decoder = decoder
        self._head = model.get_output_embeddings()
        config = model.config.get_text_config()
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
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
        return self._take_features(output.logits), output.logits

    @torch.no_grad()
    def run_hidden(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``run``, without logits.

        Returns:
            ``(features [B, L, len(layer_ids) * d], hidden [B, L, d])``, ``hidden`` being what
            ``logits`` takes.
        """
        hidden = self._decoder(input_ids=token_ids, use_cache=False).last_hidden_state
        return self._take_features(hidden), hidden

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[*, d]``, behind the final norm, to ``[*, V]``."""
        logits = self._head(hidden)
        if self._soft_cap is None:
            return logits
        return torch.tanh(logits / self._soft_cap) * self._soft_cap

    def _take_features(self, like: torch.Tensor) -> torch.Tensor:
        if not self._layer_ids:
            return like.new_empty(*like.shape[:-1], 0)
        features = torch.cat([self._captured[layer_id] for layer_id in self._layer_ids], dim=-1)
        self._captured.clear()
        return features

    def _hook(self, layer_id: int) -> Callable[..., None]:
        def capture(module: torch.nn.Module, inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            assert isinstance(tensor, torch.Tensor)
            self._captured[layer_id] = tensor

        return capture
