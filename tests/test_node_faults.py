"""A paced cluster on several hosts: a shard that stops, a link that is cut, a node that is drained.

Streams are seeded, and every token that came is judged against plain transformers (rule 9).
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from cluster.bench.chaos_faults import PARTS
from cluster.bench.chaos_load import ChaosLoad, Outcome, Routers
from cluster.bench.judge import judge_answers
from cluster.bench.lab.lab_cluster import LabCluster, LabHost
from cluster.bench.lab.ray_node import RayNode
from cluster.bench.load_prompts import take_prompts
from cluster.rpc.channels import KEEPALIVE_TIME_S, KEEPALIVE_TIMEOUT_S
from cluster.rpc.client import AsyncClient
from cluster.rpc.cluster_status import ClusterStatus, ReplicaStatus
from tests.models import TARGET
from tests.seeded_streams import (
    SAMPLING,
    Stream,
    paced_settings,
    streams,
    until,
    until_status,
    wait_whole,
)

pytestmark = [
    pytest.mark.usefixtures("whole_streams"),
    pytest.mark.netlab,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timed,  # fifteen processes on all cores
    pytest.mark.full,  # five minutes, of which CI has none left beside three of chaos
    pytest.mark.timeout(900),
]

MAX_GAP_S = 15.0
ROUTER_PORT = 50051

# Each part has one place to be, so that where it is, is known; delta's come later.
HOSTS = (
    LabHost("alpha", {"dspark-router": 1}),
    LabHost("bravo", {"dspark-target": 2, "dspark-drafter": 1, "dspark-router": 1}),
    LabHost("charlie", {"dspark-target": 2, "dspark-drafter": 1}),
    LabHost("delta", {}),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCluster]:
    """Two replicas of two shards, two drafters and two routers; half of each on bravo."""
    settings = paced_settings(num_drafters=2)
    with LabCluster(HOSTS, settings.document(), tmp_path_factory.mktemp("lab")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    return take_prompts("stdlib-heldout", TARGET, count=8, num_tokens=64)


@asynccontextmanager
async def whole_cluster(
    cluster: LabCluster, router: str
) -> AsyncIterator[tuple[AsyncClient, ReplicaStatus]]:
    """A client of the router on this host, once every part serves, and charlie's replica."""
    async with AsyncClient(f"{cluster.network.hosts[router].address}:{ROUTER_PORT}") as client:
        await wait_whole(client, num_replicas=2, num_drafters=2)
        yield client, await replica_on(client, cluster.network.hosts["charlie"].address)


@asynccontextmanager
async def streams_on(
    replica: ReplicaStatus, client: AsyncClient, prompts: list[tuple[int, ...]]
) -> AsyncIterator[list[Stream]]:
    """As ``streams``; some of them run on this replica."""
    async with streams(client, prompts) as running:
        status = await client.status()
        (now,) = [r for r in status.replicas if r.replica_id == replica.replica_id]
        assert now.num_running > 0
        yield running


async def test_a_replica_that_was_cut_off_and_is_back_repeats_nothing(
    cluster: LabCluster, prompts: list[tuple[int, ...]]
) -> None:
    """Bravo's router loses charlie's replica, which lives and generates on for nobody."""
    async with whole_cluster(cluster, "bravo") as (client, former):
        async with streams_on(former, client, prompts) as running:
            cut_at = time.monotonic()
            cluster.network.cut("bravo", "charlie")
            try:
                await until_status(client, lambda s: states(s).get(former.replica_id) == "lost")
                moved_at = time.monotonic()
                await until(lambda: all(s.times[-1] > moved_at for s in running))
                assert not any(s.is_finished for s in running)
            finally:
                cluster.network.heal("bravo", "charlie")
            await until_status(client, lambda s: states(s).get(former.replica_id) == "ready")
        gap_s = max(s.longest_gap_s(cut_at) for s in running)
        print(f"moved on {moved_at - cut_at:.1f} s behind the cut; {gap_s:.1f} s without a token")
        assert gap_s < KEEPALIVE_TIME_S + KEEPALIVE_TIMEOUT_S + 5.0
        async with streams_on(former, client, prompts):
            pass  # it serves again


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
async def test_streams_of_a_lost_shard_go_on_at_another_replica(
    cluster: LabCluster, prompts: list[tuple[int, ...]], how: signal.Signals
) -> None:
    charlie = cluster.network.hosts["charlie"]
    async with whole_cluster(cluster, "alpha") as (client, former):
        async with streams_on(former, client, prompts) as running:
            lost_at = time.monotonic()
            charlie.send_to(charlie.processes(PARTS["shard"])[1], how)
        gap_s = max(s.longest_gap_s(lost_at) for s in running)
        print(f"at most {gap_s:.1f} s without a token behind a shard's {how.name}")
        assert gap_s < MAX_GAP_S
    async with whole_cluster(cluster, "alpha") as (_, fresh):
        assert fresh.replica_id != former.replica_id


