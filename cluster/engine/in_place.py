"""Attention over pages where they lie, without gathering them first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.engine.cuda.pass_buffers import PassBuffers
from cluster.engine.step_input import StepInput


@dataclass(frozen=True)
class InPlaceLayers:
    """Where each layer's keys and values are in what ``begin_pass`` was given.

    Attributes:
        index: of the layer's own, or of those that it reads of another layer.
        readers: layers that store nothing.
        on_cuda: whether passes are loaded into buffers.
    """

    index: Mapping[int, int]
    readers: frozenset[int]
    on_cuda: bool = False


def begin_pass(
    step: StepInput,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    buffers: PassBuffers | None = None,
    padded: int | None = None,
) -> None:
    """Tells the kernels what this thread's next pass is.

    Args:
        step: its tokens.
        keys, values: of each layer, ``[num_pages, page_size, kv_heads, x]``.
        buffers: that the pass is loaded into, on a CUDA device.
        padded: tokens that it is computed as there; unset: its own.
    """
    if buffers is not None:
        from cluster.engine.cuda import operators

        buffers.load(step, padded)
        operators.begin_pass(keys, values, buffers)
        return
    starts = np.zeros(len(step.query_lens) + 1, dtype=np.int32)
    np.cumsum(step.query_lens, out=starts[1:])
    torch.ops.dspark_cpu.begin_pass(
        keys,
        values,
        torch.from_numpy(step.slots),
        torch.from_numpy(step.block_tables.astype(np.int32)),
        torch.from_numpy(starts),
        torch.from_numpy(step.context_lens.astype(np.int32)),
    )


def end_pass(buffers: PassBuffers | None = None) -> None:
    """Lets go of what ``begin_pass`` was given, with the same ``buffers``."""
    if buffers is not None:
        from cluster.engine.cuda import operators

        operators.end_pass()
        return
    torch.ops.dspark_cpu.end_pass()


def attend_in_place(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layers: InPlaceLayers,
    scaling: float | None = None,
    window: int | None = None,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """Stores a pass's keys and values, then attends every query to its own sequence's pages.

    Args:
        layer: which one.
        query: ``[N, heads, head_dim]``; ``key``: ``[N, kv_heads, head_dim]``; ``value``:
            ``[N, kv_heads, value_dim]``. Rows behind the pass's tokens come out as zeros.
        layers: of the cache.
        scaling: of scores; unset: 1 / sqrt(head_dim).
        window: tokens that a query sees; unset: all.
        causal: whether a query sees no later tokens of the pass.

    Returns:
        ``[N, heads, value_dim]``.
    """
    operators = torch.ops.dspark_cuda if layers.on_cuda else torch.ops.dspark_cpu
    output: torch.Tensor = operators.attend(
        query,
        key,
        value,
        layers.index[layer],
        layer not in layers.readers,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window or 0,
        causal,
    )
    return output
