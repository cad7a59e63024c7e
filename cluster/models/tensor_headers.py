"""What the headers of a checkpoint's safetensors say, read without torch and without the tensors.

Everything that can be wrong with these files is found here, before any long work, and is a
``CheckpointError`` that names the file and the key.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from cluster.models.json_files import read_json

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# A safetensors file starts with the length of its header, which is JSON.
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = ("BF16", "F16", "F32", "F64", "I32", "I64", "BOOL")


@dataclass(frozen=True)
class TensorEntry:
    """What a safetensors header says of one tensor; ``dtype`` is the format's own name for it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's safetensors files: one, or those of its index.

    Raises:
        CheckpointError: the index is broken.
    """
    if (folder / WEIGHTS).exists() or not (folder / _INDEX).exists():
        return [WEIGHTS]
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(folder / _INDEX), "weight_map", "is missing or empty")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(str(folder / _INDEX), key, f"names no file here: {name!r}")
    return sorted(set(weight_map.values()))


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors of a folder, as its index has them or, without one, its file.

    Raises:
        CheckpointError: the index or the file is missing or broken.
    """
    if weight_files(folder) == [WEIGHTS]:
        return list(_read_header(folder / WEIGHTS))
    return list(read_json(folder / _INDEX)["weight_map"])


def read_headers(
    folder: Path, is_ours: Callable[[str], bool] = lambda name: True
) -> dict[str, TensorEntry]:
    """Where a folder's tensors are, by their names in the files.

    Args:
        folder: the checkpoint's folder.
        is_ours: which names are of interest; files that hold none of them by an index are not
            opened.

    Raises:
        CheckpointError: a file is missing, is cut off, or its header is broken.
    """
    names = weight_files(folder)
    if names != [WEIGHTS]:
        weight_map = read_json(folder / _INDEX)["weight_map"]
        names = sorted({name for key, name in weight_map.items() if is_ours(key)})
    entries: dict[str, TensorEntry] = {}
    for name in names:
        entries.update(_read_header(folder / name))
    return {key: entry for key, entry in entries.items() if is_ours(key)}


def check_tensors(
    folder: Path,
    expected: Mapping[str, Sequence[int]],
    only_for: str | None = None,
    optional: Collection[str] = (),
    rename: Callable[[str], str] = str,
    is_ours: Callable[[str], bool] | None = None,
) -> dict[str, TensorEntry]:
    """Checks the tensors named in ``expected`` by the files' headers alone.

    Args:
        folder: the checkpoint's folder.
        expected: shape by name.
        only_for: where given, what the checkpoint must be, and any other tensor is an error; else
            other tensors are left alone.
        optional: names that may be missing.
        rename: from a name in a file to a name in ``expected``.
        is_ours: with ``only_for``, which names in the files belong to it (default: all).

    Returns:
        Where the tensors are, by their names in the files.

    Raises:
        CheckpointError: names the file and the tensor that is missing, unexpected, of the wrong
            shape, quantised or cut off, or the file that is missing or broken.
    """

    def is_wanted(key: str) -> bool:
        if only_for is None:
            return rename(key) in expected
        return is_ours is None or is_ours(key)

    entries = read_headers(folder, is_wanted)
    for key, entry in entries.items():
        file = str(entry.path)
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                file,
                key,
                f"is quantised ({entry.dtype}); only {', '.join(_DTYPES)} are read, "
                "so dequantise the drafter first",
            )
        shape = expected.get(rename(key))
        if shape is None:
            raise CheckpointError(file, key, f"is no weight of {only_for}")
        if tuple(shape) != entry.shape:
            raise CheckpointError(file, key, f"has shape {list(entry.shape)}, not {list(shape)}")
    missing = sorted(set(expected) - set(optional) - {rename(key) for key in entries})
    if missing:
        single = weight_files(folder) == [WEIGHTS]
        raise CheckpointError(
            str(folder / (WEIGHTS if single else _INDEX)), missing[0], "is missing"
        )
    return entries


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The header of one safetensors file, checked against the file's length."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH.size)
            length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
            if not 0 < length <= min(size - _LENGTH.size, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    str(path), None, f"broken safetensors: {size} bytes do not hold its header"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(str(path), None, "no such file") from error
    except OSError as error:
        raise CheckpointError(str(path), None, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(str(path), None, f"broken safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(str(path), None, "broken safetensors header: must be an object")
    payload = size - _LENGTH.size - length
    header.pop("__metadata__", None)
    return {key: _read_entry(path, key, value, payload) for key, value in header.items()}


def _read_entry(path: Path, key: str, value: Any, payload: int) -> TensorEntry:
    try:
        dtype, shape = str(value["dtype"]), tuple(int(side) for side in value["shape"])
        begin, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(str(path), key, "has a broken entry in the header") from error
    if not 0 <= begin <= end or math.prod(shape) < 0:
        raise CheckpointError(str(path), key, "has a broken entry in the header")
    if end > payload:
        raise CheckpointError(
            str(path),
            key,
            f"the file is cut off: the tensor ends at byte {end} of {payload} that are there",
        )
    return TensorEntry(path, dtype, shape)
