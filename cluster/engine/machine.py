"""What a measurement depends on of the machine that it was made on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime

import torch
import transformers

import cluster
from cluster.config import TargetConfig
from cluster.errors import ConfigError
from cluster.speculation.verify_curve import CurveOrigin


def processor_name() -> str:
    """Model name of the CPU, or what comes nearest."""
    return _of_processor("model name") or platform.processor()


def processor_flags() -> str:
    """The instruction sets of the CPU, as the system names them; empty where it does not."""
    parts = ("flags", "Features", "CPU implementer", "CPU variant", "CPU part")  # x86, then ARM
    return " ".join((platform.machine(), *map(_of_processor, parts)))


def num_cores() -> int:
    """Cores of the machine."""
    return os.cpu_count() or 1


def accelerator_name() -> str:
    """Model name of the GPU, empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def check_device(key: str, device: str) -> None:
    """Raises ConfigError, of ``key``, where PyTorch cannot compute on ``device`` here."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(key, "this machine, or its build of torch, has no CUDA")


def curve_origin(config: TargetConfig, target_digest: str, execution: str) -> CurveOrigin:
    """What a curve that is measured here and now rests on.

    Args:
        config: of the target.
        target_digest: ``cluster.models.checkpoint.target_digest``.
        execution: of the shard that is measured, ``TargetShard.execution``.
    """
    return CurveOrigin(
        target_digest=target_digest,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        dtype=config.dtype,
        device=config.device,
        num_threads=torch.get_num_threads(),
        deterministic=config.deterministic,
        execution=execution,
        processor=processor_name(),
        cores=num_cores(),
        accelerator=accelerator_name() if config.device == "cuda" else "",
        torch=torch.__version__,
        transformers=transformers.__version__,
        dspark=cluster.__version__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _of_processor(name: str) -> str:
    """A line's value of the first core's entry in /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    except OSError:
        pass
    return ""
