"""The Serve application that a configuration makes, without a Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve import Application, Deployment

from cluster.actors.app import build
from cluster.actors.launch import _required_resources
from cluster.config import ClusterConfig
from cluster.errors import ConfigError


def _deployments(args: dict[str, Any]) -> dict[str, Deployment]:
    """Each deployment with what is bound to it, by name."""
    found: dict[str, Deployment] = {}

    def visit(application: Application) -> None:
        bound = application._bound_deployment
        found[bound.name] = bound
        for part in bound.init_args[1:]:
            visit(part)

    visit(build(args))
    return found


def _parts(args: dict[str, Any]) -> dict[str, tuple[int, ClusterConfig]]:
    """Replicas and configuration of each deployment, by name."""
    return {
        name: (bound.num_replicas, bound.init_args[0]) for name, bound in _deployments(args).items()
    }


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


def test_a_part_that_scales_has_a_range_and_the_others_report() -> None:
    deployments = _deployments(
        {
            "target": {"model": "m", "num_replicas": 2},
            "speculative": {"model": "d"},
            "drafter": {"num_replicas": 0, "max_replicas": 3},
        }
    )
    ranges = {}
    for name, bound in deployments.items():
        scaling = bound._deployment_config.autoscaling_config
        assert scaling is not None
        ranges[name] = (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas)
    assert ranges == {"Router": (1, 1, 1), "TargetReplica": (2, 2, 2), "Drafter": (0, 0, 3)}


def test_parts_are_placed_by_their_resources() -> None:
    deployments = _deployments(
        {
            "target": {"model": "m", "resources": {"target-node": 1}},
            "speculative": {"model": "d"},
            "drafter": {"num_gpus": 0.5, "resources": {"drafter-node": 2}},
            "router": {"resources": {"router-node": 0.5}},
        }
    )
    for name, asked in (("Router", {"router-node": 0.5}), ("Drafter", {"drafter-node": 2})):
        assert deployments[name].ray_actor_options["resources"] == asked


def test_a_front_lives_with_the_first_shard() -> None:
    """Else one more node's end would be the replica's."""
    target = {"model": "m", "tensor_parallel_size": 2, "num_cpus": 3, "num_gpus": 0.5}
    target |= {"resources": {"target-node": 1}, "placement_strategy": "STRICT_SPREAD"}
    front = _deployments({"target": target})["TargetReplica"]
    bundle = {"CPU": 3, "GPU": 0.5, "target-node": 1}
    assert front._replica_config.placement_group_bundles == [bundle, bundle]
    assert front._replica_config.placement_group_strategy == "STRICT_SPREAD"
    assert front.ray_actor_options == {"num_cpus": 0}


def test_a_shard_that_would_reserve_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"target\.num_cpus must be above 0"):
        build({"target": {"model": "m", "num_cpus": 0}})
    build({"target": {"model": "m", "num_cpus": 0, "resources": {"target-node": 1}}})


def test_a_ray_that_is_started_here_is_every_pool() -> None:
    config = ClusterConfig.parse(
        {
            "target": {
                "model": "m",
                "num_replicas": 2,
                "tensor_parallel_size": 2,
                "resources": {"gpu-node": 1, "fast": 0.5},
            },
            "speculative": {"method": "ngram", "num_speculative_tokens": 2},
            "drafter": {"num_replicas": 3, "resources": {"gpu-node": 0.25}},
        }
    )
    assert _required_resources(config) == {"gpu-node": 4 + 1, "fast": 2}
