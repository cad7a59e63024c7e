"""Checkpoints of block drafters as published, to be read, and spoilt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from cluster.models import checkpoint
from cluster.models.dspark import DSparkDrafter
from tests.block_drafters import TINY_DEEPSEEK_V4, TINY_GEMMA4, TINY_QWEN3, make_drafter

TINY = {"qwen3": TINY_QWEN3, "gemma4": TINY_GEMMA4, "deepseek-v4": TINY_DEEPSEEK_V4}
PROJECTION = {
    "qwen3": "fc.weight",
    "gemma4": "fc.weight",
    "deepseek-v4": "mtp.0.main_proj.weight",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_published(folder: Path, data: dict[str, Any]) -> DSparkDrafter:
    """A checkpoint as published: the configuration word for word, in one file."""
    drafter = make_drafter(data)
    tensors = {name: value.contiguous() for name, value in drafter.checkpoint_tensors().items()}
    (folder / "config.json").write_text(json.dumps(data))
    save_file(tensors, folder / WEIGHTS)
    return drafter


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def change_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / WEIGHTS
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def split(folder: Path) -> dict[str, str]:
    """Puts the tensors into two files under an index; returns its ``weight_map``."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def refusal(folder: Path) -> CheckpointError:
    """What loading the drafter in ``folder`` fails with."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_drafter(folder)
    return caught.value
