"""The process group of one replica's shards: who is where, and what travels between them.

Rank layout: ``rank = stage * tensor_parallel_size + tensor_rank``. Rank 0 (stage 0, tensor rank 0)
runs the engine and tells all others what to do with small control messages; hidden states travel
from stage to stage and, as a ring, from the last stage back to the first, which holds the output
head. So sampling happens in one place and logits never cross a network.

A group is never mended: any failure raises, and the replica is rebuilt.
"""

from __future__ import annotations

import logging
from collections import deque
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

_CONTROL_INTS = 1024

_logger = logging.getLogger(__name__)


def open_store(host: str, world_size: int, timeout_s: float) -> dist.TCPStore:
    """Binds a rendezvous store on a free port of ``host``; ``store.port`` tells which."""
    return dist.TCPStore(
        host,
        0,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


class Mesh:
    """One shard's place in its replica, and its collectives. All calls are from one thread.

    Guarantees: what was sent arrives, also when the sender closes right behind it, unless the
    receiver is gone or takes longer than the timeout.

    Args:
        store: of the rendezvous; the same for all ranks.
        timeout_s: a shard that waits longer for another is lost.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        tensor_parallel_size: int,
        pipeline_parallel_size: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.rank = rank
        self.device = device
        self.tensor_parallel_size = tensor_parallel_size
        self.num_stages = pipeline_parallel_size
        self.world_size = tensor_parallel_size * pipeline_parallel_size
        self.stage, self.tensor_rank = divmod(rank, tensor_parallel_size)
        timeout = timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=self.world_size, timeout=timeout
        )
        groups = [
            dist.new_group(
                range(s * tensor_parallel_size, (s + 1) * tensor_parallel_size), timeout=timeout
            )
            for s in range(pipeline_parallel_size)
        ]
        self._tensor_group = groups[self.stage]
        # What may be under way without anybody being late: a few messages a shard and stage.
        self._max_pending = 8 + 4 * self.num_stages * self.world_size
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()

    @property
    def is_first_stage(self) -> bool:
        """Whether this shard embeds tokens and holds the output head."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this shard holds the last decoder layers."""
        return self.stage == self.num_stages - 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over the stage's tensor-parallel ranks, in place."""
        dist.all_reduce(tensor, group=self._tensor_group)
        return tensor

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenates ``[rows, columns]`` of the stage's tensor-parallel ranks by columns."""
        parts = [torch.empty_like(tensor) for _ in range(self.tensor_parallel_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._tensor_group)
        return torch.cat(parts, dim=-1)

    def send_control(self, message: np.ndarray, ranks: range) -> None:
        """Sends int64 numbers to ``ranks`` without waiting for them (rank 0 only)."""
        framed = torch.zeros(_CONTROL_INTS, dtype=torch.int64)
        framed[0] = len(message)
        head = torch.from_numpy(np.ascontiguousarray(message, dtype=np.int64))
        inline = min(len(message), _CONTROL_INTS - 1)
        framed[1 : 1 + inline] = head[:inline]
        for rank in ranks:
            self._send(framed, rank)
            if len(message) > inline:
                self._send(head[inline:], rank)

    def receive_control(self) -> np.ndarray:
        """Waits for rank 0's next message.

        Raises:
            RuntimeError: the group is broken or nothing came within the timeout.
        """
        framed = torch.empty(_CONTROL_INTS, dtype=torch.int64)
        dist.recv(framed, src=0)
        length = int(framed[0])
        inline = framed[1 : 1 + min(length, _CONTROL_INTS - 1)]
        if length <= len(inline):
            return inline.numpy()
        rest = torch.empty(length - len(inline), dtype=torch.int64)
        dist.recv(rest, src=0)
        return torch.cat([inline, rest]).numpy()

    def send_next(self, tensor: torch.Tensor) -> None:
        """Sends a tensor to the same tensor rank of the next stage; the last sends to the first."""
        next_stage = (self.stage + 1) % self.num_stages
        self._send(tensor.contiguous(), next_stage * self.tensor_parallel_size + self.tensor_rank)

    def receive_previous(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Waits for the tensor that the previous stage sends."""
        previous = (self.stage - 1) % self.num_stages
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(tensor, src=previous * self.tensor_parallel_size + self.tensor_rank)
        return tensor

    def minimum(self, value: int) -> int:
        """The smallest of all shards' values."""
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def close(self) -> None:
        """Leaves the group when the others have what was sent to them, or cannot have it."""
        self._flush()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _flush(self) -> None:
        """Waits until what was sent is received; what never will be is logged and forgotten.

        A message leaves this process only once its receiver asks for it, which is after whatever it
        does now: until then it would be lost with the connection.
        """
        errors = []
        while self._pending:
            try:
                self._pending.popleft()[0].wait()
            except RuntimeError as error:  # gone, or the timeout, which ends all connections
                errors.append(error)
        if errors:
            _logger.warning(
                "shard %d left with %d messages not taken: %s", self.rank, len(errors), errors[0]
            )

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        """Starts a send. Raises: RuntimeError: an earlier one failed."""
        # Gloo's sends never report completion by themselves: only ``wait`` tells, and frees.
        while len(self._pending) >= self._max_pending:
            self._pending.popleft()[0].wait()
        if tensor.numel():
            work = dist.isend(tensor, dst=rank)
            if work is not None:
                self._pending.append((work, tensor))
