"""Pictures of simulated fleets; needs matplotlib (extra ``train``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DPI = 120


def plot_timeline(figures: dict[str, Any], path: Path) -> None:
    """Draws load, throughput, modes and drafters over time, one above the other.

    Args:
        figures: of one run, with a timeline of at least one row.
        path: of the picture, in a folder that exists.
    """
    from matplotlib.figure import Figure

    rows = figures["timeline"]
    times = [row["time_s"] for row in rows]
    figure = Figure(figsize=(9, 8), layout="constrained")
    load, throughput, modes, drafters = figure.subplots(4, 1, sharex=True)
    for name in ("running", "waiting"):
        load.plot(times, [row[name] for row in rows], label=name)
    load.set_ylabel("requests")
    throughput.plot(times, [row["throughput"] for row in rows])
    throughput.set_ylabel("tokens/s")
    names = list(rows[0]["modes"])
    modes.stackplot(times, [[row["modes"][name] for row in rows] for name in names], labels=names)
    modes.set_ylabel("busy replicas by mode")
    drafters.step(times, [row["drafters_wanted"] for row in rows], where="post", label="wanted")
    drafters.step(times, [row["drafters"] for row in rows], where="post", label="ready")
    drafters.set_ylabel("drafters")
    drafters.set_xlabel("simulated seconds")
    used = drafters.twinx()
    used.plot(times, [row["drafter_utilisation"] for row in rows], color="grey", alpha=0.6)
    used.set_ylabel("utilisation (grey)")
    used.set_ylim(0, 1)
    for axes in (load, modes, drafters):
        axes.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=_DPI)


def plot_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws throughput of each way over concurrency, or over the number of drafters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if "drafters" in rows[0]:
        key, lines = "drafters", {"throughput": [row["throughput"] for row in rows]}
    else:
        key = "concurrency"
        lines = {f"fixed {w}": [r["fixed"][w] for r in rows] for w in rows[0]["fixed"]}
        lines["adaptive"] = [row["adaptive"] for row in rows]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    for name, values in lines.items():
        width = 2.5 if name == "adaptive" else 1.2
        axes.plot([row[key] for row in rows], values, marker="o", label=name, linewidth=width)
    axes.set_xlabel(key)
    axes.set_ylabel("tokens/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)
