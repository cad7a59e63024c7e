"""Blocks of a drafter over pages where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface

from cluster.engine.cuda.graphs import Graphs
from cluster.engine.cuda.pass_buffers import PassBuffers
from cluster.engine.graph import EXAMPLE_TOKENS, compile_graph, try_to_compile
from cluster.engine.in_place import InPlaceLayers, attend_in_place, begin_pass, end_pass
from cluster.engine.kernels import pack_linears
from cluster.engine.step_input import StepInput
from cluster.models.dspark import DSparkDrafter

BLOCK_ATTENTION_NAME = "dspark_paged_block"
_GRAPHED_SESSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class PagedBlocks:
    """Runs the backbone of a drafter whose contexts lie in pages.

    A block's own keys and values are put behind its context, into pages that the session has for
    it, and the next write of context takes their place.

    Args:
        drafter: without a window; its linear layers are packed here.
        keys, values: of each layer, ``[num_pages, page_size, heads, dim]``.
        compiles: whether the layers are compiled into one graph, where they can be.
        max_sessions: of a pass; ``max_pages``: of a session.
    """

    def __init__(
        self,
        drafter: DSparkDrafter,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        *,
        compiles: bool,
        max_sessions: int,
        max_pages: int,
    ) -> None:
        device = keys[0].device
        pack_linears(drafter, device)
        drafter.attend_by(BLOCK_ATTENTION_NAME)
        self._drafter = drafter
        self._size = drafter.config.block_size
        self._keys, self._values = keys, values
        self._buffers: PassBuffers | None = None
        if device.type == "cuda":
            max_tokens = max_sessions * self._size
            self._buffers = PassBuffers(max_tokens, max_sessions, max_pages, device)
        index = {index: index for index in range(len(keys))}
        layers = InPlaceLayers(index, frozenset(), on_cuda=self._buffers is not None)

        def run(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return drafter.flat_block_hidden(token_ids, positions, paged=layers)

        self._run: Any = run
        self._graphs: Graphs | None = None
        if compiles and self._size > 1:  # compilers take a length of 1 for a constant
            compiled = try_to_compile("drafter", lambda: self._compile(run))
            self._run = compiled or run
            if compiled is not None and self._buffers is not None:
                self._graphs = self._warmed_up(max_sessions)

    def _compile(self, run: Callable[..., torch.Tensor]) -> Any:
        if self._buffers is None:
            example = torch.zeros(EXAMPLE_TOKENS, dtype=torch.int64)
            return compile_graph(run, (example, torch.zeros_like(example)))
        example = self._buffers.token_ids[:EXAMPLE_TOKENS]
        examples = (example, self._buffers.positions[:EXAMPLE_TOKENS])
        begin_pass(StepInput.idle(EXAMPLE_TOKENS), self._keys, self._values, self._buffers)
        try:
            return compile_graph(run, examples)
        finally:
            end_pass(self._buffers)

    @torch.inference_mode()
    def _warmed_up(self, max_sessions: int) -> Graphs:
        """Graphs for the usual numbers of sessions, captured."""
        counts = [count for count in _GRAPHED_SESSIONS if count <= max_sessions]
        graphs = Graphs(self._launch, [count * self._size for count in counts])
        for size in reversed(graphs.sizes):
            begin_pass(StepInput.idle(size), self._keys, self._values, self._buffers)
            graphs.replay(size)
            end_pass(self._buffers)
        return graphs

    def _launch(self, num_tokens: int) -> torch.Tensor:
        assert self._buffers is not None
        positions = self._buffers.positions[:num_tokens]
        hidden: torch.Tensor = self._run(self._buffers.token_ids[:num_tokens], positions)
        return hidden

    def hidden(
        self,
        anchors: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        page_table: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """The backbone's output for B sessions.

        Args:
            anchors: ``[B]``, the last committed tokens.
            lengths: ``[B]`` positions of context, which is the anchor's own position.
            page_table: ``[B, P]``, pages of the context and of the block behind it.

        Returns:
            ``[B, block_size, d]``.
        """
        positions = lengths[:, None] + np.arange(self._size)
        page_size = self._keys[0].shape[1]
        pages = np.take_along_axis(page_table, positions // page_size, axis=1)
        flat = positions.reshape(-1)
        token_ids = np.full_like(positions, self._drafter.config.mask_token_id)
        token_ids[:, 0] = anchors
        step = StepInput(
            token_ids=token_ids.reshape(-1),
            positions=flat,
            slots=(pages * page_size + positions % page_size).reshape(-1),
            query_lens=np.full(len(lengths), self._size),
            context_lens=lengths + self._size,
            block_tables=page_table,
            logit_rows=flat[:0],
        )
        size = self._graphs.size_for(len(flat)) if self._graphs is not None else None
        begin_pass(step, self._keys, self._values, self._buffers, size)
        try:
            hidden = self._hidden_of(step, size)
        finally:
            end_pass(self._buffers)
        return hidden.unflatten(0, (len(lengths), self._size))

    def _hidden_of(self, step: StepInput, graph_size: int | None) -> torch.Tensor:
        if self._buffers is None:
            token_ids, positions = map(torch.from_numpy, (step.token_ids, step.positions))
            hidden: torch.Tensor = self._run(token_ids, positions)
            return hidden
        if self._graphs is None or graph_size is None:
            return self._launch(step.num_tokens)
        replayed: torch.Tensor = self._graphs.replay(graph_size)
        return replayed[: step.num_tokens]


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