async def test_a_drained_node_loses_no_request(
    cluster: LabCluster, prompts: list[tuple[int, ...]]
) -> None:
    """Bravo is drained and goes; then charlie, of which nobody was told before."""
    network = cluster.network
    bravo, charlie, delta = (network.hosts[name] for name in ("bravo", "charlie", "delta"))
    parts = ("router", "front", "drafter", "shard")
    assert all(bravo.processes(PARTS[part]) for part in parts)
    cluster.nodes["delta"].kill()
    resources = next(host.resources for host in HOSTS if host.name == "bravo")
    cluster.nodes["delta"] = RayNode(network, delta, resources=resources, head=cluster.head)
    cluster.nodes["delta"].start()
    cluster.nodes["delta"].wait_started()
    addresses = [f"{host.address}:{ROUTER_PORT}" for host in network.hosts.values()]
    async with Routers(addresses) as routers:
        load = ChaosLoad(
            routers,
            prompts,
            replace(SAMPLING, max_tokens=96),
            concurrency=4,
            deadline_s=90.0,
            seed=1,
        )
        await until(lambda: load.counts()[Outcome.FINISHED] >= 4)
        drained_at = time.monotonic()
        # On the node itself; elsewhere it takes --node-id.
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command += ["--deadline-remaining-seconds", "180"]
        drain = bravo.start(
            command,
            environment=cluster.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output, _ = await asyncio.to_thread(drain.communicate)
        assert drain.returncode == 0, output
        await until(lambda: not any(bravo.processes(PARTS[part]) for part in parts))
        print(f"drained in {time.monotonic() - drained_at:.1f} s")
        assert all(delta.processes(PARTS[part]) for part in parts)
        num_resumes = sum(answer.num_resumes for answer in load.answers)
        cluster.nodes["bravo"].kill()
        await more(load, 4)
        assert sum(answer.num_resumes for answer in load.answers) == num_resumes
        # What Kubernetes does to a pod.
        (ray,) = charlie.processes("-m ray.scripts.scripts start")[:1]
        charlie.send_to(ray, signal.SIGTERM)
        await more(load, 8)
        await load.finish()
    counts = load.counts()
    gap_s = max(answer.longest_gap_s for answer in load.answers)
    print(f"{counts}, at most {gap_s:.1f} s without a token")
    assert set(counts) == {Outcome.FINISHED}, [a.error for a in load.answers if a.error]
    assert not any(answer.problems for answer in load.answers)
    assert judge_answers(TARGET, load.answers).num_mismatches == 0


async def more(load: ChaosLoad, count: int) -> None:
    """Until so many more requests have ended well."""
    wanted = load.counts()[Outcome.FINISHED] + count
    await until(lambda: load.counts()[Outcome.FINISHED] >= wanted)


def states(status: ClusterStatus) -> dict[str, str]:
    return {replica.replica_id: replica.state for replica in status.replicas}


async def replica_on(client: AsyncClient, address: str) -> ReplicaStatus:
    """The ready replica of the host with this address."""
    status = await client.status()
    (found,) = [
        replica
        for replica in status.replicas
        if replica.state == "ready" and replica.address.startswith(f"{address}:")
    ]
    return found
