"""A replica's shards as threads of this process, so that a split costs no more than a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import torch

from cluster.engine.mesh import Mesh

_TIMEOUT_S = 60.0


class _Exchange:
    """What the ranks of one replica share."""

    def __init__(self, tensor_parallel_size: int, num_stages: int) -> None:
        ranks = tensor_parallel_size * num_stages
        self.barriers = [threading.Barrier(tensor_parallel_size) for _ in range(num_stages)]
        self.all_barrier = threading.Barrier(ranks)
        self.slots: list[Any] = [None] * ranks
        self.queues = [Queue[torch.Tensor]() for _ in range(ranks)]


class ThreadMesh(Mesh):
    """Like ``Mesh``, without processes: collectives meet at a barrier."""

    def __init__(
        self, exchange: _Exchange, rank: int, tensor_parallel_size: int, num_stages: int
    ) -> None:
        self._exchange = exchange
        self.rank = rank
        self.device = torch.device("cpu")
        self.tensor_parallel_size = tensor_parallel_size
        self.num_stages = num_stages
        self.world_size = tensor_parallel_size * num_stages
        self.stage, self.tensor_rank = divmod(rank, tensor_parallel_size)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._gather(tensor.clone())).sum(dim=0))

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._gather(tensor), dim=-1)

    def send_next(self, tensor: torch.Tensor) -> None:
        if tensor.numel():
            stage = (self.stage + 1) % self.num_stages
            rank = stage * self.tensor_parallel_size + self.tensor_rank
            self._exchange.queues[rank].put(tensor.clone())

    def receive_previous(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = self._exchange.queues[self.rank].get(timeout=_TIMEOUT_S)
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        return tensor

    def minimum(self, value: int) -> int:
        return min(self._meet(self._exchange.all_barrier, value))

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        first = self.stage * self.tensor_parallel_size
        found = self._meet(self._exchange.barriers[self.stage], tensor)
        return found[first : first + self.tensor_parallel_size]

    def _meet(self, barrier: threading.Barrier, value: Any) -> list[Any]:
        self._exchange.slots[self.rank] = value
        barrier.wait(_TIMEOUT_S)
        values = list(self._exchange.slots)
        barrier.wait(_TIMEOUT_S)
        return values


def on_all_ranks(
    tensor_parallel_size: int, num_stages: int, work: Callable[[ThreadMesh], Any]
) -> list[Any]:
    """Runs ``work`` on every rank at once; results by rank. One that fails ends the others."""
    exchange = _Exchange(tensor_parallel_size, num_stages)
    size = tensor_parallel_size * num_stages
    meshes = [ThreadMesh(exchange, rank, tensor_parallel_size, num_stages) for rank in range(size)]

    def guarded(mesh: ThreadMesh) -> Any:
        try:
            return work(mesh)
        except BaseException:
            for barrier in (*exchange.barriers, exchange.all_barrier):
                barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, mesh) for mesh in meshes]
    failures = [f.exception() for f in futures if f.exception() is not None]
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    return [future.result() for future in futures]
