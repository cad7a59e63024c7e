"""A pool on a real cluster: no drafter at first, one when it pays, none when nobody speculates."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.cli.running import RunningCluster
from cluster.rpc.client import Client, Completion
from cluster.serve_config import load_serve_config
from tests.models import DRAFTER, PROFILE, TARGET

pytestmark = [
    pytest.mark.full,  # drafters come when they pay, by a device's paced time: run it alone
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20"),  # Ray Serve's own
]

PACE = {
    "profile": str(PROFILE),
    "time_scale": 20.0,
}
SAMPLING: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 60, "ignore_eos": True}
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    model = {"dtype": "float32", "enforce_eager": True, "pace": PACE}
    args = {
        "target": {**model, "model": TARGET, "num_threads": 1, "kv_cache_memory_mb": 32},
        "speculative": {"model": DRAFTER, "draft_timeout_ms": 20_000},
        "drafter": {**model, "num_replicas": 0, "max_replicas": 1, "scaling": {"to_zero_s": 4}},
        "router": {"port": 0},
        "drain_timeout_s": 5,
    }
    application = {
        "name": "dspark",
        "import_path": "cluster.actors.app:build",
        "route_prefix": None,
        "args": args,
    }
    path = tmp_path_factory.mktemp("config") / "cluster.yaml"
    path.write_text(yaml.safe_dump({"proxy_location": "Disabled", "applications": [application]}))
    document, config = load_serve_config(path)
    with (
        RunningCluster(document, config, timeout_s=360, report=print) as cluster,
        Client(cluster.address) as client,
    ):
        yield client


class Requests:
    """Sends one request after the other, in a thread."""

    def __init__(self, client: Client, *, speculation: bool) -> None:
        self.completions: list[Completion] = []
        self.error: BaseException | None = None
        self._client = client
        self._speculation = None if speculation else False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Requests:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        options = {} if self._speculation is None else {"speculation": False}
        try:
            while not self._is_over.is_set():
                self.completions += self._client.complete("def main():\n", **SAMPLING, **options)
        except BaseException as error:
            self.error = error


def _wait_for_drafters(client: Client, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(client.status().replicas[0].drafters) != count or any(
        drafter.state != "ready" for drafter in client.status().replicas[0].drafters
    ):
        assert time.monotonic() < deadline, client.status()
        time.sleep(0.2)


def test_drafters_come_when_it_pays_and_go_when_it_is_off(client: Client) -> None:
    assert client.status().replicas[0].drafters == ()
    (expected,) = client.complete("def main():\n", **SAMPLING)
    assert expected.usage.speculation.num_drafts == 0
    with Requests(client, speculation=True) as requests:
        _wait_for_drafters(client, 1)
        deadline = time.monotonic() + PATIENCE_S
        while not any(c.usage.speculation.num_drafts for c in requests.completions):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    paced = client.status().replicas[0]
    assert paced.paced is not None
    assert paced.paced.profile == "h100-8b-tp1"
    assert paced.drafters[0].paced is not None
    with Requests(client, speculation=False) as plain:
        _wait_for_drafters(client, 0)
    for sent in (requests, plain):
        assert sent.error is None
        assert {c.token_ids for c in sent.completions} == {expected.token_ids}
