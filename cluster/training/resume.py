"""What a training run leaves on disk: a state to go on from, and a summary of how it went."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.errors import CheckpointError, ConfigError
from cluster.training.optimization import Budget, Optimizers

_FILE = "training_state.pt"
_SUMMARY = "training.json"


def save_training_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    budget: Budget,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the state before step ``step``; a crash while writing leaves the previous one.

    ``settings`` are what must be the same when the run goes on, by dotted key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "spent_seconds": budget.spent_seconds,
        "settings": dict(settings or {}),
    }
    partial = folder / (_FILE + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / _FILE)


def load_training_state(
    folder: Path,
    model: nn.Module,
    optimizers: Optimizers,
    budget: Budget,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Restores a saved state into the arguments and returns its step; 0 where none is saved.

    Raises:
        CheckpointError: the file is broken.
        ConfigError: names the first of ``settings`` that the run did not begin with.
    """
    path = folder / _FILE
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(str(path), None, f"broken training state: {error}") from error
    for key, value in (settings or {}).items():
        if saved.get(key) != value:
            raise ConfigError(
                key,
                f"is {value!r}, but the run in {folder} began with {saved.get(key)!r}; "
                "change it back, or name another output folder",
            )
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    budget.spent_seconds = state["spent_seconds"]
    return int(state["step"])


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes what a finished run reports beside its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (_SUMMARY + ".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / _SUMMARY)


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary in ``folder``; empty where there is none."""
    path = folder / _SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
