"""Processes by id and start time, so that a number used anew is never taken for its predecessor."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_POLL_S = 0.1
_END_TIMEOUT_S = 5.0
_PROC = Path("/proc")


class Process(NamedTuple):
    """A process: its id, and when it started as the system writes that."""

    pid: int
    started: str


def find_process(pid: int) -> Process | None:
    """The live process with this id, or ``None``."""
    for process, _ in _list_processes():
        if process.pid == pid:
            return process
    return None


def find_descendants(pid: int) -> list[Process]:
    """Every live process below ``pid``, not ``pid`` itself."""
    children: dict[int, list[Process]] = {}
    for process, parent in _list_processes():
        children.setdefault(parent, []).append(process)
    found: list[Process] = []
    pending = [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found.extend(below)
        pending.extend(process.pid for process in below)
    return found


def signal_process(process: Process, number: signal.Signals) -> None:
    """Sends a signal, to this very process only."""
    if find_process(process.pid) == process:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def wait_gone(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Waits until the processes have ended; returns those that still live after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    remaining = set(processes)
    while remaining:
        remaining &= {process for process, _ in _list_processes()}
        if not remaining or time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S)
    return sorted(remaining)


def end_processes(processes: Iterable[Process]) -> list[Process]:
    """Asks the processes to end, then kills what still lives; returns what outlives even that."""
    remaining = wait_gone(processes, 0.0)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in remaining:
            signal_process(process, number)
        remaining = wait_gone(remaining, _END_TIMEOUT_S)
    return remaining


def _list_processes() -> list[tuple[Process, int]]:
    """Live processes with their parents' ids; those that only wait to be reaped are left out."""
    return _list_from_proc() if _PROC.is_dir() else _list_from_ps()


def _list_from_proc() -> list[tuple[Process, int]]:
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:  # ended meanwhile
            continue
        # The command's name stands in parentheses and may hold anything; fields as in proc(5).
        fields = stat.rpartition(")")[2].split()
        state, parent, started = fields[0], int(fields[1]), fields[19]
        if state != "Z":
            found.append((Process(int(entry.name), started), parent))
    return found


def _list_from_ps() -> list[tuple[Process, int]]:
    command = ["ps", "-A", "-o", "pid=,ppid=,stat=,lstart="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for line in lines:
        pid, parent, state, started = line.split(None, 3)
        if not state.startswith("Z"):
            found.append((Process(int(pid), started.strip()), int(parent)))
    return found
