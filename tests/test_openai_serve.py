"""The official OpenAI client through Ray Serve's own proxy, on a real cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from cluster.cli.running import RunningCluster
from cluster.config import ClusterConfig
from cluster.metrics.catalogue import METRICS
from cluster.rpc.client import Client
from tests.engine_tools import ALWAYS
from tests.metrics_tools import free_port, samples, value
from tests.models import DRAFTER, PROFILE, TARGET
from tests.promql_tools import alerts, panel_expressions, selectors
from tests.trace_tools import Collector, Received, collecting

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20"),  # Ray Serve's own
]

MODEL = "stdlib-7m"
PROMPT = "def main(arguments):\n"
ANSWERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 7, "n": 2, "logprobs": 1},
}


# Nothing waits for so fast a device; what pacing exports is there.
PACE = {
    "profile": str(PROFILE),
    "time_scale": 0.001,
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def cluster(collector: Collector, metrics_port: int) -> Iterator[RunningCluster]:
    config = ClusterConfig.parse(
        {
            "target": {
                "model": TARGET,
                "dtype": "float32",
                "num_threads": 1,
                "max_model_len": 512,
                "kv_cache_memory_mb": 32,
                "enforce_eager": True,
                "pace": PACE,
            },
            "speculative": {"model": DRAFTER, "draft_timeout_ms": 20_000, **ALWAYS},
            "drafter": {"dtype": "float32", "enforce_eager": True, "pace": PACE},
            "router": {
                "port": 0,
                "metrics_port": metrics_port,
                "chat_template": "chatml",
                "max_queued_tokens": 20_000,
            },
            "tracing": {"endpoint": collector.endpoint},
            "drain_timeout_s": 5,
        }
    )
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [
            {
                "name": "dspark",
                "import_path": "cluster.actors.app:build",
                "route_prefix": "/",
                "args": config.model_dump(mode="json", exclude_unset=True),
            }
        ],
    }
    with RunningCluster(document, config, timeout_s=360, report=print) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("kind", ANSWERS)
def test_speculation_changes_no_answer(client: OpenAI, kind: str) -> None:
    found = []
    for mode in ("auto", "off"):
        answer = client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=40,
            extra_body={"speculation": mode, "return_speculation_stats": True},
            **ANSWERS[kind],
        )
        assert (answer.usage.speculation["num_draft_tokens"] > 0) is (mode == "auto")
        found.append([choice.text for choice in answer.choices])
    assert found[0] == found[1]
    pieces = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, stream=True, **ANSWERS[kind]
    )
    texts = [""] * len(found[0])
    num_pieces = 0
    for piece in pieces:
        texts[piece.choices[0].index] += piece.choices[0].text
        num_pieces += 1
    assert texts == found[0]
    assert num_pieces > len(texts)  # the proxy does not gather them


def test_chat_errors_and_grammars_come_through(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Yes or no?"}],
        max_completion_tokens=20,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert answer.choices[0].message.content in ("yes", "no")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature"
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 490, "n": 16}
    with pytest.raises(openai.BadRequestError) as never_fits:
        client.completions.create(prompt=[PROMPT] * 40, **fields)
    assert never_fits.value.param == "prompt"
    with closing(client.completions.create(prompt=[PROMPT] * 2, stream=True, **fields)) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as limited:
            client.completions.create(prompt=PROMPT, **fields)
    assert int(limited.value.response.headers["Retry-After"]) >= 1


def test_a_client_that_leaves_ends_its_request(cluster: RunningCluster, client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 480,
        "n": 4,
        "extra_body": {"ignore_eos": True},
    }
    with Client(cluster.address) as status:
        before = status.status().replicas[0].num_output_tokens
        with closing(client.completions.create(stream=True, **fields)) as stream:
            next(iter(stream))
            # What a replica reports is up to half a second old.
            deadline = time.monotonic() + 60
            while status.status().replicas[0].num_running == 0:
                assert time.monotonic() < deadline
                next(iter(stream))
        idle(status)
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(timeout=0.5, **fields)
        idle(status)
        # Neither came to its end.
        assert status.status().replicas[0].num_output_tokens - before < 4 * 480


def test_the_example_of_the_readme_streams(cluster: RunningCluster) -> None:
    example = Path(__file__).parents[1] / "docs" / "examples" / "openai_stream.py"
    done = subprocess.run(
        [sys.executable, str(example), PROMPT],
        env={**os.environ, "OPENAI_BASE_URL": f"{cluster.http_url}/v1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout) > 20


def idle(client: Client) -> None:
    """Waits until nothing runs."""
    deadline = time.monotonic() + 60
    while client.status().replicas[0].num_running:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_scrape_of_the_cluster_has_what_rules_and_dashboards_read(
    cluster: RunningCluster, client: OpenAI, metrics_port: int
) -> None:
    """At HTTP's `/metrics`, and at the router's own port."""
    for url in (f"{cluster.http_url}/metrics", f"http://127.0.0.1:{metrics_port}/metrics"):
        deadline = time.monotonic() + 60
        while True:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = samples(answer.read())
            # How far confidences are off is known after some hundred of them.
            if any(name == "dspark:calibration_error" for name, _ in found):
                break
            assert time.monotonic() < deadline
            client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200)
        names = {name for name, _ in found}
        expressions = [*panel_expressions().values(), *(a["expr"] for a in alerts().values())]
        read = {name for text in expressions for name, _ in selectors(text)}
        assert read <= names
        assert names <= {name for metric in METRICS for name in metric.sample_names}
        assert value(found, "vllm:spec_decode_num_accepted_tokens_total") > 0
        assert value(found, "dspark:drafter_rounds_total", outcome="answered") > 0
        assert all(dict(labels)["model_name"] == MODEL for _, labels in found)


def test_a_request_is_one_trace_over_three_processes(client: OpenAI, collector: Collector) -> None:
    trace_id, span_id = "c" * 32, "d" * 16
    client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=60,
        extra_headers={"traceparent": f"00-{trace_id}-{span_id}-01"},
    )
    spans = wait_for_spans(collector, trace_id, count=3)
    router, replica = spans["dspark-router"], spans["dspark-replica"]
    drafter = spans["dspark-drafter"]
    assert (router.name, router.parent_span_id.hex()) == ("request", span_id)
    assert (replica.name, replica.parent_span_id) == ("replica", router.span_id)
    assert (drafter.name, drafter.parent_span_id) == ("draft", replica.span_id)


def wait_for_spans(collector: Collector, trace_id: str, count: int) -> dict[str, Received]:
    """A trace's spans by process, one of each; a process sends what it has every five seconds."""
    deadline = time.monotonic() + 60
    while True:
        found = [span for span in list(collector.spans) if span.trace_id.hex() == trace_id]
        if len(found) >= count:
            spans = {span.service: span for span in found}
            assert len(spans) == len(found) == count, found
            return spans
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
