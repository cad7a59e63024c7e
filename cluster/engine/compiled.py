"""A stage's layers as one graph, compiled when the engine starts."""

from __future__ import annotations

from typing import Any

import torch

from cluster.engine.capture import FeatureCapture
from cluster.engine.graph import EXAMPLE_TOKENS, compile_graph
from cluster.engine.in_place import InPlaceLayers

# A pass of one token is computed as one of two: compilers take a size of 1 for a constant.
MIN_TOKENS = 2


class CompiledLayers:
    """Runs the layers of one stage over a pass, whatever its size; the cache must have begun it.

    What lies between linear layers and attention is fused, and no Python of the model runs any
    more. Weights, and what is projected for a drafter, are those of the moment it is made. On a
    CUDA device the pass that is current when it is made must be one of ``EXAMPLE_TOKENS`` tokens.

    Args:
        decoder: with this stage's layers only.
        capture: what catches and projects hidden states, not attached; ``None``: nothing does.
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
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if capture is not None:
                capture.forget()
            output = decoder(
                **{input_name: inputs.unsqueeze(0)},
                position_ids=positions.unsqueeze(0),
                paged=layers,
                use_cache=False,
            )
            features = capture.project(capture.take()) if capture is not None else None
            return output.last_hidden_state[0], features

        weight = decoder.embed_tokens.weight
        # Passes are loaded into buffers of int32 on a CUDA device.
        integer = torch.int64 if weight.device.type == "cpu" else torch.int32
        positions = torch.arange(EXAMPLE_TOKENS, device=weight.device, dtype=integer)
        inputs = torch.zeros_like(positions)
        if not embeds:
            inputs = weight.new_zeros(EXAMPLE_TOKENS, weight.shape[1])
        if capture is not None:
            capture.attach()
        try:
            self._run = compile_graph(run, (inputs, positions))
        finally:
            if capture is not None:
                capture.detach()

    def __call__(
        self, inputs: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes a pass.

        Args:
            inputs: ``[N]`` token ids, or ``[N, hidden_size]`` of the stage before.
            positions: ``[N]``, of the tokens; both int64 on the CPU, int32 on a CUDA device.

        Returns:
            ``[N, hidden_size]``, and this stage's part of the features, ``[N, d]`` float32.
        """
        num_tokens = len(inputs)
        if num_tokens >= MIN_TOKENS:
            hidden, features = self._run(inputs, positions)
            return hidden, features
        filler = inputs.new_zeros(MIN_TOKENS - num_tokens, *inputs.shape[1:])
        positions = torch.cat([positions, positions.new_zeros(len(filler))])
        hidden, features = self._run(torch.cat([inputs, filler]), positions)
        return hidden[:num_tokens], None if features is None else features[:num_tokens]
