"""The Ray Serve application: which deployments there are and with which options.

``deployments/*.yaml`` name ``cluster.actors.app:build`` as their ``import_path``. Ray Serve builds
the application in a process of its own, so nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application, Deployment

from cluster.actors.autoscaling import scaling_options
from cluster.actors.drafter import Drafter
from cluster.actors.names import DRAFTER, ROUTER, TARGET_REPLICA
from cluster.actors.router import Router
from cluster.actors.target_replica import TargetReplica
from cluster.config import ClusterConfig

# Serve asks each replica once a second; after three answers that are missing it is replaced.
_HEALTH_CHECK_PERIOD_S = 1.0
_HEALTH_CHECK_TIMEOUT_S = 5.0
# What a part needs behind its drain to close what it holds, before Serve kills it.
_CLOSE_S = 8.0
_MAX_HTTP_REQUESTS = 100_000


def build(args: dict[str, Any]) -> Application:
    """Builds the application from the ``args`` of the Serve configuration.

    Raises:
        ConfigError: a bad value in ``args``.
    """
    config = ClusterConfig.parse(args)
    if not config.has_speculation:  # Serve has no deployment that never has a replica
        config = config.model_copy(update={"speculative": None})
    common: dict[str, Any] = {
        "health_check_period_s": _HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": config.drain_timeout_s + _CLOSE_S,
        # How often Serve looks for its own requests on a replica that it stops: it has none.
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    parts: list[Application] = []
    if config.has_drafters:
        drafter = _deployment(
            Drafter,
            name=DRAFTER,
            **scaling_options(config, DRAFTER),
            ray_actor_options={
                "num_cpus": config.drafter.num_cpus,
                "num_gpus": config.drafter.num_gpus,
                "resources": config.drafter.resources,
            },
            **common,
        )
        parts.append(drafter.bind(config))
    target = _deployment(
        TargetReplica,
        name=TARGET_REPLICA,
        **scaling_options(config, TARGET_REPLICA),
        # The front has no model: it lives with rank 0, in the first of its shards' bundles.
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[_shard_bundle(config)] * config.target.num_shards,
        placement_group_strategy=config.target.placement_strategy,
        **common,
    )
    parts.append(target.bind(config))
    router = _deployment(
        Router,
        name=ROUTER,
        **scaling_options(config, ROUTER),
        # Serve's own bound on HTTP requests, far from the router's own on the work they bring.
        max_ongoing_requests=_MAX_HTTP_REQUESTS,
        # In a rollout the new ones listen, on the same port, before the old ones leave it.
        max_surge_percent=100,
        ray_actor_options={
            "num_cpus": config.router.num_cpus,
            "resources": config.router.resources,
        },
        **common,
    )
    # Serve takes for an application what is bound to its ingress. It stops the ingress first, so
    # the router drains while targets and drafters still serve.
    return router.bind(config, *parts)


def _shard_bundle(config: ClusterConfig) -> dict[str, float]:
    target = config.target
    return {"CPU": target.num_cpus, "GPU": target.num_gpus, **target.resources}


def _deployment(actor_class: type, **options: Any) -> Deployment:
    # Not as a decorator: an undecorated class is found by its name in the actor's process and need
    # not be sent there.
    deployment: Deployment = serve.deployment(**options)(actor_class)
    return deployment
