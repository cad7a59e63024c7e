"""Processes of the Ray actors that this process has started."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cluster.cli.processes import find_descendants


def actors(title: str) -> list[int]:
    """Ids of the processes of all actors whose title begins so."""
    found = []
    for process in find_descendants(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
            if command.startswith(f"ray::{title}"):
                found.append(process.pid)
    return found
