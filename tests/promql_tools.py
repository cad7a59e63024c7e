"""Expressions of rules and dashboards: what they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "deployments" / "rules" / "dspark.yaml"
DASHBOARDS = sorted((ROOT / "deployments" / "dashboards").glob("*.json"))
# What Grafana puts in.
_VARIABLES = {"$__rate_interval": "1m", "$model": ".*"}


def alerts() -> dict[str, dict[str, Any]]:
    """Every alert by its name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def panel_expressions() -> dict[str, str]:
    """Every expression of a dashboard, as Grafana sends it, by where it is."""
    found = {}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"]
                for name, text in _VARIABLES.items():
                    expression = expression.replace(name, text)
                assert "$" not in expression, expression
                found[f"{path.stem}: {panel['title']}.{target['refId']}"] = expression
    return found


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Names that an expression reads, with the labels it asks for. Raises: ValueError."""
    found = []
    for node in _walk(promql_parser.parse(expression)):
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {m.name: m.value for m in node.matchers.matchers}))
    return found


def grouped_labels(expression: str) -> set[str]:
    """Labels that an expression aggregates by."""
    found: set[str] = set()
    for node in _walk(promql_parser.parse(expression)):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            found.update(node.modifier.labels)
    return found


def _walk(node: Any) -> Iterator[Any]:
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector", "vs", "args"):
        child = getattr(node, name, None)
        for part in child if isinstance(child, list) else [child]:
            if part is not None and type(part).__module__ == type(node).__module__:
                yield from _walk(part)
