"""How a target replica's front ends, without a Ray."""

from __future__ import annotations

import asyncio
import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from cluster.actors import target_replica
from cluster.actors.target_replica import TargetReplica
from cluster.config import ClusterConfig
from tests.rpc_tools import until


class FakeShards:
    """Drains when it is told to, and breaks when it is told to, or stopped."""

    def __init__(self, *_: object) -> None:
        self.calls: list[str] = []
        self.drained = asyncio.Event()
        self.broken = asyncio.Event()

    async def start(self) -> str:
        return "here:1"

    def use_drafter(self, _config: ClusterConfig) -> None:
        raise AssertionError("nobody swaps a drafter")

    async def wait_broken(self) -> str:
        await self.broken.wait()
        return "shard 1 has not answered for 4 s"

    async def drain(self, timeout_s: float) -> None:
        self.calls.append(f"drain {timeout_s:g} s")
        await self.drained.wait()

    async def stop(self) -> None:
        self.calls.append("stop")
        self.broken.set()
        await asyncio.sleep(0.05)

    def kill(self) -> None:
        self.calls.append("kill")


class Front(TargetReplica):
    """Is ended by hand, not when it is collected."""

    def __del__(self) -> None:  # type: ignore[override]
        pass

    @property
    def shards(self) -> Any:
        return self._shards


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of what would be this process."""
    codes: list[int] = []
    context = SimpleNamespace(
        replica_id=SimpleNamespace(unique_id="r"),
        app_name="dspark",
        _deployment_config=SimpleNamespace(user_config=None),
    )
    monkeypatch.setattr(target_replica, "ShardGroup", FakeShards)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


async def start() -> Front:
    front = Front.__new__(Front)
    config = ClusterConfig.parse({"target": {"model": "m"}, "drain_timeout_s": 60})
    await front.__init__(config)  # type: ignore[misc]
    return front


async def test_a_shard_that_stops_during_the_drain_ends_the_replica_at_once(
    exits: list[int],
) -> None:
    front = await start()
    ending = asyncio.create_task(TargetReplica.__del__(front))
    await until(lambda: front.shards.calls == ["drain 60 s"])
    await asyncio.sleep(0.05)
    front.shards.broken.set()
    await until(lambda: exits == [1], 5)
    assert front.shards.calls == ["drain 60 s", "kill"]  # routers see that its streams break
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)


async def test_that_shards_end_behind_the_drain_is_no_failure(exits: list[int]) -> None:
    front = await start()
    front.shards.drained.set()
    await TargetReplica.__del__(front)
    assert front.shards.calls == ["drain 60 s", "stop", "kill"]
    assert not exits
