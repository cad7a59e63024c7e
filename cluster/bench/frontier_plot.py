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


def plot_ways(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws throughput over concurrency, relative to none: adaptive and every fixed number.

    Args:
        rows: as of suite ``frontier``.
        path: of the picture, in a folder that exists.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    throughput, budget = figure.subplots(1, 2)
    loads = [row["concurrency"] for row in rows]
    for way in rows[0]["fixed"] if rows else ():
        if way != "plain":
            ratios = [row["fixed"][way] / row["plain"] for row in rows]
            throughput.plot(loads, ratios, marker=".", linewidth=1, label=f"always {way}")
    adaptive = [row["adaptive"] / row["plain"] for row in rows]
    throughput.plot(loads, adaptive, marker="o", linewidth=2.5, color="black", label="adaptive")
    throughput.axhline(1.0, color="0.6", linewidth=1)
    throughput.set_ylabel("throughput over that without speculation")
    throughput.legend(fontsize="small")
    budget.plot(loads, [row["budget"] for row in rows], marker="o", color="black")
    budget.set_ylabel("adaptive: guesses verified for a request and pass")
    budget.set_ylim(bottom=0)
    for axes in (throughput, budget):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("requests at once")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
