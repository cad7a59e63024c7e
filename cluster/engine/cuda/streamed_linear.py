"""Linear layers whose weights are streamed through the multiprocessors for few rows."""

from __future__ import annotations

import torch
from torch import nn

from cluster.engine.cuda import operators


class StreamedLinear(nn.Module):
    """Computes what the ``nn.Linear`` computes that it is made of, with the same parameters."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, of the weight's dtype."""
        output: torch.Tensor = torch.ops.dspark_cuda.linear(
            input, self.weight, self.bias, self.out_features
        )
        return output


def streamed(linear: nn.Module) -> nn.Module:
    """The layer as a ``StreamedLinear``, hooks included; itself where its weights do not fit."""
    if type(linear) is not nn.Linear or not operators.can_stream(linear.weight):
        return linear
    new = StreamedLinear(linear)
    for hook in linear._forward_hooks.values():
        new.register_forward_hook(hook)
    return new
