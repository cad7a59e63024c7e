"""The real actors on a real Ray: a router, a target of two shards, a drafter, and their faults."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.actors.shard_group import MAX_START_SILENCE_S
from cluster.cli.processes import find_descendants
from cluster.cli.running import RunningCluster, wait_ready
from cluster.config import ClusterConfig
from cluster.errors import DeadlineExceededError, InvalidRequestError
from cluster.rpc.client import Chunk, Client
from cluster.rpc.cluster_status import ReplicaStatus
from tests.actor_processes import actors
from tests.engine_tools import ALWAYS, serve_document
from tests.models import DRAFTER, TARGET

pytestmark = [
    pytest.mark.usefixtures("whole_streams"),
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20"),  # Ray Serve's own
]

PROMPT = "def main(arguments):\n"
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 7, "ignore_eos": True}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
RECOVERY_S = 120.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    """Two shards and a drafter, of a copy that nobody else writes to."""
    models = tmp_path_factory.mktemp("models")
    for model in (TARGET, DRAFTER):
        shutil.copytree(model, models / Path(model).name)
    return ClusterConfig.parse(
        {
            "target": {
                "model": Path(TARGET).name,
                "tensor_parallel_size": 2,
                "dtype": "float32",
                "num_threads": 1,
                "max_model_len": 1024,
                "kv_cache_memory_mb": 32,
                "enforce_eager": True,
            },
            "speculative": {"model": Path(DRAFTER).name, **ALWAYS},
            "drafter": {"dtype": "float32", "enforce_eager": True},
            "router": {"port": 0, "replica_wait_s": 120},
            "drain_timeout_s": 5,
        },
        base_dir=models,
    )


@pytest.fixture(scope="module")
def cluster(config: ClusterConfig) -> Iterator[RunningCluster]:
    with RunningCluster(serve_document(config), config, timeout_s=360, report=print) as cluster:
        yield cluster
    assert not find_descendants(os.getpid()), "processes of the cluster outlive it"
    assert not cluster.temp_dir.exists()


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[Client]:
    with Client(cluster.address) as client:
        yield client


def test_every_part_is_ready(client: Client) -> None:
    replica = _replica(client)
    assert [shard.rank for shard in replica.shards] == [0, 1]
    assert [shard.tensor_rank for shard in replica.shards] == [0, 1]
    assert len({shard.pid for shard in replica.shards}) == 2
    assert [drafter.state for drafter in replica.drafters] == ["ready"]
    _wait_until(lambda: _replica(client).speculation_state == "on")


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_speculation_changes_nothing(client: Client, sampling: dict[str, Any]) -> None:
    speculative = client.complete(PROMPT, max_tokens=48, **sampling)[0]
    plain = client.complete(PROMPT, max_tokens=48, speculation=False, **sampling)[0]
    assert speculative.token_ids == plain.token_ids
    assert speculative.text == plain.text
    assert speculative.usage.speculation.num_drafts > 0
    assert plain.usage.speculation.num_drafts == 0


def test_text_lengths_cut_the_text_by_token(client: Client) -> None:
    chunks = list(client.generate(PROMPT, max_tokens=32, **GREEDY))
    assert all(len(chunk.text_lengths) == len(chunk.token_ids) for chunk in chunks)
    assert all(sum(chunk.text_lengths) <= len(chunk.text) for chunk in chunks)
    assert sum(sum(chunk.text_lengths) for chunk in chunks) > 0


@pytest.mark.parametrize(
    ("prompt", "field", "sampling"),
    [
        ("", "prompt", {}),
        ("word " * 2000, "prompt", {}),
        ([5_000_000], "prompt.token_ids", {}),
        (PROMPT, "sampling.temperature", {"temperature": float("nan")}),
        (PROMPT, "sampling.temperature", {"temperature": -1.0}),
        (PROMPT, "sampling.max_tokens", {"max_tokens": -5}),
    ],
)
def test_bad_input_names_the_field(
    client: Client, prompt: str | list[int], field: str, sampling: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.complete(prompt, **sampling)
    assert caught.value.field == field


def test_a_client_that_leaves_frees_its_pages(client: Client) -> None:
    before = _replica(client).num_output_tokens
    with closing(client.generate(PROMPT, max_tokens=900, **GREEDY)) as chunks:
        next(chunks)
        _wait_until(lambda: _replica(client).num_running == 1)
    _wait_until(lambda: _replica(client).num_running == 0)
    assert _replica(client).kv_cache_usage == 0.0
    assert _replica(client).num_output_tokens - before < 900  # it did not come to its end


def test_a_deadline_reaches_the_engine(client: Client) -> None:
    with pytest.raises(DeadlineExceededError):
        client.complete(PROMPT, max_tokens=900, timeout_s=1.0, **GREEDY)
    _wait_until(lambda: _replica(client).num_running == 0)


def test_a_killed_drafter_costs_no_token(
    cluster: RunningCluster, client: Client, config: ClusterConfig
) -> None:
    expected = client.complete(PROMPT, max_tokens=200, **SEEDED)[0].token_ids
    lost = _replica(client).drafters[0].drafter_id
    with _Stream(client, max_tokens=200, **SEEDED) as stream:
        stream.wait_for_tokens(20)
        os.kill(actors("ServeReplica:dspark:Drafter")[0], signal.SIGKILL)
    assert stream.token_ids == expected
    _wait_until(lambda: lost not in {d.drafter_id for d in _replica(client).drafters})
    wait_ready(cluster.address, config, time.monotonic() + RECOVERY_S)
    after = client.complete(PROMPT, max_tokens=48, **SEEDED)[0]
    assert after.token_ids == expected[:48]
    assert after.usage.speculation.num_drafts > 0


@pytest.mark.parametrize(
    ("part", "number"),
    [("shard", signal.SIGKILL), ("shard", signal.SIGSTOP), ("front", signal.SIGKILL)],
    ids=["shard killed", "shard stopped", "front killed"],
)
def test_a_lost_replica_is_replaced_and_streams_go_on(
    cluster: RunningCluster,
    client: Client,
    config: ClusterConfig,
    part: str,
    number: signal.Signals,
) -> None:
    wait_ready(cluster.address, config, time.monotonic() + RECOVERY_S)
    expected = client.complete(PROMPT, max_tokens=160, **SEEDED)[0].token_ids
    replica = _replica(client)
    shards = [shard.pid for shard in replica.shards]
    pid = shards[1] if part == "shard" else actors("ServeReplica:dspark:TargetReplica")[0]
    with _Stream(client, max_tokens=160, **SEEDED) as stream:
        stream.wait_for_tokens(20)
        os.kill(pid, number)
    print(f"without another replica: {stream.longest_gap_s:.1f} s without a token")
    assert stream.token_ids == expected
    wait_ready(cluster.address, config, time.monotonic() + RECOVERY_S)
    assert _replica(client).replica_id != replica.replica_id
    living = {process.pid for process in find_descendants(os.getpid())}
    assert not living.intersection(shards), "shards of the lost replica live on"


@pytest.mark.slow
def test_a_shard_that_stops_while_it_starts_is_replaced(
    cluster: RunningCluster, config: ClusterConfig
) -> None:
    wait_ready(cluster.address, config, time.monotonic() + RECOVERY_S)
    former = actors("Shard")
    os.kill(former[0], signal.SIGKILL)
    _wait_until(lambda: set(actors("Shard.")) - set(former))
    (stopped, *_) = set(actors("Shard.")) - set(former)
    os.kill(stopped, signal.SIGSTOP)
    wait_ready(cluster.address, config, time.monotonic() + MAX_START_SILENCE_S + RECOVERY_S)
    assert stopped not in actors("Shard")


class _Stream:
    """A completion that is read in a thread; leaving the block waits for its end."""

    def __init__(self, client: Client, **arguments: Any) -> None:
        self.longest_gap_s = 0.0  # between two chunks
        self._chunks: list[Chunk] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, args=(client, arguments))

    def __enter__(self) -> _Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in list(self._chunks) for token in chunk.token_ids)

    def wait_for_tokens(self, count: int) -> None:
        _wait_until(lambda: len(self.token_ids) >= count)

    def _read(self, client: Client, arguments: dict[str, Any]) -> None:
        try:
            last: float | None = None
            for chunk in client.generate(PROMPT, **arguments):
                now = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now - (last or now))
                last = now
                self._chunks.append(chunk)
        except BaseException as error:
            self._error = error


def _replica(client: Client) -> ReplicaStatus:
    return next(replica for replica in client.status().replicas if replica.state == "ready")


def _wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
