"""Shards part in an orderly way: what one has sent arrives, however early it leaves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.engine.mesh import Mesh, open_store

_PATIENCE_S = 30.0
_MESSAGE = np.arange(3000)  # longer than what travels in one piece
_LATENESS_S = 0.5


def _join(store: dist.Store, rank: int, timeout_s: float) -> Mesh:
    return Mesh(
        store,
        rank=rank,
        tensor_parallel_size=1,
        pipeline_parallel_size=2,
        device=torch.device("cpu"),
        timeout_s=timeout_s,
    )


@contextmanager
def _two_ranks(
    other: Callable[[Mesh, Connection], None], timeout_s: float
) -> Iterator[tuple[Mesh, Connection, Any]]:
    """Rank 0's mesh, and a pipe to the process in which ``other`` runs as rank 1."""
    store = open_store("127.0.0.1", 2, _PATIENCE_S)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_other, args=(store.port, other, theirs), daemon=True)
    process.start()
    assert ours.poll(_PATIENCE_S), "the other rank did not start"
    ours.recv()
    mesh = _join(store, 0, timeout_s)
    try:
        yield mesh, ours, process
    finally:
        mesh.close()
        process.kill()
        process.join(_PATIENCE_S)


def _run_other(port: int, other: Callable[[Mesh, Connection], None], pipe: Connection) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, timeout=timedelta(seconds=_PATIENCE_S))
    pipe.send("has imported torch")
    mesh = _join(store, 1, _PATIENCE_S)
    other(mesh, pipe)
    mesh.close()


def _receive_late(mesh: Mesh, pipe: Connection) -> None:
    time.sleep(_LATENESS_S)
    pipe.send([mesh.receive_control() for _ in range(2)])


def _send_and_leave(mesh: Mesh, pipe: Connection) -> None:
    mesh.send_next(torch.arange(10.0))


def _sleep(mesh: Mesh, pipe: Connection) -> None:
    time.sleep(2 * _PATIENCE_S)


def test_a_shard_that_is_behind_gets_the_last_messages_of_one_that_leaves() -> None:
    with _two_ranks(_receive_late, timeout_s=_PATIENCE_S) as (mesh, pipe, _):
        mesh.send_control(_MESSAGE, range(1, 2))
        mesh.send_control(np.asarray([4]), range(1, 2))
        mesh.close()
        assert pipe.poll(_PATIENCE_S)
        first, second = pipe.recv()
    np.testing.assert_array_equal(first, _MESSAGE)
    assert second.tolist() == [4]


def test_a_following_shard_leaves_its_last_tensor_too() -> None:
    with _two_ranks(_send_and_leave, timeout_s=_PATIENCE_S) as (mesh, _, _process):
        time.sleep(_LATENESS_S)
        assert mesh.receive_previous((10,), torch.float32).tolist() == list(range(10))


def test_one_that_takes_nothing_does_not_keep_another_for_longer_than_the_timeout() -> None:
    timeout_s = 2.0
    with _two_ranks(_sleep, timeout_s=timeout_s) as (mesh, _, process):
        for _ in range(3):
            mesh.send_control(_MESSAGE, range(1, 2))
        os.kill(process.pid, signal.SIGSTOP)
        started = time.monotonic()
        mesh.close()
        assert time.monotonic() - started < 2 * timeout_s


def test_one_that_is_gone_is_not_waited_for() -> None:
    with _two_ranks(_sleep, timeout_s=_PATIENCE_S) as (mesh, _, process):
        mesh.send_control(_MESSAGE, range(1, 2))
        process.kill()
        started = time.monotonic()
        mesh.close()
        assert time.monotonic() - started < _PATIENCE_S / 2
