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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cluster.bench.report import Report
from cluster.errors import ConfigError

# A configuration comes from a file: there is nothing to send it to.
WITHOUT_PORT = frozenset({"config"})


def run(
    *,
    surfaces: Sequence[str],
    num_messages: int,
    num_live_messages: int,
    num_engine_messages: int = 0,
    seed: int = 1,
    max_seconds: int = 3600,
    num_at_once: int = 2,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs the suite.

    Args:
        surfaces: of ``SURFACES``.
        num_messages: of each surface in its process.
        num_live_messages: of each surface that has a port, through sockets.
        num_engine_messages: of drafters to an engine, which has to ask for each.
        max_seconds: of each process.
        num_at_once: processes.
        note: takes a line of progress.

    Raises:
        ConfigError: atheris or coverage is not installed.
    """
    for package in ("atheris", "coverage"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(package, "is not installed; it is one of the extra `dev`, for Linux")
    tasks: list[Callable[[], dict[str, Any]]] = []
    for name in surfaces:
        tasks.append(partial(_explore, name, num_messages, seed, max_seconds))
        if num_live_messages:
            tasks.append(partial(_send_live, name, num_live_messages, seed, max_seconds))
        if name == "proposals" and num_engine_messages:
            tasks.append(partial(_send_live, "engine", num_engine_messages, seed, max_seconds))
    rows = []
    with ThreadPoolExecutor(num_at_once) as pool:
        for row in pool.map(lambda task: task(), tasks):
            note(str(row))
            rows.append(row)
    live_rows = [row for row in rows if row["through"] == "sockets"]
    rows = [row for row in rows if row["through"] == "functions"]
    figures = {
        "messages": sum(row["messages"] for row in (*rows, *live_rows) if row["messages"] != "n/a"),
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
            "through": "functions",
            "messages": int(statistics.get("number_of_executed_units", 0)),
            "outcomes": json.loads(counts.read_text()) if counts.exists() else {},
            **covered,
            "peak_memory_mb": int(statistics.get("peak_rss_mb", 0)),
            "failures": failures,
        }


def _send_live(name: str, num_messages: int, seed: int, max_seconds: int) -> dict[str, Any]:
    """One surface through sockets, its server and its clients in one process."""
    row = {"surface": name, "through": "sockets", "messages": "n/a", "failures": []}
    if name in WITHOUT_PORT:
        return row
    sent = _child("live", name, str(num_messages), str(seed), timeout_s=max_seconds)
    if sent.returncode != 0:
        failure = f"ended with {sent.returncode}: {sent.stderr[-2000:]}"
        return {**row, "messages": 0, "failures": [failure]}
    return {**row, **json.loads(sent.stdout.splitlines()[-1])}


def _child(*arguments: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Its output, and status 124 where it took longer than ``timeout_s``."""
    command = [sys.executable, "-m", "cluster.bench.fuzz_child", *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"not through in {timeout_s} s")
