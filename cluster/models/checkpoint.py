"""Reads and writes drafter checkpoints, and names checkpoints by digest.

A drafter is a folder with ``config.json`` and safetensors: in DeepSpec's format, or a DeepSeek-V4
target that carries its draft module. Only safetensors are read. Whatever is wrong with a folder
is a ``CheckpointError`` that names the file and the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from cluster.errors import CheckpointError
from cluster.models import deepseek_v4_names
from cluster.models.checkpoint_files import (
    CONFIG,
    cast_weights,
    read_tensors,
    write_checkpoint,
)
from cluster.models.deepseek_v4_config import DEEPSEEK_V4
from cluster.models.drafter_config import load_drafter_config
from cluster.models.dspark import DSparkDrafter
from cluster.models.dspark_config import GEMMA4, QWEN3, DSparkConfig
from cluster.models.dspark_config import (
    check_drafter_matches_target as check_drafter_matches_target,
)
from cluster.models.hub import local_folder
from cluster.models.tensor_headers import weight_files


@dataclass(frozen=True)
class Projection:
    """The part of a drafter that runs beside the target: ``fc`` and the layers it reads.

    ``weight`` is ``[d, len(target_layer_ids) * d]``; columns ``[i * d, (i + 1) * d)`` belong to
    ``target_layer_ids[i]``.
    """

    weight: torch.Tensor
    target_layer_ids: tuple[int, ...]


def build_drafter(config: DSparkConfig) -> DSparkDrafter:
    """A drafter of the architecture that ``config`` names, with random weights."""
    # Imported here: nothing else of this module needs the networks of transformers, which take
    # seconds to import.
    if config.architecture == QWEN3:
        from cluster.models.qwen3_dspark import Qwen3DSparkDrafter

        return Qwen3DSparkDrafter(config)
    if config.architecture == GEMMA4:
        from cluster.models.gemma4_dspark import Gemma4DSparkDrafter

        return Gemma4DSparkDrafter(config)
    if config.architecture == DEEPSEEK_V4:
        from cluster.models.deepseek_v4_dspark import DeepSeekV4DSparkDrafter

        return DeepSeekV4DSparkDrafter(config)
    raise ValueError(f"there is no network of architecture {config.architecture}")


def load_drafter(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> DSparkDrafter:
    """Loads a drafter for use: eval mode, no gradients, weights of ``dtype`` on ``device``.

    Raises:
        CheckpointError: a file is missing or broken, or a tensor is missing, unexpected or of
            the wrong shape.
    """
    config = load_drafter_config(path)
    if not isinstance(config, DSparkConfig):
        raise CheckpointError(str(path), "architectures", "is no DSpark drafter")
    in_target = config.architecture == DEEPSEEK_V4
    tensors = read_tensors(
        local_folder(path),
        _shapes(config),
        only_for="a DSpark drafter",
        rename=deepseek_v4_names.canonical if in_target else str,
        is_ours=deepseek_v4_names.is_ours if in_target else None,
    )
    with no_init_weights():  # nothing random is drawn, nor held, for weights that are read
        drafter = build_drafter(config)
    drafter.load_checkpoint_tensors(tensors)
    drafter.requires_grad_(False)
    cast_weights(drafter, dtype, drafter.is_float32)
    return drafter.to(device).eval()


def load_projection(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    num_target_layers: int | None = None,
) -> Projection:
    """Loads only what the target's side of a drafter needs.

    Raises:
        CheckpointError: as ``load_drafter_config``, and for ``fc.weight``.
    """
    config = load_drafter_config(path, num_target_layers)
    width, key = config.hidden_size, config.projection_key
    expected = {key: torch.Size((width, len(config.target_layer_ids) * width))}
    tensors = read_tensors(local_folder(path), expected)
    weight = tensors[key].to(device=device, dtype=dtype)
    return Projection(weight, config.target_layer_ids)


def save_drafter(
    drafter: DSparkDrafter, path: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes ``drafter`` to folder ``path``; each file is replaced atomically."""
    write_checkpoint(
        path, drafter.config.to_dict(), drafter.checkpoint_tensors(), dtype, drafter.is_float32
    )


def target_digest(path: str | Path) -> str:
    """Identity of a target: SHA-256 (hex) over its configuration and weights."""
    folder = local_folder(path)
    return _digest(folder, [CONFIG, *weight_files(folder)])


def tokenizer_digest(path: str | Path) -> str:
    """Identity of a tokenizer: SHA-256 (hex) over ``tokenizer.json``."""
    return _digest(local_folder(path), ["tokenizer.json"])


def drafter_digest(path: str | Path) -> str:
    """Identity of a drafter: SHA-256 (hex) over its configuration and weights."""
    folder = local_folder(path)
    return _digest(folder, [CONFIG, *weight_files(folder)])


def projection_digest(path: str | Path, num_target_layers: int | None = None) -> str:
    """Identity of stored features: SHA-256 (hex) over layer ids and the bytes of ``fc``.

    Drafters that share a projection share features.

    Raises:
        CheckpointError: as ``load_projection``.
    """
    projection = load_projection(path, num_target_layers=num_target_layers)
    digest = hashlib.sha256(json.dumps(projection.target_layer_ids).encode())
    digest.update(projection.weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
        except OSError as error:
            raise CheckpointError(str(path), None, f"cannot be read: {error.strerror}") from error
        digest.update(name.encode() + b"\0" + content.digest())
    return digest.hexdigest()


def _shapes(config: DSparkConfig) -> dict[str, torch.Size]:
    """Shape of every tensor of a checkpoint; nothing is allocated."""
    with torch.device("meta"):
        tensors = build_drafter(config).checkpoint_tensors()
    return {name: value.shape for name, value in tensors.items()}
