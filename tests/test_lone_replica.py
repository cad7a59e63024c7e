"""The only target replica loses a shard: its streams wait for Serve to start another one.

How long that takes is printed and not judged: it is processor time, of which a machine with other
work has what is left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.bench.load_prompts import take_prompts
from cluster.bench.own_serving import OwnCluster
from cluster.rpc.client import AsyncClient
from tests.models import TARGET
from tests.seeded_streams import paced_settings, streams, wait_whole

pytestmark = [
    pytest.mark.usefixtures("whole_streams"),
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timed,  # most of it is two processes that import, on all cores
    pytest.mark.full,  # three minutes
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnCluster]:
    """One paced replica of two shards, a drafter and a router."""
    settings = paced_settings(num_drafters=1)
    router = {"host": "127.0.0.1", "port": 0}
    settings = replace(settings, num_replicas=1, overrides={**settings.overrides, "router": router})
    with OwnCluster(settings, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_streams_of_a_lost_shard_go_on_at_the_next_replica(
    cluster: OwnCluster, how: signal.Signals
) -> None:
    prompts = take_prompts("stdlib-heldout", TARGET, count=8, num_tokens=64)
    async with AsyncClient(cluster.address) as client:
        await wait_whole(client, num_replicas=1, num_drafters=1)
        (former,) = (await client.status()).replicas
        async with streams(client, prompts) as running:
            load = os.getloadavg()[0]
            lost_at = time.monotonic()
            os.kill(former.shards[1].pid, how)
        gap_s = max(s.longest_gap_s(lost_at) for s in running)
        print(f"{gap_s:.1f} s without a token behind a shard's {how.name}; load was {load:.1f}")
        (fresh,) = (await client.status()).replicas
        assert fresh.replica_id != former.replica_id
