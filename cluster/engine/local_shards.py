"""All shards of one replica on this machine, without Ray: for measuring a target by itself."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.config import ClusterConfig
from cluster.engine.runner import Runner
from cluster.engine.worker import ShardWorker
from cluster.errors import ConfigError

_HOST = "127.0.0.1"
_STOP_TIMEOUT_S = 10.0


@contextmanager
def local_shards(config: ClusterConfig) -> Iterator[Runner]:
    """Rank 0 in this process and the others in processes of their own, which end with the block.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: it cannot be cut as configured, or several shards are to share one GPU.
    """
    target = config.target
    if target.num_shards > 1 and target.device == "cuda":
        raise ConfigError(
            "target.device",
            f"{target.num_shards} shards need a GPU each, which only Ray hands out: a cluster "
            "measures such a target itself when it starts",
        )
    worker = ShardWorker(config, 0)
    worker.prepare()
    port = worker.open_rendezvous(_HOST) if target.num_shards > 1 else 0
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_follow, args=(config, rank, port), daemon=True)
        for rank in range(1, target.num_shards)
    ]
    for process in others:
        process.start()
    try:
        worker.start(_HOST, port, 0)
        runner = worker.make_runner()
        yield runner
        runner.stop()
        for process in others:
            process.join(_STOP_TIMEOUT_S)
    finally:
        for process in others:
            process.kill()
        worker.close()


def _follow(config: ClusterConfig, rank: int, port: int) -> None:
    worker = ShardWorker(config, rank)
    worker.start(_HOST, port, 0)
    worker.follow()
    worker.close()
