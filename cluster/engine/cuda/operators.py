"""The kernels of this folder as operators, ``torch.ops.dspark_cuda``, named as the CPU's are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from cluster.engine.cuda import paged_attention, stream_rows
from cluster.engine.cuda.pass_buffers import PassBuffers
from cluster.engine.operator_shapes import SHAPES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STREAMED_DTYPES = (torch.bfloat16, torch.float16)


class _Pass(NamedTuple):
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    buffers: PassBuffers


class _Current(threading.local):
    """The pass that this thread's layers belong to."""

    value: _Pass | None = None


_current = _Current()


def begin_pass(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], buffers: PassBuffers
) -> None:
    """Tells this thread's operators where keys, values and the pass are."""
    _current.value = _Pass(keys, values, buffers)


def end_pass() -> None:
    """Lets go of what ``begin_pass`` was given."""
    _current.value = None


def can_stream(weight: torch.Tensor) -> bool:
    """Whether ``linear`` has a kernel of its own for few rows and this weight ``[N, K]``."""
    return weight.dtype in _STREAMED_DTYPES and stream_rows.can_stream(weight)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    stores: bool,
    scale: float,
    window: int,
    causal: bool,
) -> torch.Tensor:
    current = _current.value
    if current is None:
        raise RuntimeError("attend outside a pass")
    keys, values, buffers = current.keys[layer], current.values[layer], current.buffers
    if stores:
        paged_attention.store(key, value, keys, values, buffers)
    return paged_attention.attend(
        query, keys, values, buffers, scale=scale, window=window, causal=causal
    )


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, _outputs: int
) -> torch.Tensor:
    rows = input.flatten(0, -2)
    is_few = len(rows) <= stream_rows.MAX_ROWS and stream_rows.pays(len(weight))
    if not is_few or bias is not None:
        return functional.linear(input, weight, bias)
    return stream_rows.products(rows.contiguous(), [weight])[0].view(*input.shape[:-1], len(weight))


def _linears(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    outputs: Sequence[int],
) -> list[torch.Tensor]:
    rows = input.flatten(0, -2)
    is_few = len(rows) <= stream_rows.MAX_ROWS and stream_rows.pays(sum(outputs))
    fits = len(weights) <= stream_rows.MAX_WEIGHTS and all(bias is None for bias in biases)
    if not (is_few and fits):
        parts = zip(weights, biases, outputs, strict=True)
        return [_linear(input, weight, bias, size) for weight, bias, size in parts]
    products = stream_rows.products(rows.contiguous(), list(weights))
    return [product.view(*input.shape[:-1], product.shape[1]) for product in products]


_library = torch.library.Library("dspark_cuda", "DEF")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, int layer, bool stores, float scale,"
    " int window, bool causal) -> Tensor"
)
_library.define("linear(Tensor input, Tensor weight, Tensor? bias, int outputs) -> Tensor")
_library.define(
    "linears(Tensor input, Tensor[] weights, Tensor?[] biases, int[] outputs) -> Tensor[]"
)
# On any device, so that Triton's interpreter can test them where there is no CUDA.
for _name, _function in (("attend", _attend), ("linear", _linear), ("linears", _linears)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dspark_cuda::{_name}", SHAPES[_name], lib=_library)
