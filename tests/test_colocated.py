"""A drafter on the target's own device: configuration, and real actors on a real Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.cli.running import RunningCluster
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.request import SamplingParams
from cluster.rpc.client import Client
from tests.engine_tools import ALWAYS, serve_document
from tests.models import DRAFTER, TARGET

CPU: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "enforce_eager": True}


def values(**drafter: Any) -> dict[str, Any]:
    return {
        "target": {"model": TARGET, "max_model_len": 512, "kv_cache_memory_mb": 32, **CPU},
        "speculative": {"model": DRAFTER, **ALWAYS},
        "drafter": {"placement": "colocated", **CPU, **drafter},
        "router": {"port": 0, "replica_wait_s": 60},
        "drain_timeout_s": 5,
    }


def test_there_is_speculation_but_no_part_for_it() -> None:
    config = ClusterConfig.parse(values())
    assert config.has_speculation
    assert not config.has_drafters


def test_what_needs_a_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="grouping"):
        ClusterConfig.parse(values() | {"speculative": {"model": DRAFTER, "grouping": "always"}})
    with pytest.raises(ConfigError, match=r"drafter\.num_replicas"):
        ClusterConfig.parse(values(min_replicas=0, max_replicas=2))


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    config = ClusterConfig.parse(values())
    with RunningCluster(serve_document(config), config, timeout_s=300, report=print) as cluster:
        yield cluster


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Ray Serve's own
def test_a_cluster_without_drafters_speculates(cluster: RunningCluster) -> None:
    prompt = "def main(arguments):\n"
    sampling = SamplingParams(temperature=0.8, seed=7, max_tokens=48, ignore_eos=True)
    with Client(cluster.address) as client:
        outputs = [
            [
                t
                for chunk in client.generate(prompt, sampling=sampling, speculation=on)
                for t in chunk.token_ids
            ]
            for on in (True, False)
        ]
        status = client.status()
    assert outputs[0] == outputs[1]
    (replica,) = status.replicas
    (drafter,) = replica.drafters
    assert (drafter.drafter_id, drafter.state) == ("colocated", "ready")
    assert replica.speculation.num_accepted_tokens > 0
