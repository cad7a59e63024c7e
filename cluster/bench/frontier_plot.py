"""Draws throughput against interactivity; needs matplotlib (extra ``train``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_frontier(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a line for each side, a point for each concurrency.

    Args:
        rows: with ``concurrency``, ``throughput``, ``tokens_per_second_per_user`` and perhaps
            ``side``; points without a rate of their own are left out.
        path: of the picture, in a folder that exists.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for side in dict.fromkeys(row.get("side", "") for row in rows):
        points = [
            (row["tokens_per_second_per_user"], row["throughput"], row["concurrency"])
            for row in rows
            if row.get("side", "") == side and row["tokens_per_second_per_user"] is not None
        ]
        rates, throughputs, _ = zip(*points, strict=True) if points else ((), (), ())
        axes.plot(rates, throughputs, marker="o", label=side)
        for rate, throughput, concurrency in points:
            axes.annotate(f" {concurrency}", (rate, throughput), fontsize="small")
    axes.set_xlabel("interactivity: tokens per second of one user, median")
    axes.set_ylabel("throughput: tokens per second of all")
    axes.set_title("numbers are requests at once", fontsize="medium")
    axes.grid(alpha=0.3)
    if any(row.get("side") for row in rows):
        axes.legend()
    figure.savefig(path, dpi=120)
