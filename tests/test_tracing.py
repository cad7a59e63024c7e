"""One request is one trace: router, replica and drafter, as its client has begun it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster import tracing
from cluster.actors.tracing import start_tracing
from cluster.config import ClusterConfig
from cluster.engine.draft_client import SessionKey
from cluster.errors import ConfigError, InvalidRequestError
from cluster.request import SamplingParams
from cluster.rpc.draft_spans import MAX_SPANS, DraftSpans
from cluster.tracing import Span
from tests.api_tools import serving
from tests.engine_tools import make_config
from tests.metrics_tools import running_parts
from tests.models import DRAFTER, TARGET, save_tiny_drafter, save_tiny_target
from tests.rpc_tools import until
from tests.trace_tools import collecting

CLIENT = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.start_with(SimpleSpanProcessor(exporter), service="test")
    yield exporter
    tracing.stop()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target")
    return make_config(target, save_tiny_drafter(folder / "drafter", target))


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def is_within(inner: ReadableSpan, outer: ReadableSpan) -> bool:
    return (
        inner.parent is not None
        and inner.parent.span_id == outer.context.span_id
        and inner.context.trace_id == outer.context.trace_id
    )


async def test_a_request_is_one_trace_over_all_parts(
    config: ClusterConfig, exporter: InMemorySpanExporter
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    async with running_parts(config) as parts:
        (done,) = await parts.client.complete([1, 2, 3], sampling=sampling)
        await until(lambda: set(by_name(exporter)) == {"request", "replica", "draft"})
    spans = by_name(exporter)
    (request,), (replica,), (draft,) = spans["request"], spans["replica"], spans["draft"]
    assert request.parent is None
    assert is_within(replica, request)
    assert is_within(draft, replica)
    stats = done.usage.speculation
    assert stats.num_drafts > 0
    assert replica.attributes is not None
    assert draft.attributes is not None
    assert replica.attributes["gen_ai.usage.output_tokens"] == 60
    assert replica.attributes["dspark.num_drafts"] == stats.num_drafts
    assert draft.attributes["dspark.num_rounds"] >= stats.num_drafts
    assert draft.attributes["dspark.num_draft_tokens"] >= stats.num_draft_tokens
    assert draft.attributes["dspark.compute_seconds"] > 0


async def test_a_client_that_traces_is_the_beginning(
    config: ClusterConfig, exporter: InMemorySpanExporter
) -> None:
    async with running_parts(config) as parts:
        stub = parts.client._stub
        from cluster.v1 import inference_pb2

        call = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[1, 2]), n=2, sampling={"max_tokens": 3}
        )
        async for _ in stub.Generate(call, metadata=(("traceparent", CLIENT),)):
            pass
        with pytest.raises(InvalidRequestError):
            await parts.client.complete([1000])
        await until(lambda: len(by_name(exporter).get("request", ())) == 2)
    good, bad = by_name(exporter)["request"]
    assert good.parent is not None
    assert (f"{good.context.trace_id:x}", f"{good.parent.span_id:x}") == ("a" * 32, "b" * 16)
    assert len(by_name(exporter)["replica"]) == 2
    assert all(is_within(span, good) for span in by_name(exporter)["replica"])
    assert not bad.status.is_ok
    assert bad.status.description == "InvalidRequestError"


def test_a_header_of_http_does_the_same(exporter: InMemorySpanExporter) -> None:
    with serving(make_config(TARGET, DRAFTER)) as server:
        body = json.dumps({"prompt": "def f(", "max_tokens": 4, "stream": True}).encode()
        headers = {"Content-Type": "application/json", "traceparent": CLIENT}
        request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert b"[DONE]" in answer.read()
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
            assert b"vllm:generation_tokens_total" in answer.read()
    (span,) = by_name(exporter)["request"]
    assert f"{span.context.trace_id:x}" == "a" * 32


def test_without_a_collector_a_place_is_handed_on_and_nothing_else() -> None:
    with Span("request", CLIENT) as span:
        assert span.traceparent == CLIENT
        assert not span.is_recorded
        span.set(x=1)
    assert Span("request", "x" * 4000).traceparent == ""


def test_what_is_not_sampled_is_not_within_either(exporter: InMemorySpanExporter) -> None:
    unsampled = CLIENT[:-2] + "00"
    with Span("request", unsampled) as outer, Span("replica", outer.traceparent) as inner:
        assert outer.traceparent.endswith("-00")
        assert not inner.is_recorded
    assert exporter.get_finished_spans() == ()


def test_a_drafter_keeps_a_bounded_number_of_spans(exporter: InMemorySpanExporter) -> None:
    spans = DraftSpans()
    for number in range(MAX_SPANS + 1):
        spans.open("r", SessionKey(str(number), 0), CLIENT)
    assert len(exporter.get_finished_spans()) == 1
    spans.close_replica("other")
    assert len(exporter.get_finished_spans()) == 1
    spans.close_replica("r")
    assert len(exporter.get_finished_spans()) == MAX_SPANS + 1


def test_spans_reach_a_collector() -> None:
    """Over OTLP, as the configuration names it."""
    with collecting() as collector:
        values = {"target": {"model": "m"}, "tracing": {"endpoint": collector.endpoint}}
        start_tracing(ClusterConfig.parse(values), "router", "router-1")
        Span("request").end()
        tracing.stop()
    (span,) = collector.spans
    assert (span.service, span.instance, span.name) == ("dspark-router", "router-1", "request")


def test_a_bad_endpoint_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tracing\.endpoint"):
        ClusterConfig.parse({"target": {"model": "m"}, "tracing": {"endpoint": "collector:4317"}})
