"""Runs a training loop in many workers, on one node or on many, by Ray Train."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from cluster.errors import ClusterStateError, DsparkError

# A worker may answer prompts or fill its part of a cache while the others wait for it.
_COLLECTIVE_TIMEOUT_S = 6 * 3600

TrainLoop = Callable[[Any, int, int, str], None]
"""``loop(config, rank, count, device)``, inside a process group of ``count`` workers."""


def train_on_ray(
    loop: TrainLoop,
    config: Any,
    *,
    num_workers: int,
    use_gpu: bool,
    cpus_per_worker: float,
    max_failures: int,
    folder: Path,
) -> None:
    """Runs ``loop`` in ``num_workers`` processes until all have returned.

    On the Ray cluster that ``RAY_ADDRESS`` names, else on one that is started here and ends with
    the run. When a worker is lost or raises, all are stopped and started again, up to
    ``max_failures`` times; the loop goes on from what it saved itself.

    Args:
        loop: importable on every node.
        config: what it is given; is pickled.
        num_workers: processes, each with ``cpus_per_worker`` CPUs and, with ``use_gpu``, one GPU.
        max_failures: restarts.
        folder: for Ray Train's own files; shared by all nodes.

    Raises:
        DsparkError: what the loop raised.
        ClusterStateError: there is no Ray cluster, or workers failed too often.
    """
    with tempfile.TemporaryDirectory(prefix="dspark-") as temp_dir:
        try:
            _connect(num_workers, cpus_per_worker, temp_dir)
            trainer = ray.train.torch.TorchTrainer(
                _run_loop,
                train_loop_config={"loop": loop, "config": config},
                torch_config=ray.train.torch.TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=num_workers,
                    use_gpu=use_gpu,
                    resources_per_worker={"CPU": cpus_per_worker},
                ),
                run_config=ray.train.RunConfig(
                    storage_path=str(folder),
                    failure_config=ray.train.FailureConfig(max_failures=max_failures),
                ),
            )
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _own_error(error) from error
        finally:
            ray.shutdown()


def _run_loop(values: dict[str, Any]) -> None:
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    values["loop"](
        values["config"], context.get_world_rank(), context.get_world_size(), str(device)
    )


def _connect(num_workers: int, cpus_per_worker: float, temp_dir: str) -> None:
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ClusterStateError(f"RAY_ADDRESS: {error}") from None
        return
    cores = os.cpu_count() or 1
    # Ray runs workers as background work; these are the work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        # Ray counts CPUs but does not divide them: workers on a small machine share what there is.
        num_cpus=max(cores, round(num_workers * cpus_per_worker + 0.5)),
        include_dashboard=False,
        logging_level=logging.ERROR,
        _temp_dir=temp_dir,
    )


def _own_error(error: Exception) -> DsparkError:
    """The loop's own error where it is one of ours, else one that says what happened."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, DsparkError):
                return cause
            cause = cause.__cause__
    return ClusterStateError(f"training failed: {error}")
