"""Products of few rows with large weights, in Triton: bound by how fast weights are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_ROWS = 64
MAX_WEIGHTS = 3  # side by side: queries, keys and values
_MIN_COLUMNS = 6144
_MIN_ROWS = 16  # of a matrix product's tile
_INNER_MULTIPLE = 128
_WIDE = 16384


class Launch(NamedTuple):
    """How a product is launched: sizes of a program's tile, and what it runs with."""

    columns: int
    inner: int
    num_warps: int
    num_stages: int


def can_stream(weight: torch.Tensor) -> bool:
    """Whether rows can be streamed through this weight, ``[N, K]``."""
    return weight.dim() == 2 and weight.is_contiguous() and weight.shape[1] % _INNER_MULTIPLE == 0


def pays(num_columns: int) -> bool:
    """Whether this is faster than cuBLAS: it is where columns alone make enough programs.

    Measured on an H200 (docs/engine.md): 1.6 times as fast with 6,144 columns in three weights,
    1.13 with 24,576 in two; 0.97 and 0.9 with 4,096.
    """
    return num_columns >= _MIN_COLUMNS


def products(
    rows: torch.Tensor, weights: list[torch.Tensor], launch: Launch | None = None
) -> list[torch.Tensor]:
    """Every row's products with each weight, summed in fp32.

    Args:
        rows: ``[M, K]``, M at most ``MAX_ROWS``; contiguous.
        weights: up to ``MAX_WEIGHTS``, ``[N_i, K]`` each, of the rows' dtype.
        launch: unset: the best one known.

    Returns:
        ``[M, N_i]`` each.
    """
    num_rows, inner = rows.shape
    outputs = [rows.new_empty(num_rows, len(weight)) for weight in weights]
    sizes = [len(weight) for weight in weights]
    launch = launch or best_launch(sum(sizes))
    spare = MAX_WEIGHTS - len(weights)
    blocks = sum(triton.cdiv(size, launch.columns) for size in sizes)
    _products[(blocks,)](
        rows,
        *weights,
        *weights[:1] * spare,
        *outputs,
        *outputs[:1] * spare,
        num_rows,
        *sizes,
        *[0] * spare,
        INNER=inner,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(num_rows)),
        COLUMNS=launch.columns,
        INNER_BLOCK=launch.inner,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return outputs


def best_launch(num_columns: int) -> Launch:
    """What was fastest on an H200 (docs/engine.md) for a product of this size."""
    columns = 32 if num_columns < _WIDE else 64
    return Launch(columns=columns, inner=_INNER_MULTIPLE, num_warps=4, num_stages=4)


@triton.jit
def _products(
    rows,
    first,
    second,
    third,
    first_output,
    second_output,
    third_output,
    num_rows,
    first_size,
    second_size,
    third_size,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER_BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    weight = first
    output = first_output
    size = first_size
    if block >= tl.cdiv(first_size, COLUMNS):
        block -= tl.cdiv(first_size, COLUMNS)
        weight = second
        output = second_output
        size = second_size
        if block >= tl.cdiv(second_size, COLUMNS):
            block -= tl.cdiv(second_size, COLUMNS)
            weight = third
            output = third_output
            size = third_size
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < size
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    inner = tl.arange(0, INNER_BLOCK)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, INNER_BLOCK):
        x = tl.load(
            rows + row[:, None] * INNER + (start + inner)[None, :], mask=is_row[:, None], other=0.0
        )
        w = tl.load(
            weight + column[None, :].to(tl.int64) * INNER + (start + inner)[:, None],
            mask=is_column[None, :],
            other=0.0,
        )
        sums = tl.dot(x, w, sums)
    tl.store(
        output + row[:, None] * size + column[None, :],
        sums.to(output.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )
