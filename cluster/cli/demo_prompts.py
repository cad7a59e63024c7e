"""Prompts for the demo: beginnings of functions that the shipped model has never seen."""

from __future__ import annotations

import importlib
import inspect
import operator
from dataclasses import dataclass

# All from modules in cluster/training/heldout_modules.txt, read where Python is installed.
_GREEDY = (
    ("textwrap", "TextWrapper.wrap"),
    ("statistics", "median"),
    ("json.decoder", "JSONDecoder.decode"),
    ("calendar", "TextCalendar.formatweek"),
)
_SEEDED = (
    ("heapq", "nsmallest"),
    ("csv", "Sniffer.sniff"),
    ("configparser", "RawConfigParser.has_option"),
    ("fractions", "Fraction.limit_denominator"),
)
_NUM_LINES = 4
_TEMPERATURE = 0.8


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt, and how its continuation is sampled."""

    name: str
    text: str
    temperature: float = 0.0
    seed: int | None = None

    @property
    def kind(self) -> str:
        """greedy or seeded."""
        return "greedy" if self.seed is None else "seeded"


def demo_prompts() -> list[DemoPrompt]:
    """Half of them greedy, half seeded, taking turns."""
    prompts = []
    for seed, (greedy, seeded) in enumerate(zip(_GREEDY, _SEEDED, strict=True), start=1):
        prompts.append(DemoPrompt(".".join(greedy), _beginning(*greedy)))
        prompts.append(
            DemoPrompt(".".join(seeded), _beginning(*seeded), temperature=_TEMPERATURE, seed=seed)
        )
    return prompts


def _beginning(module: str, name: str) -> str:
    function = operator.attrgetter(name)(importlib.import_module(module))
    lines = inspect.getsource(function).splitlines(keepends=True)
    return "".join(lines[:_NUM_LINES])
