"""A real cluster whose parts are replaced, killed and restarted under load: nobody notices."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.cli.processes import find_descendants
from cluster.cli.running import RunningCluster, wait_ready
from cluster.config import ClusterConfig
from cluster.errors import RouterStoppingError
from cluster.rpc.client import Client
from cluster.rpc.cluster_status import ClusterStatus
from tests.actor_processes import actors
from tests.engine_tools import ALWAYS
from tests.metrics_tools import free_port
from tests.models import DRAFTER, TARGET

pytestmark = [
    pytest.mark.usefixtures("whole_streams"),
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20"),  # Ray Serve's own
]

PROMPTS = ("def main(arguments):\n", "class Queue:\n", "import os\n", "# Reads a file\n")
MAX_TOKENS = 96
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 7, "ignore_eos": True}
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """A Redis where Ray's head keeps its state; ``None`` where it is not installed."""
    command = shutil.which("redis-server")
    if command is None:
        yield None
        return
    port = free_port()
    process = subprocess.Popen(
        [command, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        cwd=tmp_path_factory.mktemp("redis"),
        stdout=subprocess.DEVNULL,
    )
    address = f"127.0.0.1:{port}"
    wait_until(lambda: listens(port))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_REDIS_ADDRESS", address)
            # As KubeRay sets it: how long processes wait for a head before they end.
            patch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "600")
            yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    """Two of each part; both routers on one port."""
    models = tmp_path_factory.mktemp("models")
    for model in (TARGET, DRAFTER):
        shutil.copytree(model, models / Path(model).name)
    part = {"dtype": "float32", "enforce_eager": True, "num_threads": 1, "num_cpus": 0.1}
    return ClusterConfig.parse(
        {
            "target": {
                "model": Path(TARGET).name,
                "num_replicas": 2,
                "max_model_len": 1024,
                "kv_cache_memory_mb": 32,
                **part,
            },
            "speculative": {"model": Path(DRAFTER).name, **ALWAYS},
            "drafter": {"num_replicas": 2, **part},
            "router": {"num_replicas": 2, "port": free_port(), "replica_wait_s": 120},
            "drain_timeout_s": 3,
        },
        base_dir=models,
    )


@pytest.fixture(scope="module")
def document(config: ClusterConfig) -> dict[str, Any]:
    return {
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": "dspark",
                "import_path": "cluster.actors.app:build",
                "route_prefix": None,
                "args": config.model_dump(mode="json", exclude_unset=True),
            }
        ],
    }


@pytest.fixture(scope="module")
def cluster(
    config: ClusterConfig, document: dict[str, Any], redis: str | None
) -> Iterator[RunningCluster]:
    with RunningCluster(document, config, timeout_s=360, report=print) as cluster:
        yield cluster
        late = LateStream(cluster.address)
    # What outlasts the drain of `down` is told so at once, and nobody tries to go on with it.
    late.join()
    assert isinstance(late.error, RouterStoppingError), late.error
    assert late.num_tokens > 0
    assert not find_descendants(os.getpid()), "processes of the cluster outlive it"


@pytest.fixture(scope="module")
def expected(cluster: RunningCluster) -> list[tuple[int, ...]]:
    with Client(cluster.address) as client:
        return [
            client.complete(prompt, max_tokens=MAX_TOKENS, **SEEDED)[0].token_ids
            for prompt in PROMPTS
        ]


class Load:
    """Clients that ask for seeded outputs again and again, and compare; leaving the block stops
    them and raises what went wrong."""

    def __init__(self, address: str, expected: Sequence[tuple[int, ...]]) -> None:
        self.num_done = 0
        self.num_resumed = 0
        self.longest_gap_s = 0.0
        self._address = address
        self._expected = expected
        self._errors: list[BaseException] = []
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(index,)) for index in range(len(PROMPTS))
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        print(
            f"{self.num_done} outputs, {self.num_resumed} taken up by another router, "
            f"at most {self.longest_gap_s:.1f} s without a token"
        )
        if self._errors:
            raise self._errors[0]

    def wait_more(self, count: int) -> None:
        """Until so many more outputs are there."""
        wanted = self.num_done + count
        wait_until(lambda: self.num_done >= wanted or bool(self._errors))

    def _run(self, index: int) -> None:
        try:
            while not self._stopping.is_set():
                # A client of its own each time: new connections, new routers.
                with Client(self._address) as client:
                    self._complete(client, index)
                self.num_done += 1
        except BaseException as error:
            self._errors.append(error)

    def _complete(self, client: Client, index: int) -> None:
        token_ids: list[int] = []
        last = time.monotonic()
        for chunk in client.generate(PROMPTS[index], max_tokens=MAX_TOKENS, **SEEDED):
            now = time.monotonic()
            self.longest_gap_s = max(self.longest_gap_s, now - last)
            last = now
            token_ids += chunk.token_ids
        self.num_resumed += chunk.attempt > 0
        assert tuple(token_ids) == self._expected[index]


