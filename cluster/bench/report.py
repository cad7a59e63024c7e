"""What a suite found, and the machine it found it on."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import dataclass
from typing import Any

import torch

from cluster.engine.machine import accelerator_name, num_cores, processor_name


@dataclass(frozen=True)
class Report:
    """The result of one suite.

    Attributes:
        figures: the suite's figures by name (DESIGN.md, commands).
        passed: whether the suite's own bar holds; the command's exit status follows it.
    """

    suite: str
    figures: dict[str, Any]
    passed: bool

    def to_json(self) -> str:
        """One JSON object: suite, command, machine, figures."""
        return json.dumps(
            {
                "suite": self.suite,
                "command": shlex.join(sys.argv),
                "machine": describe_machine(),
                "figures": self.figures,
            }
        )

    def to_text(self) -> str:
        """One line a figure, and one for each row of a figure that has rows."""
        width = max(len(name) for name in self.figures)
        lines = [f"suite {self.suite}"]
        for name, value in self.figures.items():
            if _has_rows(value):
                lines += [f"{name:<{width}}  {_row_text(row)}" for row in value]
            else:
                lines.append(f"{name:<{width}}  {value}")
        return "\n".join(lines)


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _row_text(row: dict[str, Any]) -> str:
    """What is in a row, but for what is nested in it; that is in the JSON."""
    flat = (f"{name} {value}" for name, value in row.items() if not isinstance(value, dict))
    return ", ".join(flat)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, accelerator and versions that a figure depends on."""
    return {
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": num_cores(),
        "accelerator": accelerator_name() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
