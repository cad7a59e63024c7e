"""A stage's layers, and the output head, as graphs of the usual sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluster.engine.compiled import MIN_TOKENS, CompiledLayers
from cluster.engine.cuda.graphs import Graphs, usual_sizes
from cluster.engine.cuda.pass_buffers import PassBuffers

_MAX_HEAD_ROWS = 64  # beyond, launches are a small part, and each graph keeps its own output


class GraphedLayers:
    """Replays compiled layers where a pass fits a graph, else launches them kernel by kernel.

    The pass must be current (``begin_pass``), padded to ``padded_size``.

    Args:
        layers: compiled.
        buffers: that passes are loaded into.
    """

    def __init__(self, layers: CompiledLayers, buffers: PassBuffers) -> None:
        self._layers = layers
        self._buffers = buffers
        self._graphs = Graphs(self._launch, usual_sizes(buffers.max_tokens))

    @property
    def sizes(self) -> list[int]:
        """Passes that have a graph, which is captured when it is needed first."""
        return self._graphs.sizes

    def padded_size(self, num_tokens: int) -> int:
        """What a pass is to be padded to."""
        return self._graphs.size_for(num_tokens) or num_tokens

    def __call__(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the current pass; the next one may overwrite what is returned.

        Returns:
            As ``CompiledLayers``, the first ``num_tokens`` rows.
        """
        size = self._graphs.size_for(num_tokens)
        hidden, features = self._launch(num_tokens) if size is None else self._graphs.replay(size)
        return hidden[:num_tokens], None if features is None else features[:num_tokens]

    def _launch(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = max(num_tokens, MIN_TOKENS)
        return self._layers(self._buffers.token_ids[:size], self._buffers.positions[:size])


class GraphedHead:
    """A function of some rows, replayed as a graph.

    Args:
        run: from ``[R, d]`` to ``[R, x]``.
        width: d.
        dtype, device: of the rows.
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._run = run
        sizes = usual_sizes(_MAX_HEAD_ROWS)
        self._rows = torch.zeros(sizes[-1], width, dtype=dtype, device=device)
        self._graphs = Graphs(lambda size: run(self._rows[:size]), sizes)

    @property
    def sizes(self) -> list[int]:
        """Rows that have a graph, which is captured when it is needed first."""
        return self._graphs.sizes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """``[R, d]`` to ``[R, x]``; the next call may overwrite it."""
        size = self._graphs.size_for(len(rows))
        if size is None:
            return self._run(rows)
        self._rows[: len(rows)] = rows
        output: torch.Tensor = self._graphs.replay(size)
        return output[: len(rows)]
