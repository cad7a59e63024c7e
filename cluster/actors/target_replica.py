"""The front of a target replica: a Serve deployment without a model of its own."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from ray import serve

from cluster.actors.autoscaling import target_stats
from cluster.actors.discovery import ReplicaAddress, watch_replicas
from cluster.actors.drafter_choice import DrafterChoice, DrafterInUse, starting_config
from cluster.actors.names import DRAFTER
from cluster.actors.shard_group import ShardGroup
from cluster.config import ClusterConfig

_logger = logging.getLogger("ray.serve")


class TargetReplica:
    """Owns the shards of one target replica: starts, watches and drains them.

    Guarantees: Serve calls this replica running only after every shard has loaded its part and
    rank 0 serves; the published address is then rank 0's and never changes. When a shard is beyond
    repair, while it drains too, all shards are killed and this process ends, so that Serve starts a
    fresh replica: a process group is never mended in place. Tokens never pass through here. A swap
    of the drafter waits until some drafter is ready for it, and costs no request.
    """

    # Serve awaits the constructor, the hooks and the destructor of a deployment.
    async def __init__(self, config: ClusterConfig, *parts: object) -> None:  # type: ignore[misc]
        """``parts`` are handles to the deployments this one uses; Serve wants to know them."""
        context = serve.get_replica_context()
        self._config = config
        started = starting_config(config)
        self._shards = ShardGroup(started, context.replica_id.unique_id)
        self._address = await self._shards.start()
        self._choice = DrafterChoice(started, self._shards.use_drafter)
        self._watchdog = asyncio.create_task(self._end_when_broken())
        self._tasks = [self._watchdog, asyncio.create_task(self._choice.run())]
        if config.has_drafters:  # else the application has none to be told of
            watch = watch_replicas(context.app_name, DRAFTER, self._on_drafters)
            self._tasks.append(asyncio.create_task(watch))

    def record_replica_metadata(self) -> dict[str, str]:
        """What routers get to know of this replica."""
        return {"address": self._address}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of drafters, and of target replicas, is decided on."""
        return target_stats(self._shards.load)

    async def reconfigure(self, user_config: Any) -> None:
        """Takes drafts of what ``user_config`` says as soon as there are some."""
        self._choice.want(user_config)

    async def drafter_in_use(self) -> DrafterInUse:
        """How far the last swap is."""
        return self._choice.state()

    def check_health(self) -> None:
        """Raises what ended one of the background tasks, if any did."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def __del__(self) -> None:
        for task in self._tasks:
            if task is not self._watchdog:
                task.cancel()
        # A shard that fails now would hold up its streams until the end of the drain.
        await self._shards.drain(self._config.drain_timeout_s)
        self._watchdog.cancel()
        await self._shards.stop()
        self._shards.kill()

    def _on_drafters(self, drafters: list[ReplicaAddress]) -> None:
        _logger.info("drafters: %s", drafters)
        self._shards.set_drafters([(drafter.replica_id, drafter.address) for drafter in drafters])

    async def _end_when_broken(self) -> None:
        reason = await self._shards.wait_broken()
        _logger.error("replica is beyond repair and ends: %s", reason)
        self._shards.kill()
        # The controller sees a dead actor at its next look; an unhealthy one takes it three.
        logging.shutdown()
        os._exit(1)
