"""Starting a cluster where the machine, not the cluster, is at fault."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray._private import services

from cluster.cli.processes import find_descendants
from cluster.cli.running import RunningCluster
from cluster.config import ClusterConfig
from cluster.errors import RayStartError
from cluster.rpc.client import Client
from tests.engine_tools import serve_document
from tests.models import TARGET

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20"),  # Ray Serve's own
]


class SlowNodes:
    """Has Ray give up its node, behind the start of the node's processes, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_slow: int) -> None:
        self.num_slow = num_slow
        self._get_node = services.get_node
        monkeypatch.setattr(services, "get_node", self._find)

    def _find(self, address: str, node_id: str) -> Any:
        if self.num_slow > 0:
            self.num_slow -= 1
            # What Ray says after 30 s, of no class of its own.
            raise Exception("The current node timed out during startup. This could happen because")
        return self._get_node(address, node_id)


@pytest.fixture
def config() -> ClusterConfig:
    part = {"dtype": "float32", "num_threads": 1, "enforce_eager": True}
    return ClusterConfig.parse(
        {
            "target": {"model": TARGET, "max_model_len": 512, "kv_cache_memory_mb": 32, **part},
            "router": {"port": 0, "replica_wait_s": 60},
            "drain_timeout_s": 5,
        }
    )


def test_a_node_that_ray_gives_up_is_started_once_more(
    config: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(find_descendants(os.getpid()))
    nodes = SlowNodes(monkeypatch, 1)
    lines: list[str] = []
    with RunningCluster(
        serve_document(config), config, timeout_s=240, report=lines.append
    ) as cluster:
        assert nodes.num_slow == 0
        assert any("Ray's node did not start in time" in line for line in lines)
        started = [process.pid for process in find_descendants(os.getpid())]
        commands = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in started]
        assert commands.count("gcs_server") == 1, "the first one is still there"
        with Client(cluster.address) as client:
            assert list(client.generate("def main():"))
    assert set(find_descendants(os.getpid())) <= others


def test_a_node_that_ray_gives_up_twice_is_said_so(
    config: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(find_descendants(os.getpid()))
    SlowNodes(monkeypatch, 2)
    cluster = RunningCluster(serve_document(config), config, timeout_s=240, report=print)
    with pytest.raises(RayStartError, match="did not start in time"), cluster:
        pass
    assert set(find_descendants(os.getpid())) <= others
    assert (cluster.temp_dir / "session_latest" / "logs").exists(), "they say why"
    shutil.rmtree(cluster.temp_dir)
