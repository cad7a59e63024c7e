"""Reads and writes the files of a checkpoint: ``config.json`` and safetensors, one or several
under an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cluster.errors import CheckpointError
from cluster.models.tensor_headers import WEIGHTS, check_tensors

CONFIG = "config.json"


def read_tensors(
    folder: Path,
    expected: Mapping[str, Sequence[int]],
    only_for: str | None = None,
    optional: Collection[str] = (),
    rename: Callable[[str], str] = str,
    is_ours: Callable[[str], bool] | None = None,
) -> dict[str, torch.Tensor]:
    """Reads the tensors named in ``expected``, all of them checked before any is read.

    Arguments and errors are those of ``check_tensors``.
    """
    entries = check_tensors(folder, expected, only_for, optional, rename, is_ours)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted({entry.path for entry in entries.values()}):
        try:
            with safe_open(path, framework="pt") as file:
                for key in (key for key, entry in entries.items() if entry.path == path):
                    tensors[rename(key)] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(path), None, f"broken safetensors: {error}") from error
    return tensors


def write_checkpoint(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    is_float32: Callable[[str], bool] = lambda name: False,
) -> None:
    """Writes a checkpoint to folder ``path``; each file is replaced atomically.

    Floating-point tensors are written in ``dtype``, which ``config.json`` names, or in fp32 where
    ``is_float32`` says so of their name; others as they are.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    data = {**config, "dtype": str(dtype).removeprefix("torch.")}
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)

    def stored(name: str, value: torch.Tensor) -> torch.Tensor:
        floats = torch.float32 if is_float32(name) else dtype
        wanted = floats if value.is_floating_point() else value.dtype
        return value.detach().to("cpu", wanted).contiguous()

    partial = folder / (WEIGHTS + ".partial")
    save_file(
        {name: stored(name, value) for name, value in tensors.items()},
        partial,
        metadata={"format": "pt"},
    )
    os.replace(partial, folder / WEIGHTS)


def cast_weights(
    network: nn.Module, dtype: torch.dtype, is_float32: Callable[[str], bool] = lambda name: False
) -> None:
    """Brings a network's weights to ``dtype``, but for those that ``is_float32`` names and those
    that are no floating-point numbers.

    Unlike ``network.to(dtype)`` it leaves what is computed and not stored alone: rotary
    frequencies rounded to bf16 turn far positions by whole radians.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if is_float32(name) else dtype)
