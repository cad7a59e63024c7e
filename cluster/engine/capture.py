"""Catches the hidden states that a drafter reads of its target, and projects them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cluster.engine.kernels import packed
from cluster.errors import ConfigError
from cluster.models.checkpoint import Projection


class FeatureCapture:
    """Forward hooks on one stage's target layers, and each layer's share of the projection.

    Between ``attach`` and ``detach``, which are not to be called while a pass runs.

    Layer i is the residual stream after layer i, with whatever the layer itself scales it by; -1
    is the embedding, as the first layer gets it. Of several residual streams (hyper-connections)
    it is their mean.

    Args:
        projection: of the drafter.
        decoder: the text decoder, with this stage's layers only.
        layers: which layers these are.
        num_layers: of the whole model.
        embeds: whether this stage is the one that embeds tokens.
        packs: whether the projection's weights are packed, where they can be.

    Raises:
        ConfigError: the drafter reads a layer that the target does not have.
    """

    def __init__(
        self,
        projection: Projection,
        decoder: Any,
        *,
        layers: range,
        num_layers: int,
        embeds: bool,
        packs: bool = False,
    ) -> None:
        self._captured: dict[int, torch.Tensor] = {}
        self._modules: list[tuple[int, nn.Module]] = []
        weights: list[torch.Tensor] = []
        self._hooks: list[RemovableHandle] = []
        hidden_size = projection.weight.shape[1] // len(projection.target_layer_ids)
        like = decoder.embed_tokens.weight
        for index, layer_id in enumerate(projection.target_layer_ids):
            if not -1 <= layer_id < num_layers:
                raise ConfigError(
                    "speculative.model",
                    f"its target_layer_ids has {layer_id}, the target has {num_layers} layers",
                )
            if layer_id == -1 and embeds:
                module = decoder.embed_tokens
            elif layer_id in layers:
                module = decoder.layers[layer_id - layers.start]
            else:
                continue
            self._modules.append((layer_id, module))
            columns = slice(index * hidden_size, (index + 1) * hidden_size)
            weights.append(projection.weight[:, columns])
        self._project: nn.Module | None = None
        if weights:
            linear = nn.Linear(
                len(weights) * hidden_size, len(projection.weight), bias=False, device="meta"
            )
            weight = torch.cat(weights, dim=1).to(like.device, like.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self._project = packed(linear, like.device) if packs else linear

    def attach(self) -> None:
        """Begins to catch what passes through the layers."""
        self._hooks = [
            module.register_forward_hook(self._hook(layer_id)) for layer_id, module in self._modules
        ]

    def detach(self) -> None:
        """Catches nothing more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def forget(self) -> None:
        """Lets go of what was caught, if anything is left."""
        self._captured.clear()

    def take(self) -> list[torch.Tensor]:
        """What the last pass's layers put out, ``[N, hidden_size]`` each; forgotten here."""
        return [self._captured.pop(layer_id) for layer_id, _ in self._modules]

    def project(self, caught: list[torch.Tensor]) -> torch.Tensor | None:
        """This stage's part of a pass's features.

        Args:
            caught: what ``take`` gave of it.

        Returns:
            ``[N, d]`` float32; ``None`` when the drafter reads none of this stage's layers.
        """
        if self._project is None:
            return None
        features: torch.Tensor = self._project(torch.cat(caught, dim=1))
        return features.float()

    def _hook(self, layer_id: int) -> Any:
        def capture(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output)[0]
            streams = hidden.dim() == 3
            self._captured[layer_id] = hidden.mean(dim=1) if streams else hidden

        return capture
