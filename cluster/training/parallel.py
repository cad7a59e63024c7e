"""Data parallelism over processes of one machine, one thread each.

On few cores this beats one process with several threads as soon as anything else runs: workers
meet once a step and not at every operation.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


@dataclass(frozen=True)
class Worker:
    """One of ``count`` equal workers; each sees its own rows of every batch."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this worker logs and writes."""
        return self.rank == 0

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """This worker's rows of a batch; ``count`` must divide the number of rows."""
        return rows[self.rank :: self.count]

    def agree(self, value: float) -> float:
        """The leader's ``value``, the same on every worker."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def share_of_mean(self, mean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A scalar whose average over the workers is the mean over all workers' rows.

        Args:
            mean: over this worker's rows.
            weight: how much this worker's mean weighs, a scalar.
        """
        if self.count == 1:
            return mean
        total = weight.detach().clone()
        dist.all_reduce(total)
        return mean * (self.count * weight / total)

    def wait(self) -> None:
        """Returns once every worker is here."""
        if self.count > 1:
            dist.barrier()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their mean over the workers, in one message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def run_workers(
    train: Callable[[argparse.Namespace, Worker], None], arguments: argparse.Namespace
) -> None:
    """Runs ``train`` in ``arguments.processes`` processes; in this one where that is 1."""
    if arguments.processes == 1:
        train(arguments, Worker())
        return
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        # Workers are daemons, which end with this process if it exits and is not merely killed.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        mp.spawn(_start, (train, arguments, rendezvous), arguments.processes, daemon=True)


def _start(
    rank: int,
    train: Callable[[argparse.Namespace, Worker], None],
    arguments: argparse.Namespace,
    rendezvous: str,
) -> None:
    count = arguments.processes
    with join_group(rank, count, rendezvous):
        train(arguments, Worker(rank, count))


@contextmanager
def join_group(rank: int, count: int, rendezvous: str) -> Iterator[None]:
    """One of ``count`` processes with a thread each; ``rendezvous`` is a URL that all can reach."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
