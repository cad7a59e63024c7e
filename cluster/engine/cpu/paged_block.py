"""Blocks of a drafter over pages where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface

from cluster.engine.cpu.graph import compile_graph, try_to_compile
from cluster.engine.cpu.in_place import InPlaceLayers, attend_in_place, begin_pass, end_pass
from cluster.engine.cpu.packed_linear import pack_linears
from cluster.engine.step_input import StepInput
from cluster.models.dspark import DSparkDrafter

BLOCK_ATTENTION_NAME = "dspark_paged_block"


class PagedBlocks:
    """Runs the backbone of a drafter whose contexts lie in pages.

    A block's own keys and values are put behind its context, into pages that the session has for
    it, and the next write of context takes their place.

    Args:
        drafter: without a window; its linear layers are packed here.
        keys, values: of each layer, ``[num_pages, page_size, heads, dim]``.
        compiles: whether the layers are compiled into one graph, where they can be.
    """

    def __init__(
        self,
        drafter: DSparkDrafter,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        *,
        compiles: bool,
    ) -> None:
        pack_linears(drafter)
        drafter.attend_by(BLOCK_ATTENTION_NAME)
        self._drafter = drafter
        self._size = drafter.config.block_size
        self._keys, self._values = keys, values
        layers = InPlaceLayers({index: index for index in range(len(keys))}, frozenset())

        def run(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return drafter.flat_block_hidden(token_ids, positions, paged=layers)

        self._run: Any = run
        if compiles and self._size > 1:  # compilers take a length of 1 for a constant
            example = torch.zeros(2 * self._size, dtype=torch.int64)
            examples = (example, torch.zeros_like(example))
            self._run = try_to_compile("drafter", lambda: compile_graph(run, examples)) or run

    def hidden(
        self,
        anchors: torch.Tensor,
        lengths: npt.NDArray[np.int64],
        page_table: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """The backbone's output for B sessions.

        Args:
            anchors: ``[B]`` int64, the last committed tokens.
            lengths: ``[B]`` positions of context, which is the anchor's own position.
            page_table: ``[B, P]``, pages of the context and of the block behind it.

        Returns:
            ``[B, block_size, d]``.
        """
        positions = lengths[:, None] + np.arange(self._size)
        page_size = self._keys[0].shape[1]
        pages = np.take_along_axis(page_table, positions // page_size, axis=1)
        flat = positions.reshape(-1)
        begin_pass(
            StepInput(
                token_ids=flat,  # attention needs none
                positions=flat,
                slots=(pages * page_size + positions % page_size).reshape(-1),
                query_lens=np.full(len(lengths), self._size),
                context_lens=lengths + self._size,
                block_tables=page_table,
                logit_rows=flat[:0],
            ),
            self._keys,
            self._values,
        )
        try:
            token_ids = self._drafter.block_tokens(anchors).reshape(-1)
            hidden: torch.Tensor = self._run(token_ids, torch.from_numpy(flat))
        finally:
            end_pass()
        return hidden.unflatten(0, (len(lengths), self._size))


def paged_block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    paged: InPlaceLayers,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Every slot of a block attends to its session's context and to the whole block.

    Args:
        query: ``[1, heads, N, head_dim]``; ``key``, ``value``: ``[1, kv_heads, N, x]``.
        paged: the drafter's layers.

    Returns:
        ``[1, N, heads, value_dim]`` and ``None`` (no weights).
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = attend_in_place(layer, query, key, value, paged, scaling, causal=False)
    return output.unsqueeze(0), None


AttentionInterface.register(BLOCK_ATTENTION_NAME, paged_block_attention)
