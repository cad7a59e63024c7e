"""The files of a checkpoint folder: ``config.json`` and safetensors, in one file or by an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluster.errors import CheckpointError

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(str(path), None, "no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), None, f"cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(str(path), None, "must hold one JSON object")
    return data


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder: one, or those of its index.

    Raises:
        CheckpointError: the index is broken.
    """
    if (folder / _WEIGHTS).exists() or not (folder / _INDEX).exists():
        return [_WEIGHTS]
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(folder / _INDEX), "weight_map", "is missing or empty")
    return sorted(set(weight_map.values()))


def read_tensors(
    folder: Path,
    expected: Mapping[str, torch.Size],
    only_for: str | None = None,
    optional: Collection[str] = (),
    rename: Callable[[str], str] = str,
) -> dict[str, torch.Tensor]:
    """Reads the tensors named in ``expected`` from a folder's safetensors, shapes checked.

    Args:
        folder: the checkpoint's folder.
        expected: shape by name.
        only_for: where given, what the whole checkpoint must be, and any other tensor is an
            error; else other tensors are left alone.
        optional: names that may be missing.
        rename: from a name in the file to a name in ``expected``.

    Raises:
        CheckpointError: names the file and the tensor that is missing, unexpected or of the wrong
            shape, or the file that is missing or broken.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in weight_files(folder):
        path = folder / name
        if not path.exists():
            raise CheckpointError(str(path), None, "no such file")
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 (not a mapping)
                    key = rename(stored)
                    if key in expected:
                        shape = file.get_slice(stored).get_shape()
                        _check_shape(path, stored, expected[key], shape)
                        tensors[key] = file.get_tensor(stored)
                    elif only_for is not None:
                        raise CheckpointError(str(path), stored, f"is no weight of {only_for}")
        except SafetensorError as error:
            raise CheckpointError(str(path), None, f"broken safetensors: {error}") from error
    missing = sorted(set(expected) - set(tensors) - set(optional))
    if missing:
        raise CheckpointError(str(folder / _WEIGHTS), missing[0], "is missing")
    return tensors


def write_checkpoint(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Writes ``config.json`` and one safetensors file; each is replaced atomically.

    Floating-point tensors are stored as ``dtype``, others as they are.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    data = {**config, "dtype": str(dtype).removeprefix("torch.")}
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)
    stored = {
        name: value.detach()
        .to("cpu", dtype if value.is_floating_point() else value.dtype)
        .contiguous()
        for name, value in tensors.items()
    }
    partial = folder / (_WEIGHTS + ".partial")
    save_file(stored, partial, metadata={"format": "pt"})
    os.replace(partial, folder / _WEIGHTS)


def _check_shape(path: Path, key: str, expected: torch.Size, found: list[int]) -> None:
    if list(expected) != list(found):
        raise CheckpointError(str(path), key, f"has shape {list(found)}, not {list(expected)}")
