"""The number of drafters and of target replicas, as an application-level policy of Ray Serve.

Target replicas and routers report what they know of their load (``record_autoscaling_stats``), and
Serve's controller calls the policy ten times a second with the latest reports. The decisions
themselves are ``PoolPolicy``'s and ``TargetPolicy``'s; here is only how they meet Serve:

- Serve reads an application-level policy from configuration files alone: ``autoscaling_policy``,
  which ``load_serve_config`` fills in. Without it every part keeps the replicas that it has.
- What the policy must know of our configuration travels in the arguments of each deployment's own
  policy, ``KeepReplicas``, since only that reaches the controller.
- Nothing here may wait: it runs in the controller's loop. Dwell times are the policies' own, so
  Serve's delays are 0.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster.actors.names import DRAFTER, ROUTER, TARGET_REPLICA
from cluster.config import ClusterConfig
from cluster.engine.load import EngineLoad
from cluster.routing.target_scaling import TargetLoad, TargetPolicy, TargetTiming
from cluster.scaling_config import ReplicaRange
from cluster.speculation.pool_policy import DraftDemand, PoolPolicy, PoolTiming

# How often a replica tells the controller. Serve takes a value in a fifth of what it looks back on.
_REPORT_S = 1.0
_LOOK_BACK_S = 2.5

Decisions = dict[DeploymentID, int]


class KeepReplicas:
    """A deployment's own policy: as many replicas as there are. Its arguments are for others."""

    def __init__(self, **_: Any) -> None:
        pass

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """As Serve calls it."""
        return context.target_num_replicas, {}


class ApplicationPolicy:
    """Decides for all deployments of an application; Serve's controller makes one and calls it."""

    def __init__(self) -> None:
        self._pool: PoolPolicy | None = None
        self._targets: TargetPolicy | None = None

    def __call__(
        self, contexts: Mapping[DeploymentID, AutoscalingContext]
    ) -> tuple[Decisions, dict[DeploymentID, dict[str, Any]]]:
        """As Serve calls it: contexts of the deployments that may scale, by their id.

        Returns:
            Replicas wanted of those that scale, and no state for Serve to keep.
        """
        now = time.monotonic()
        by_name = {identity.name: (identity, context) for identity, context in contexts.items()}
        if TARGET_REPLICA not in by_name:
            return {}, {}
        decisions: Decisions = {}
        target_id, targets = by_name[TARGET_REPLICA]
        stats = _latest(targets)
        if DRAFTER in by_name and _is_scaled(by_name[DRAFTER][1]):
            identity, drafters = by_name[DRAFTER]
            if self._pool is None:
                self._pool = PoolPolicy(
                    drafters.capacity_adjusted_min_replicas,
                    drafters.capacity_adjusted_max_replicas,
                    PoolTiming(**_arguments(drafters)),
                )
            decisions[identity] = self._pool.decide(
                [_demand(values) for values in stats],
                current=drafters.target_num_replicas,
                ready=len(drafters.running_replicas),
                now=now,
            )
        if _is_scaled(targets):
            if self._targets is None:
                arguments = _arguments(targets)
                self._targets = TargetPolicy(
                    targets.capacity_adjusted_min_replicas,
                    targets.capacity_adjusted_max_replicas,
                    arguments.pop("max_num_seqs"),
                    TargetTiming(**arguments),
                )
            routers = _latest(by_name[ROUTER][1]) if ROUTER in by_name else []
            decisions[target_id] = self._targets.decide(
                [_target_load(values) for values in stats],
                num_requests=round(sum(values.get("num_requests", 0.0) for values in routers)),
                current=targets.target_num_replicas,
                now=now,
            )
        return decisions, {}


def target_stats(load: EngineLoad | None) -> dict[str, float]:
    """What a target replica reports; empty before its engine has begun."""
    if load is None:
        return {}
    speculation = load.speculation
    return {
        "num_requests": load.num_running + load.num_waiting,
        "kv_cache_usage": load.kv_cache_usage,
        "is_off": float(load.speculation_state != "on"),
        "draft_seconds_per_second": speculation.draft_seconds_per_second,
        "draft_queue_seconds": speculation.draft_queue_seconds,
        "goodput": speculation.goodput,
        "goodput_plain": speculation.goodput_plain,
        "goodput_added": speculation.goodput_added_drafter,
        "goodput_removed": speculation.goodput_removed_drafter,
    }


def scaling_options(config: ClusterConfig, deployment: str) -> dict[str, Any]:
    """Options of a deployment that say how many replicas it has.

    Once one part scales, all are made to report; those that are fixed have a range of one number.
    """
    parts: dict[str, ReplicaRange] = {TARGET_REPLICA: config.target, DRAFTER: config.drafter}
    part = parts.get(deployment)
    num_replicas = config.router.num_replicas if part is None else part.initial
    if not config.is_scaled:
        return {"num_replicas": num_replicas}
    arguments: dict[str, Any] = {}
    if deployment == DRAFTER:
        arguments = config.drafter.scaling.model_dump()
    elif deployment == TARGET_REPLICA:
        arguments = {
            **config.target.scaling.model_dump(),
            "max_num_seqs": config.target.max_num_seqs,
        }
    policy = AutoscalingPolicy(
        policy_function=f"{__name__}:{KeepReplicas.__name__}", policy_kwargs=arguments
    )
    with warnings.catch_warnings():
        # The environment variable that is to take its place is one for all of a Ray cluster.
        warnings.simplefilter("ignore", DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=num_replicas if part is None else part.lowest,
            initial_replicas=num_replicas,
            max_replicas=num_replicas if part is None else part.highest,
            metrics_interval_s=_REPORT_S,
            look_back_period_s=_LOOK_BACK_S,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=policy,
        )
    return {"autoscaling_config": scaling}


def _is_scaled(context: AutoscalingContext) -> bool:
    return context.capacity_adjusted_min_replicas < context.capacity_adjusted_max_replicas


def _arguments(context: AutoscalingContext) -> dict[str, Any]:
    if context.config is None:
        return {}
    return dict(context.config.policy.policy_kwargs)


def _latest(context: AutoscalingContext) -> list[dict[str, float]]:
    """The last values that each running replica has reported, by name."""
    values: dict[Any, dict[str, float]] = {}
    for name, by_replica in (context.raw_metrics or {}).items():
        for replica_id, series in by_replica.items():
            if series:
                values.setdefault(replica_id, {})[name] = series[-1].value
    return [reported for reported in values.values() if "num_requests" in reported]


def _demand(values: Mapping[str, float]) -> DraftDemand:
    return DraftDemand(
        num_requests=round(values["num_requests"]),
        is_off=values["is_off"] > 0,
        draft_seconds_per_second=values["draft_seconds_per_second"],
        draft_queue_seconds=values["draft_queue_seconds"],
        goodput=values["goodput"],
        goodput_plain=values["goodput_plain"],
        goodput_added=values["goodput_added"],
        goodput_removed=values["goodput_removed"],
    )


def _target_load(values: Mapping[str, float]) -> TargetLoad:
    return TargetLoad(
        num_requests=round(values["num_requests"]), kv_cache_usage=values["kv_cache_usage"]
    )
