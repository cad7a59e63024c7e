"""The Serve application that a configuration makes, without a Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve import Application

from cluster.actors.app import build
from cluster.config import ClusterConfig


def _parts(args: dict[str, Any]) -> dict[str, tuple[int, ClusterConfig]]:
    """Replicas and configuration of each deployment, by name."""
    found: dict[str, tuple[int, ClusterConfig]] = {}

    def visit(application: Application) -> None:
        bound = application._bound_deployment
        config, *parts = bound.init_args
        found[bound.name] = (bound.num_replicas, config)
        for part in parts:
            visit(part)

    visit(build(args))
    return found


@pytest.mark.parametrize("num_drafters", [1, 3])
def test_every_part_is_deployed(num_drafters: int) -> None:
    parts = _parts(
        {
            "target": {"model": "m", "num_replicas": 2},
            "speculative": {"model": "d"},
            "drafter": {"num_replicas": num_drafters},
        }
    )
    counts = {name: count for name, (count, _) in parts.items()}
    assert counts == {"Router": 1, "TargetReplica": 2, "Drafter": num_drafters}
    assert all(config.speculative is not None for _, config in parts.values())


@pytest.mark.parametrize(
    "args",
    [{}, {"speculative": {"model": "d"}, "drafter": {"num_replicas": 0}}],
    ids=["not configured", "none of them"],
)
def test_without_drafters_the_target_decodes_plainly(args: dict[str, Any]) -> None:
    parts = _parts({"target": {"model": "m"}, **args})
    assert parts.keys() == {"Router", "TargetReplica"}
    assert all(config.speculative is None for _, config in parts.values())
