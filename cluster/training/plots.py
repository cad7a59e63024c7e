"""Draws a training run's figures over its steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_history(history: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes ``loss.png`` and ``acceptance.png`` to ``folder``, each replaced atomically.

    Args:
        history: rows of ``Reporter``'s history file.
        folder: exists.
    """
    training = [row for row in history if "loss" in row]
    heldout = [row for row in history if "heldout_acceptance" in row]
    if training:
        _save(_loss_figure(training), folder / "loss.png")
    if heldout:
        _save(_acceptance_figure(training, heldout), folder / "acceptance.png")


def _loss_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    for name in ("loss", "cross_entropy", "total_variation", "confidence"):
        if name in rows[0]:
            axes.plot(steps, [row[name] for row in rows], label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.legend()
    return figure


def _acceptance_figure(
    training: Sequence[dict[str, Any]], heldout: Sequence[dict[str, Any]]
) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    lengths, positions = figure.subplots(1, 2)
    for rows, name, label in (
        (training, "acceptance_length", "training"),
        (heldout, "heldout_acceptance_length", "held-out"),
    ):
        lengths.plot([row["step"] for row in rows], [row[name] for row in rows], label=label)
    lengths.set_xlabel("step")
    lengths.set_ylabel("acceptance length")
    lengths.legend()
    steps = [row["step"] for row in heldout]
    rates = [row["heldout_acceptance"] for row in heldout]
    for position in range(len(rates[-1])):
        positions.plot(steps, [rate[position] for rate in rates], label=f"position {position + 1}")
    positions.set_xlabel("step")
    positions.set_ylabel("held-out acceptance Σ min(p, q)")
    positions.legend(fontsize="small")
    return figure


def _save(figure: Figure, path: Path) -> None:
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
