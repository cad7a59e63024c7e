"""The policies as Ray Serve's controller calls them, without a Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import cloudpickle
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.schema import ServeDeploySchema

from cluster.actors import autoscaling
from cluster.actors.autoscaling import (
    ApplicationPolicy,
    KeepReplicas,
    scaling_options,
    target_stats,
)
from cluster.actors.names import DRAFTER, ROUTER, TARGET_REPLICA
from cluster.config import ClusterConfig
from cluster.engine.load import EngineLoad, SpeculationLoad
from cluster.serve_config import load_serve_config

CONFIG = ClusterConfig.parse(
    {
        "target": {
            "model": "m",
            "max_num_seqs": 16,
            "max_replicas": 4,
            "scaling": {"up_s": 2.0, "target_load": 0.5},
        },
        "speculative": {"model": "d"},
        "drafter": {"max_replicas": 3, "scaling": {"up_s": 1.0, "to_zero_s": 5.0}},
    }
)
PLENTY = SpeculationLoad(
    draft_seconds_per_second=0.9, goodput=100.0, goodput_plain=60.0, goodput_added_drafter=150.0
)


class Controller:
    """Calls the policy as Serve does, and does what it says."""

    def __init__(self, config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(autoscaling.time, "monotonic", lambda: self.now)
        self.policy = ApplicationPolicy()
        self.configs = {
            name: scaling_options(config, name)["autoscaling_config"]
            for name in (DRAFTER, TARGET_REPLICA, ROUTER)
        }
        self.counts = {name: c.initial_replicas for name, c in self.configs.items()}

    def run(self, loads: list[EngineLoad], seconds: float, *, num_requests: int = 0) -> None:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            stats = {
                TARGET_REPLICA: [target_stats(load) for load in loads],
                ROUTER: [{"num_requests": num_requests, "num_queued_tokens": 0}],
            }
            contexts = {
                DeploymentID(name=name, app_name="app"): self._context(name, stats.get(name, []))
                for name in self.configs
            }
            decisions, state = self.policy(contexts)
            assert state == {}
            for identity, count in decisions.items():
                self.counts[identity.name] = count

    def _context(self, name: str, stats: list[dict[str, float]]) -> AutoscalingContext:
        identity = DeploymentID(name=name, app_name="app")
        replicas = [ReplicaID(f"{i}", identity) for i in range(self.counts[name])]
        metrics: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
        for replica, values in zip(replicas, stats, strict=False):
            for key, value in values.items():
                series = [TimeStampedValue(0.0, -1.0), TimeStampedValue(1.0, value)]
                metrics.setdefault(key, {})[replica] = series
        config = self.configs[name]
        return AutoscalingContext(
            deployment_id=identity,
            deployment_name=name,
            app_name="app",
            current_num_replicas=len(replicas),
            target_num_replicas=self.counts[name],
            running_replicas=replicas,
            total_num_requests=0.0,
            total_queued_requests=0.0,
            aggregated_metrics=None,
            raw_metrics=lambda: metrics,
            capacity_adjusted_min_replicas=config.min_replicas,
            capacity_adjusted_max_replicas=config.max_replicas,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=None,
            config=config,
        )


Make = Callable[[ClusterConfig], Controller]


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    return Controller(CONFIG, monkeypatch)


def test_a_drafter_more_where_targets_would_gain(controller: Controller) -> None:
    load = EngineLoad(num_running=4, speculation_state="on", speculation=PLENTY)
    assert controller.counts[DRAFTER] == 1
    controller.run([load], 4.0)
    assert controller.counts[DRAFTER] == 2
    assert controller.counts[TARGET_REPLICA] == 1


def test_no_drafters_where_speculation_is_off_everywhere(controller: Controller) -> None:
    controller.run([EngineLoad(num_running=4, speculation_state="off")], 4.0)
    assert controller.counts[DRAFTER] == 1
    controller.run([EngineLoad(num_running=4, speculation_state="off")], 3.0)
    assert controller.counts[DRAFTER] == 0
    again = SpeculationLoad(goodput=100.0, goodput_plain=60.0, goodput_added_drafter=100.0)
    controller.run([EngineLoad(num_running=4, speculation_state="off", speculation=again)], 4.0)
    assert controller.counts[DRAFTER] >= 1


def test_replicas_for_the_requests_that_routers_have(controller: Controller) -> None:
    controller.run([EngineLoad(num_running=4)], 3.0, num_requests=32)
    assert controller.counts[TARGET_REPLICA] == 4


def test_before_any_report_nothing_changes(controller: Controller) -> None:
    before = dict(controller.counts)
    controller.run([], 30.0)
    assert controller.counts == before


def test_what_has_a_fixed_number_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "target": {"model": "m", "num_replicas": 2},
        "speculative": {"model": "d"},
        "drafter": {"min_replicas": 1, "max_replicas": 2},
    }
    controller = Controller(ClusterConfig.parse(values), monkeypatch)
    load = EngineLoad(num_running=16, speculation_state="on", speculation=PLENTY)
    controller.run([load, load], 60.0, num_requests=1000)
    assert controller.counts == {DRAFTER: 2, TARGET_REPLICA: 2, ROUTER: 1}
    assert ApplicationPolicy()({}) == ({}, {})


def test_a_fixed_cluster_has_no_ranges() -> None:
    config = ClusterConfig.parse({"target": {"model": "m", "num_replicas": 2}})
    assert scaling_options(config, TARGET_REPLICA) == {"num_replicas": 2}
    assert scaling_options(config, ROUTER) == {"num_replicas": 1}


def test_the_options_reach_the_controller_whole() -> None:
    scaling: AutoscalingConfig = scaling_options(CONFIG, DRAFTER)["autoscaling_config"]
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 3)
    # The least that Serve reports by default is every 10 s, and it changes after 30 s.
    assert scaling.metrics_interval_s <= 1.0
    assert scaling.upscale_delay_s == scaling.downscale_delay_s == 0.0
    sent = DeploymentConfig.from_proto_bytes(
        DeploymentConfig(autoscaling_config=scaling).to_proto_bytes()
    )
    assert sent.autoscaling_config is not None
    policy = sent.autoscaling_config.policy
    assert policy.policy_kwargs == CONFIG.drafter.scaling.model_dump()
    kept = policy.get_policy()(**policy.policy_kwargs)
    assert type(kept).__name__ == KeepReplicas.__name__


def test_serve_is_told_of_the_policy_where_something_scales(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    application: dict[str, Any] = {
        "name": "app",
        "import_path": "cluster.actors.app:build",
        "args": {"target": {"model": "m"}, "speculative": {"model": "d"}},
    }
    path.write_text(yaml.safe_dump({"applications": [application]}))
    assert "autoscaling_policy" not in load_serve_config(path)[0]["applications"][0]
    application["args"]["drafter"] = {"max_replicas": 2}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    document = ServeDeploySchema.model_validate(load_serve_config(path)[0])
    policy = document.applications[0].autoscaling_policy
    assert policy is not None
    module, _, name = policy["policy_function"].partition(":")
    assert module == autoscaling.__name__
    # As Serve sends it to its controller.
    cloudpickle.register_pickle_by_value(autoscaling)
    made = cloudpickle.loads(cloudpickle.dumps(getattr(autoscaling, name)))()
    cloudpickle.unregister_pickle_by_value(autoscaling)
    assert made({}) == ({}, {})
