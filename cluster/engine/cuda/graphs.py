"""Passes captured once for the usual sizes and replayed: no launch by launch from Python."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

_WARM_UPS = 2  # what is compiled or tuned at a first run must not be captured


class Graphs:
    """A function of tensors at fixed places, captured for several sizes.

    Args:
        run: launches the work of a size and returns tensors, or a tuple or list of them, whose
            first dimension is the size. It must not wait for the device.
        sizes: ascending.
    """

    def __init__(self, run: Callable[[int], Any], sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._run = run
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, size: int) -> int | None:
        """The smallest size of a graph that holds ``size``; ``None`` if none does."""
        index = bisect_left(self.sizes, size)
        return self.sizes[index] if index < len(self.sizes) else None

    def replay(self, size: int) -> Any:
        """Runs the work of one of ``sizes``, which is captured now if it was not before.

        Returns:
            What ``run`` returned when it was captured, with new values; the next replay of any
            size may overwrite them.
        """
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, outputs = self._graphs[size]
        graph.replay()
        return outputs

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Any]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                self._run(size)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do on the device meanwhile is none of this graph's business.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            outputs = self._run(size)
        return graph, outputs


def usual_sizes(largest: int) -> list[int]:
    """2 to 8 by doubling, then multiples of 8, of 16 and of 32: little is padded."""
    sizes = [2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32)]
    return [size for size in sizes if size <= largest]
