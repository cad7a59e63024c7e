"""The shards of one target replica, as one thing that works or does not."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors.shard import Shard, ShardHealth
from cluster.config import ClusterConfig
from cluster.engine.load import EngineLoad
from cluster.errors import DsparkError

# No step may take longer than the larger of this and ten times its predicted time.
MIN_STALL_S = 2.0
STALL_FACTOR = 10.0
# A shard whose process does not answer for so long is as good as dead.
MAX_SILENCE_S = 4.0
# While it starts, Ray makes its process, for which that takes as long at most, and it imports.
MAX_START_SILENCE_S = 60.0
_CHECK_PERIOD_S = 0.5
_STOP_TIMEOUT_S = 3.0

_logger = logging.getLogger(__name__)


class ShardGroup:
    """One ``Shard`` actor in each bundle of the front's placement group.

    Serve makes that group with the replica and takes it back with it; the front lives in the
    bundle of rank 0, so that no other node's end is the replica's.

    Guarantees: a group of shards starts once and is never mended; ``wait_broken`` returns as soon
    as one shard is beyond repair; after ``kill`` no shard lives. Shards also die with the process
    that holds this object, because it owns them. All shards go over to another drafter between the
    same two steps, or none does.
    """

    def __init__(self, config: ClusterConfig, replica_id: str) -> None:
        self._config = config
        self._replica_id = replica_id
        self._shards: list[Any] = []
        self._staged: ClusterConfig | None = None
        self._load: EngineLoad | None = None

    async def start(self) -> str:
        """Starts every shard, joins them and loads the model.

        Returns:
            The address (``host:port``) of rank 0's ReplicaService.

        Raises:
            ray.exceptions.RayTaskError: what a shard raised, e.g. a CheckpointError.
            ray.exceptions.RayActorError: a shard died on the way.
            DsparkError: a shard does not answer any more.
        """
        target = self._config.target
        placement = get_current_placement_group()
        if placement is None:
            raise RuntimeError("the front of a replica lives in no placement group")
        actor_class = ray.remote(
            num_cpus=target.num_cpus,
            num_gpus=target.num_gpus,
            resources=target.resources,
            max_restarts=0,
            max_task_retries=0,
        )(Shard)
        self._shards = [
            actor_class.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=rank
                )
            ).remote(self._config, self._replica_id, rank)
            for rank in range(target.num_shards)
        ]
        # Nobody else would notice: Serve waits for a start as long as it takes.
        silences = [
            asyncio.ensure_future(self._wait_silent(rank, MAX_START_SILENCE_S))
            for rank in range(len(self._shards))
        ]
        starting = asyncio.ensure_future(self._start_shards())
        try:
            await asyncio.wait((starting, *silences), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise DsparkError(next(s.result() for s in silences if s.done()))
            return starting.result()
        except BaseException:
            self.kill()
            raise
        finally:
            for task in (starting, *silences):
                task.cancel()

    async def _start_shards(self) -> str:
        await asyncio.gather(*(shard.prepare.remote() for shard in self._shards))
        host, port = await self._shards[0].open_rendezvous.remote()
        # A fresh group never meets what an earlier one left behind.
        generation = secrets.randbits(31)
        places = await asyncio.gather(
            *(shard.start.remote(host, port, generation) for shard in self._shards)
        )
        # Only now does anybody wait for another without a word from it.
        await asyncio.gather(*(shard.follow.remote() for shard in self._shards[1:]))
        return await self._shards[0].serve.remote(places)

    @property
    def load(self) -> EngineLoad | None:
        """Of the engine, half a second old at most; ``None`` before it was first asked."""
        return self._load

    def set_drafters(self, drafters: list[tuple[str, str]]) -> None:
        """Tells rank 0 which drafters there are, as (id, address); does not wait."""
        self._shards[0].set_drafters.remote(drafters)

    async def use_drafter(self, config: ClusterConfig) -> bool:
        """Goes over to the drafter of ``config``; requests go on.

        Returns:
            Whether it is in use; False while no drafter is ready for it. To be called again then.

        Raises:
            ray.exceptions.RayTaskError: a shard cannot load what it needs of it.
        """
        if self._staged is not config:
            self._staged = None
            stages = (shard.stage_drafter.remote(config.speculative) for shard in self._shards)
            # Every one to its end: a later call must not meet what this one has left running.
            for outcome in await asyncio.gather(*stages, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
            self._staged = config
        return await self._shards[0].use_staged_drafter.remote()

    async def wait_broken(self) -> str:
        """Returns why the group cannot go on, once that is so."""
        ranks = range(len(self._shards))
        reasons = [self._wait_stalled()]
        reasons += [self._wait_ended(rank) for rank in ranks]
        reasons += [self._wait_silent(rank, MAX_SILENCE_S) for rank in ranks]
        watches = [asyncio.ensure_future(reason) for reason in reasons]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for watch in watches:
                watch.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests, and finishes the running ones within ``timeout_s``."""
        if not self._shards:
            return
        try:
            await self._shards[0].drain.remote(timeout_s)
        except RayError as error:
            _logger.warning("%s did not drain: %s", self._replica_id, error)

    async def stop(self) -> None:
        """Ends the shards; one that does not stop in time is left to ``kill``."""
        try:
            stops = asyncio.gather(*(shard.stop.remote() for shard in self._shards))
            await asyncio.wait_for(stops, _STOP_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            _logger.warning("shards of %s did not stop by themselves: %s", self._replica_id, error)

    def kill(self) -> None:
        """Kills every shard. Can be called again."""
        for shard in self._shards:
            ray.kill(shard)
        self._shards = []

    async def _wait_ended(self, rank: int) -> str:
        try:
            reason = await self._shards[rank].wait_ended.remote()
        except RayError as error:
            reason = str(error).partition("\n")[0]
        return f"shard {rank}: {reason}"

    async def _wait_silent(self, rank: int, limit_s: float) -> str:
        """Returns when a shard does not answer for so long."""
        while True:
            answer = asyncio.ensure_future(_health(self._shards[rank]))
            done, _silent = await asyncio.wait([answer], timeout=limit_s)
            if not done:
                answer.cancel()
                return f"shard {rank} has not answered for {limit_s:.0f} s"
            await asyncio.sleep(_CHECK_PERIOD_S)

    async def _wait_stalled(self) -> str:
        """Returns when no step ends in time, as where a shard stops inside a collective."""
        while True:
            health = await _health(self._shards[0])
            if health is not None:  # else it is dead, which is what _wait_ended is for
                self._load = health.load
                limit = max(MIN_STALL_S, STALL_FACTOR * health.predicted_step_s)
                if health.idle_s > limit:
                    return (
                        f"no step has ended for {health.idle_s:.1f} s, the limit is {limit:.1f} s"
                    )
            await asyncio.sleep(_CHECK_PERIOD_S)


async def _health(shard: Any) -> ShardHealth | None:
    try:
        return await shard.health.remote()
    except RayError:
        return None