class LateStream:
    """One that is longer than the drain."""

    def __init__(self, address: str) -> None:
        self.error: BaseException | None = None
        self.num_tokens = 0
        self._address = address
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(lambda: self.num_tokens > 0 or self.error is not None)

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        fields = {**SEEDED, "max_tokens": 950, "speculation": False}
        try:
            with Client(self._address) as client:
                for chunk in client.generate(PROMPTS[0], n=8, **fields):
                    self.num_tokens += len(chunk.token_ids)
        except BaseException as error:
            self.error = error


def test_a_rollout_of_all_parts_loses_nothing(
    cluster: RunningCluster, document: dict[str, Any], expected: list[tuple[int, ...]]
) -> None:
    with Client(cluster.address) as client:
        before = parts_of(client.status())
    changed = copy.deepcopy(document)
    changed["applications"][0]["args"]["router"]["queue_timeout_s"] = 61
    with Load(cluster.address, expected) as load:
        load.wait_more(4)
        started = time.monotonic()
        deploy(changed)
        wait_until(lambda: is_renewed(cluster.address, before))
        print(f"all parts replaced after {time.monotonic() - started:.1f} s")
        load.wait_more(4)
    assert load.num_done >= 12


def test_streams_of_a_killed_router_go_on_at_the_other(
    cluster: RunningCluster, config: ClusterConfig, expected: list[tuple[int, ...]]
) -> None:
    with Load(cluster.address, expected) as load:
        load.wait_more(4)
        for _ in range(4):  # each time half of the streams are the other's
            if load.num_resumed:
                break
            os.kill(actors("ServeReplica:dspark:Router")[0], signal.SIGKILL)
            load.wait_more(8)
            wait_until(lambda: len(actors("ServeReplica:dspark:Router")) == 2)
            wait_routers(cluster.address, 2)
    assert load.num_resumed > 0
    wait_ready(cluster.address, config, time.monotonic() + PATIENCE_S)


def test_the_head_restarts_under_load(
    cluster: RunningCluster, expected: list[tuple[int, ...]], redis: str | None
) -> None:
    if redis is None:
        pytest.skip("no redis-server (Debian's package of that name)")
    pid = process_of("gcs_server")
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    # It chose a port by itself, where the others expect it again.
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    command = [
        f"--gcs_server_port={port}".encode() if part.startswith(b"--gcs_server_port=") else part
        for part in command
    ]
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    environment = dict(os.fsdecode(v).split("=", 1) for v in variables if b"=" in v)
    with Load(cluster.address, expected) as load:
        load.wait_more(4)
        os.kill(pid, signal.SIGKILL)
        load.wait_more(8)  # without a head
        head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        load.wait_more(8)
        assert head.poll() is None
        assert load.num_resumed == 0, "a stream broke without a head"
        # It is a head: Serve can replace what ends now.
        os.kill(actors("ServeReplica:dspark:Router")[0], signal.SIGKILL)
        wait_until(lambda: len(actors("ServeReplica:dspark:Router")) == 2)
        wait_routers(cluster.address, 2)
    assert load.longest_gap_s < 15.0


def deploy(document: dict[str, Any]) -> None:
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(document))


def parts_of(status: ClusterStatus) -> set[str]:
    """Ids of all routers, target replicas and drafters."""
    found = {router.router_id for router in status.routers}
    for replica in status.replicas:
        found.add(replica.replica_id)
        found.update(drafter.drafter_id for drafter in replica.drafters)
    return found


def is_renewed(address: str, before: set[str]) -> bool:
    if serve.status().applications["dspark"].status != "RUNNING":
        return False
    with contextlib.suppress(Exception), Client(address) as client:  # one may just be leaving
        status = client.status()
        drafters = [len(replica.drafters) for replica in status.replicas]
        is_whole = len(status.routers) == 2 and drafters == [2, 2]
        return is_whole and not before & parts_of(status)
    return False


def wait_routers(address: str, count: int) -> None:
    def is_so() -> bool:
        with contextlib.suppress(Exception), Client(address) as client:
            return len(client.status().routers) == count
        return False

    wait_until(is_so)


def process_of(program: str) -> int:
    for process in find_descendants(os.getpid()):
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0]
        if os.path.basename(os.fsdecode(command)) == program:
            return process.pid
    raise LookupError(program)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
