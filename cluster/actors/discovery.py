"""Who runs where: the replicas of a deployment and the addresses they publish.

A replica publishes by returning ``{"address": "host:port"}`` from Serve's hook
``record_replica_metadata``. The Serve controller hands that out by long poll, together with the
list of running replicas; nothing of ours has to be kept up to date. This is the only file that
knows that private interface of Ray Serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollNamespace, LongPollState

_RETRY_S = 1.0
# Serve takes a replica off its list while it hands it a changed `user_config`.
_RECONFIGURE_S = 1.0

_logger = logging.getLogger(__name__)


class ReplicaAddress(NamedTuple):
    """A running replica and the ``host:port`` of its gRPC server."""

    replica_id: str
    address: str


async def watch_replicas(
    app_name: str, deployment: str, on_change: Callable[[list[ReplicaAddress]], None]
) -> None:
    """Follows the running replicas of ``deployment`` until it is cancelled.

    Calls ``on_change`` in the running event loop with the whole list, first as soon as it is known
    and then after every change. While the controller is away (it restarts by itself) the last list
    stays in force. A replica is gone when it is missing in two looks ``_RECONFIGURE_S`` apart.
    """
    key = _targets_key(app_name, deployment)
    snapshot_id = -1
    known: list[ReplicaAddress] | None = None
    missing: set[ReplicaAddress] = set()
    while True:
        try:
            controller = await asyncio.to_thread(_controller)  # asks Ray's head, which may be away
            update = await controller.listen_for_change.remote({key: snapshot_id})
        except (RayError, ValueError) as error:  # ValueError: no actor of that name now
            _logger.warning("Serve controller cannot be asked for %s: %s", deployment, error)
            snapshot_id = -1
            await asyncio.sleep(_RETRY_S)
            continue
        if update == LongPollState.TIME_OUT or key not in update:
            continue
        snapshot_id = update[key].snapshot_id
        listed = _addresses(update[key].object_snapshot)
        newly_missing = set(known or ()).difference(listed, missing)
        missing = set(known or ()).difference(listed)
        replicas = sorted({*listed, *newly_missing})
        if replicas != known:
            known = replicas
            on_change(replicas)
        if newly_missing:
            await asyncio.sleep(_RECONFIGURE_S)
            snapshot_id = -1


def list_replicas(app_name: str, deployment: str) -> list[ReplicaAddress]:
    """The replicas of ``deployment`` that run now; for a driver that has no event loop."""
    key = _targets_key(app_name, deployment)
    update = ray.get(_controller().listen_for_change.remote({key: -1}))
    if update == LongPollState.TIME_OUT or key not in update:
        return []
    return _addresses(update[key].object_snapshot)


async def is_being_stopped(app_name: str, deployment: str, replica_id: str) -> bool:
    """Whether Serve's controller is stopping that replica, when it is listed no longer; it
    is not listed while it is given a changed configuration either.

    Raises:
        RayError, ValueError: the controller cannot be asked now.
    """
    controller = await asyncio.to_thread(_controller)
    details = await controller.get_serve_instance_details.remote()
    application = details["applications"].get(app_name, {"deployments": {}})
    replicas = application["deployments"].get(deployment, {"replicas": []})["replicas"]
    return any(
        replica["replica_id"] == replica_id and replica["state"] == ReplicaState.STOPPING
        for replica in replicas
    )


def _controller() -> Any:
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def _targets_key(app_name: str, deployment: str) -> tuple[LongPollNamespace, DeploymentID]:
    return (
        LongPollNamespace.DEPLOYMENT_TARGETS,
        DeploymentID(name=deployment, app_name=app_name),
    )


def _addresses(targets: Any) -> list[ReplicaAddress]:
    found = [
        ReplicaAddress(replica.replica_id.unique_id, replica.replica_metadata["address"])
        for replica in targets.running_replicas
        if "address" in replica.replica_metadata
    ]
    return sorted(found)
