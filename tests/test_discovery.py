"""Who is reported as running, by a controller that answers as scripted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.actors import discovery
from cluster.actors.discovery import ReplicaAddress, watch_replicas


class FakeController:
    """Answers each question with the next of its lists of running replicas, then never."""

    def __init__(self, *lists: str) -> None:
        self._lists = list(lists)
        self.listen_for_change = SimpleNamespace(remote=self._listen)

    async def _listen(self, keys: dict[Any, int]) -> dict[Any, Any]:
        if not self._lists:
            await asyncio.Event().wait()
        replicas = [
            SimpleNamespace(
                replica_id=SimpleNamespace(unique_id=name), replica_metadata={"address": name}
            )
            for name in self._lists.pop(0)
        ]
        (key,) = keys
        snapshot = SimpleNamespace(running_replicas=replicas)
        return {key: SimpleNamespace(snapshot_id=1, object_snapshot=snapshot)}


@pytest.mark.parametrize(
    ("lists", "reported"),
    [
        (["ab", "abc"], ["ab", "abc"]),
        # One that Serve reconfigures is off the list for a moment.
        (["ab", "b", "ab"], ["ab"]),
        (["ab", "b", "a", "ab"], ["ab"]),
        (["ab", "b", "b"], ["ab", "b"]),
        (["a", "b", "b"], ["a", "ab", "b"]),
        (["a", "", "", "a"], ["a", "", "a"]),
    ],
)
async def test_a_replica_is_gone_when_it_is_missing_twice(
    lists: list[str], reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = FakeController(*lists)
    monkeypatch.setattr(discovery, "_controller", lambda: controller)
    monkeypatch.setattr(discovery, "_RECONFIGURE_S", 0.0)
    changes: list[list[ReplicaAddress]] = []
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watch_replicas("app", "Drafter", changes.append), 0.05)
    assert ["".join(replica.replica_id for replica in change) for change in changes] == reported
