"""A stage's layers as one graph, compiled when the engine starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cluster.engine.capture import FeatureCapture
from cluster.engine.cpu.graph import compile_graph
from cluster.engine.cpu.in_place import InPlaceLayers

# A pass of one token is computed as one of two: compilers take a size of 1 for a constant.
_MIN_TOKENS = 2
_EXAMPLE_TOKENS = 6


class CompiledLayers:
    """Runs the layers of one stage over a pass, whatever its size; the cache must have begun it.

    What lies between linear layers and attention is fused, and no Python of the model runs any
    more. Weights, and the hidden states that are caught, are those of the moment it is made.

    Args:
        decoder: with this stage's layers only.
        capture: what catches hidden states, not attached; ``None`` where nothing does.
        layers: of the cache.
        embeds: whether the stage begins with tokens, and not with another stage's hidden states.

    Raises:
        RuntimeError: the model cannot be compiled (what compilers raise otherwise is not known).
    """

    def __init__(
        self,
        decoder: Any,
        capture: FeatureCapture | None,
        layers: InPlaceLayers,
        *,
        embeds: bool,
    ) -> None:
        input_name = "input_ids" if embeds else "inputs_embeds"

        def run(
            inputs: torch.Tensor, positions: torch.Tensor
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            if capture is not None:
                capture.forget()
            output = decoder(
                **{input_name: inputs.unsqueeze(0)},
                position_ids=positions.unsqueeze(0),
                paged=layers,
                use_cache=False,
            )
            return output.last_hidden_state[0], capture.take() if capture is not None else []

        positions = torch.arange(_EXAMPLE_TOKENS)
        inputs = torch.zeros_like(positions)
        if not embeds:
            weight = decoder.embed_tokens.weight
            inputs = weight.new_zeros(_EXAMPLE_TOKENS, weight.shape[1])
        if capture is not None:
            capture.attach()
        try:
            self._run = compile_graph(run, (inputs, positions))
        finally:
            if capture is not None:
                capture.detach()

    def __call__(
        self, inputs: torch.Tensor, positions: np.ndarray
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Computes a pass.

        Args:
            inputs: ``[N]`` int64 token ids, or ``[N, hidden_size]`` of the stage before.
            positions: ``[N]`` int64, of the tokens.

        Returns:
            ``[N, hidden_size]``, and what was caught, ``[N, hidden_size]`` each.
        """
        num_tokens, places = len(inputs), torch.from_numpy(positions)
        if num_tokens >= _MIN_TOKENS:
            hidden, caught = self._run(inputs, places)
            return hidden, caught
        filler = inputs.new_zeros(_MIN_TOKENS - num_tokens, *inputs.shape[1:])
        places = torch.cat([places, places.new_zeros(len(filler))])
        hidden, caught = self._run(torch.cat([inputs, filler]), places)
        return hidden[:num_tokens], [part[:num_tokens] for part in caught]
