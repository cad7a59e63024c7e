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
        """One line a figure; rows are a table, with a column for each of them if they are few."""
        width = max(len(name) for name in self.figures)
        lines = [f"suite {self.suite}"]
        for name, value in self.figures.items():
            if _has_rows(value):
                lines += [name, *(f"  {line}" for line in _table(value))]
            else:
                lines.append(f"{name:<{width}}  {value}")
        return "\n".join(lines)


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of what is in the rows, but for what is nested in them; that is in the JSON."""
    names = [n for n, v in rows[0].items() if not isinstance(v, dict | list)]
    table = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    if len(names) > len(rows):
        table = [list(column) for column in zip(*table, strict=True)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in table
    ]


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


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
