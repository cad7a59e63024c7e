"""Draws what evaluations found; needs matplotlib, which comes with the extra ``train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.bench.evaluation import Evaluation
from cluster.speculation.calibration import LogitScaling, survival
from cluster.speculation.reliability import calibration_error, reliability_bins
from cluster.training.report import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMALLEST_BIN = 20  # rounds; the mean of fewer says too little to be drawn


def check_plots() -> None:
    """Raises ConfigError, which says how to install it, where matplotlib is missing."""
    require_extra("--out", "matplotlib")


def plot_positions(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws acceptance by position, one picture a data set and temperature, a line a drafter.

    Args:
        rows: as of ``Evaluation.figures``.
        folder: exists.

    Returns:
        The files, ``positions-DATASET-TEMPERATURE.png``.
    """
    paths = []
    for dataset, temperature in dict.fromkeys((r["dataset"], r["temperature"]) for r in rows):
        figure = _new_figure(11, 4)
        conditional, total = figure.subplots(1, 2)
        for row in rows:
            if (row["dataset"], row["temperature"]) != (dataset, temperature) or not row["rounds"]:
                continue
            positions = np.arange(1, len(row["acceptance_rate"]) + 1)
            label = f"{row['drafter']} ({row['acceptance_length']:.2f}, {row['rounds']} rounds)"
            values = [np.nan if v is None else v for v in row["conditional_acceptance"]]
            conditional.plot(positions, values, marker="o", label=label)
            total.plot(positions, row["acceptance_rate"], marker="o", label=label)
        for axes, name in (
            (conditional, "accepted, where all before were"),
            (total, "accepted, of all rounds"),
        ):
            axes.set_xlabel("position")
            axes.set_ylabel(name)
            axes.set_ylim(0, 1)
        total.legend(title="acceptance length")
        figure.suptitle(f"{dataset}, temperature {temperature:g}")
        paths.append(folder / f"positions-{dataset}-{temperature:g}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def plot_reliability(evaluation: Evaluation, folder: Path) -> Path:
    """Draws survival against outcome by position, before and after calibration.

    Returns:
        The file, ``reliability-DRAFTER-DATASET-VERIFIER-TEMPERATURE.png`` in ``folder``.
    """
    table, num_positions = evaluation.table, evaluation.table.num_positions
    num_columns = min(4, num_positions)
    num_rows = -(-num_positions // num_columns)
    figure = _new_figure(3.2 * num_columns, 3.2 * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    for index, axes in enumerate(grid.flat):
        if index >= num_positions:
            axes.set_axis_off()
            continue
        axes.plot((0, 1), (0, 1), color="0.8", linewidth=1)
        if not table.is_drafted[:, index].any():
            continue
        for name, scaling in (
            ("raw", LogitScaling.identity(num_positions)),
            ("calibrated", evaluation.scaling),
        ):
            _draw_bins(axes, evaluation, index, name, scaling)
        axes.set_title(f"position {index + 1}", fontsize="medium")
        axes.legend(fontsize="small", title="ECE")
    figure.supxlabel("survival, as predicted")
    figure.supylabel("accepted up to here")
    key = evaluation.key
    figure.suptitle(
        f"{evaluation.drafter.name} on {evaluation.dataset}, {key.verifier}, temperature "
        f"{evaluation.temperature:g}, {len(table)} rounds"
    )
    name = (
        f"reliability-{evaluation.drafter.name}-{evaluation.dataset}-{key.verifier}-"
        f"{evaluation.temperature:g}.png"
    )
    figure.savefig(folder / name, dpi=120)
    return folder / name


def _draw_bins(
    axes: Axes, evaluation: Evaluation, index: int, name: str, scaling: LogitScaling
) -> None:
    table = evaluation.table
    rows = table.is_drafted[:, index]
    chances = survival(scaling.apply(table.confidences))[rows, index]
    outcomes = table.is_accepted[rows, index].astype(np.float64)
    bins = reliability_bins(chances, outcomes)
    is_drawn = bins.count >= _SMALLEST_BIN
    axes.plot(
        bins.mean_prediction[is_drawn],
        bins.mean_outcome[is_drawn],
        marker=".",
        label=f"{name} {calibration_error(chances, outcomes):.1%}",
    )


def _new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # draws without a display, in no window

    return Figure(figsize=(width, height), layout="constrained")
