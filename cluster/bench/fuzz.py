"""Suite ``fuzz``: broken messages, a million of them, against everything that strangers reach.

Two ways for each surface. In a process of its own libFuzzer (atheris) mutates valid inputs, guided
by the branches that they reach, against the functions that decode and check them; and mutated
messages go through live sockets to a router with a replica, or to a drafter. The bar: every input
is accepted or refused with a typed error; no crash, no hang, no memory or session left behind.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.report import Report
from cluster.errors import ConfigError

LIVE_SURFACES = ("client", "http", "drafter")
_MAX_MEMORY_GROWTH_MB = 200.0


def run(
    *,
    surfaces: Sequence[str],
    num_messages: int,
    num_live_messages: int,
    seed: int = 1,
    max_seconds: int = 3600,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs the suite.

    Args:
        surfaces: of ``SURFACES``.
        num_messages: of each surface in its process.
        num_live_messages: of each of ``LIVE_SURFACES`` among them, through sockets.
        max_seconds: of each process.
        note: takes a line of progress.

    Raises:
        ConfigError: atheris or coverage is not installed.
    """
    for package in ("atheris", "coverage"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(package, "is not installed; it is one of the extra `dev`, for Linux")
    rows, live_rows = [], []
    for name in surfaces:
        rows.append(_explore(name, num_messages, seed, max_seconds))
        note(f"{name}: {rows[-1]}")
    for name in surfaces:
        if name in LIVE_SURFACES and num_live_messages:
            # Here, since it imports the engine.
            from cluster.bench.fuzz_sockets import fuzz_sockets

            live = fuzz_sockets(name, num_live_messages, seed)
            if live["memory_growth_mb"] > _MAX_MEMORY_GROWTH_MB:
                live["failures"].append(f"memory grew by {live['memory_growth_mb']} MB")
            live_rows.append(live)
            note(f"{name}, live: {live_rows[-1]}")
    figures = {
        "messages": sum(row["messages"] for row in (*rows, *live_rows)),
        "failures": sum(len(row["failures"]) for row in (*rows, *live_rows)),
        "in_process": rows,
        "live": live_rows,
    }
    return Report("fuzz", figures, passed=figures["failures"] == 0)


def _explore(name: str, num_messages: int, seed: int, max_seconds: int) -> dict[str, Any]:
    """One surface in its process; a found input is in ``failures``, as hexadecimal digits."""
    with tempfile.TemporaryDirectory(prefix="dspark-fuzz-") as folder:
        corpus, counts = Path(folder) / "corpus", Path(folder) / "counts.json"
        corpus.mkdir()
        arguments = [str(corpus), str(counts), str(num_messages), str(seed), str(max_seconds)]
        explored = _child("explore", name, *arguments)
        failures = []
        if explored.returncode != 0:
            found = [path.read_bytes().hex() for path in Path(folder).glob("[cto]*-*")]
            failures.append(f"{' '.join(found)}: {explored.stderr[-2000:]}")
        statistics = dict(
            line.removeprefix("stat::").split(":")
            for line in explored.stderr.splitlines()
            if line.startswith("stat::")
        )
        replayed = _child("replay", name, str(corpus))
        if replayed.returncode != 0:
            failures.append(f"replaying what was kept: {replayed.stderr[-2000:]}")
            covered = {}
        else:
            covered = json.loads(replayed.stdout)
        return {
            "surface": name,
            "messages": int(statistics.get("number_of_executed_units", 0)),
            "outcomes": json.loads(counts.read_text()) if counts.exists() else {},
            **covered,
            "peak_memory_mb": int(statistics.get("peak_rss_mb", 0)),
            "failures": failures,
        }


def _child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.bench.fuzz_child", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
