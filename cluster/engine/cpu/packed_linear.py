"""Linear layers with weights laid out as the processor reads them."""

from __future__ import annotations

import torch
from torch import nn

from cluster.engine.cpu.kernels import can_pack


class PackedLinear(nn.Module):
    """Computes what the ``nn.Linear`` computes that it is made of, summed in fp32.

    A row's result does not depend on the rows beside it.
    """

    packed: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("packed", torch.ops.dspark_cpu.pack(weight), persistent=False)
        bias = None
        if linear.bias is not None:
            blocks, _, block, *_ = self.packed.shape
            bias = torch.zeros(blocks * block)
            bias[: self.out_features] = linear.bias.detach()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, of the weight's dtype."""
        output: torch.Tensor = torch.ops.dspark_cpu.linear(
            input, self.packed, self.bias, self.out_features
        )
        return output


def packed(linear: nn.Module) -> nn.Module:
    """The layer with packed weights, hooks included; itself where it cannot be packed."""
    if type(linear) is not nn.Linear or linear.weight.device.type != "cpu":
        return linear
    dtype = linear.weight.dtype
    if not can_pack(dtype) or (dtype == torch.bfloat16 and linear.in_features % 2):
        return linear
    new = PackedLinear(linear)
    for hook in linear._forward_hooks.values():
        new.register_forward_hook(hook)
    return new
