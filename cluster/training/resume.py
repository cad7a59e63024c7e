"""What a training run leaves on disk: a state to go on from, and a summary of how it went."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.training.optimization import Budget, Optimizers

_FILE = "training_state.pt"
_SUMMARY = "training.json"


def save_training_state(
    folder: Path, step: int, model: nn.Module, optimizers: Optimizers, budget: Budget
) -> None:
    """Writes the state before step ``step``; a crash while writing leaves the previous one."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "spent_seconds": budget.spent_seconds,
    }
    partial = folder / (_FILE + ".partial")
    torch.save(state, partial)
    os.replace(partial, folder / _FILE)


def load_training_state(
    folder: Path, model: nn.Module, optimizers: Optimizers, budget: Budget
) -> int:
    """Restores a saved state into the arguments and returns its step; 0 where none is saved."""
    path = folder / _FILE
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    budget.spent_seconds = state["spent_seconds"]
    return int(state["step"])


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes what a finished run reports beside its checkpoint."""
    text = json.dumps(summary, indent=2) + "\n"
    (folder / _SUMMARY).write_text(text, encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary in ``folder``; empty where there is none."""
    path = folder / _SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
