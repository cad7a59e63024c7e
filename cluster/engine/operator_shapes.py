"""Shapes of what our operators return, the same for every device; compilers ask for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def _attend_shape(
    query: torch.Tensor,
    _key: torch.Tensor,
    value: torch.Tensor,
    _layer: int,
    _stores: bool,
    _scale: float,
    _window: int,
    _causal: bool,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _linear_shape(
    input: torch.Tensor, _weight: torch.Tensor, _bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], outputs)


def _linear_shapes(
    input: torch.Tensor,
    _weights: Sequence[torch.Tensor],
    _biases: Sequence[torch.Tensor | None],
    outputs: Sequence[int],
) -> list[torch.Tensor]:
    return [input.new_empty(*input.shape[:-1], size) for size in outputs]


SHAPES: Mapping[str, Callable[..., Any]] = {
    "attend": _attend_shape,
    "linear": _linear_shape,
    "linears": _linear_shapes,
}
