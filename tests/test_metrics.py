"""What a router exports: every metric, each once in the cluster, with the right numbers."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from cluster.errors import DeadlineExceededError, InvalidRequestError, QueueFullError
from cluster.histogram import Histogram
from cluster.metrics.catalogue import METRICS, Kind
from cluster.metrics.families import Families
from cluster.metrics.replicas import add_replicas
from cluster.metrics.router import RouterMetrics, RouterState
from cluster.metrics.scrape_server import ScrapeServer
from cluster.request import SamplingParams
from cluster.rpc.client import AsyncClient
from cluster.rpc.router import RouterServer
from cluster.v1.common_pb2 import Usage
from cluster.v1.inference_pb2 import GenerateResponse, ReplicaStatus
from tests.engine_tools import make_config
from tests.metrics_tools import Samples, running_parts, samples, value
from tests.models import save_tiny_drafter, save_tiny_target
from tests.rpc_tools import MAX_MODEL_LEN, TOKENIZER, VOCAB_SIZE, running_cluster, until

# As vLLM's documentation lists them, those that its own dashboards show among them.
VLLM_NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:request_max_num_generation_tokens_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
}


def test_a_histogram_counts_up_to_its_bounds() -> None:
    histogram = Histogram((1, 2))
    for observed in (0, 1, 1.5, 2, 3):
        histogram.observe(observed)
    assert histogram.counts == [2, 2, 1]
    assert histogram.sum == 7.5


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_request_is_measured_from_its_beginning_to_the_end_of_each_choice() -> None:
    clock = Clock()
    metrics = RouterMetrics("m", RouterState, clock=clock)
    with metrics.request() as meter:
        meter.begin(2)
        clock.now = 0.07
        meter.chunk(GenerateResponse(choice_index=0, token_ids=[1]))
        clock.now = 0.09
        meter.chunk(GenerateResponse(choice_index=1, token_ids=[1]))
        clock.now = 0.1
        meter.chunk(GenerateResponse(choice_index=0, token_ids=[1, 2]))
        clock.now = 3.0
        for index, num_tokens, reason in ((0, 3, 2), (1, 1, 1)):
            usage = Usage(prompt_tokens=7, completion_tokens=num_tokens, queue_seconds=0.04)
            meter.chunk(GenerateResponse(choice_index=index, finish_reason=reason, usage=usage))
    found = samples(metrics.text())
    for name, count, total in (
        ("vllm:time_to_first_token_seconds", 2, 0.16),
        ("vllm:inter_token_latency_seconds", 1, 0.03),
        ("vllm:e2e_request_latency_seconds", 2, 6.0),
        ("vllm:request_queue_time_seconds", 2, 0.08),
        ("vllm:request_prefill_time_seconds", 2, 0.03 + 0.05),
        ("vllm:request_decode_time_seconds", 2, 0.03),
        ("vllm:request_time_per_output_token_seconds", 1, 0.015),
        ("vllm:request_prompt_tokens", 2, 14),
        ("vllm:request_generation_tokens", 2, 4),
        ("vllm:request_max_num_generation_tokens", 1, 3),
    ):
        assert value(found, f"{name}_count") == count, name
        assert value(found, f"{name}_sum") == pytest.approx(total), name
        assert value(found, f"{name}_bucket", le="+Inf") == count, name
    assert value(found, "vllm:time_to_first_token_seconds_bucket", le="0.08") == 1
    assert value(found, "vllm:time_to_first_token_seconds_bucket", le="0.1") == 2
    assert value(found, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(found, "vllm:request_success_total", finished_reason="length") == 1
    assert value(found, "dspark:requests_failed_total") == 0


@pytest.mark.parametrize(
    ("error", "reason", "finished"),
    [
        (InvalidRequestError("n", "is wrong"), "invalid", "error"),
        (QueueFullError("full", 1.0), "queue_full", "error"),
        (DeadlineExceededError("late"), "deadline", "abort"),
        (asyncio.CancelledError(), "cancelled", "abort"),
        (GeneratorExit(), "cancelled", "abort"),
        (ValueError("bug"), "internal", "error"),
    ],
)
def test_what_fails_is_counted_by_reason(error: BaseException, reason: str, finished: str) -> None:
    metrics = RouterMetrics("m", RouterState)
    with contextlib.suppress(type(error)), metrics.request():
        raise error  # before it was admitted
    with contextlib.suppress(type(error)), metrics.request() as meter:
        meter.begin(3)
        meter.chunk(GenerateResponse(choice_index=0, token_ids=[1], finish_reason=1))
        raise error
    found = samples(metrics.text())
    assert value(found, "dspark:requests_failed_total", reason=reason) == 2
    assert value(found, "dspark:requests_failed_total") == 2
    assert value(found, "vllm:request_success_total", finished_reason=finished) == 2
    assert value(found, "vllm:request_success_total") == 3


def test_leaving_behind_the_last_piece_is_no_failure() -> None:
    metrics = RouterMetrics("m", RouterState)
    with contextlib.suppress(GeneratorExit), metrics.request() as meter:
        meter.begin(1)
        meter.chunk(GenerateResponse(token_ids=[1], finish_reason=1))
        raise GeneratorExit
    assert value(samples(metrics.text()), "dspark:requests_failed_total") == 0


def test_paced_passes_are_exported_of_target_and_drafters() -> None:
    status = ReplicaStatus(replica_id="r", state="ready", is_exporter=True)
    status.paced.num_passes, status.paced.num_overruns = 9, 2
    drafter = status.drafters.add(drafter_id="d", state="half-open")
    drafter.paced.num_passes, drafter.paced.num_overruns = 5, 1
    found = scrape_of(status)
    assert value(found, "dspark:paced_passes_total", replica="r", drafter="") == 9
    assert value(found, "dspark:paced_overruns_total", replica="r", drafter="d") == 1
    assert value(found, "dspark:drafter_state", drafter="d", state="half-open") == 1
    assert value(found, "dspark:drafters", state="half-open") == 1
    assert value(found, "dspark:drafters", state="ready") == 0
    # Without a drafter, and before anything is known, there is a whole histogram all the same.
    assert value(found, "dspark:request_budget_tokens_bucket", le="+Inf") == 0


@pytest.mark.parametrize("change", [{"is_exporter": False}, {"state": "lost"}])
def test_what_another_router_exports_or_is_old_is_left_out(change: dict[str, object]) -> None:
    kept = {"replica_id": "r", "state": "ready", "is_exporter": True}
    assert value(scrape_of(ReplicaStatus(**kept)), "vllm:num_requests_running") == 0
    found = scrape_of(ReplicaStatus(**{**kept, **change}))
    assert not [name for name, labels in found if ("replica", "r") in labels]
    assert value(found, "dspark:replicas", state=str(change.get("state", "ready"))) == 1


def scrape_of(status: ReplicaStatus) -> Samples:
    metrics = RouterMetrics("m", lambda: RouterState(replicas=[status]))
    return samples(metrics.text())


def test_every_metric_is_there_even_without_samples() -> None:
    families = Families("m")
    add_replicas(families, ())
    assert {family.name for family in families} == {metric.name for metric in METRICS}
    assert {name for metric in METRICS for name in metric.sample_names} >= VLLM_NAMES
    ours = {metric.name for metric in METRICS if not metric.name.startswith("vllm:")}
    assert all(name.startswith("dspark:") for name in ours)


def test_the_documentation_lists_them_all() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| `vllm:", "| `dspark:"))]
    labels = {m: ", ".join(f"`{label}`" for label in m.labels[1:]) for m in METRICS}
    suffix = {Kind.COUNTER: "_total"}
    assert rows == [
        f"| `{m.name}{suffix.get(m.kind, '')}` | {m.kind} | {labels[m]} | {m.help} |"
        for m in METRICS
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target")
    return target, save_tiny_drafter(folder / "drafter", target)


async def test_every_metric_of_a_cluster_that_speculates_has_its_number(
    pair: tuple[str, str],
) -> None:
    async with running_parts(make_config(*pair)) as parts:
        sampling = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
        done = await asyncio.gather(
            *(parts.client.complete([1, 2, 3], sampling=sampling) for _ in range(6))
        )
        stats = parts.loop.load().stats
        await until(lambda: value(parts.scrape(), "vllm:generation_tokens_total") == 360)
        await until(lambda: value(parts.scrape(), "vllm:num_requests_running") == 0)
        found = parts.scrape()
    with_samples = {name for name, _ in found}
    expected = {name for metric in METRICS for name in metric.sample_names}
    assert expected - with_samples <= {
        "dspark:paced_passes_total",  # nothing is paced
        "dspark:paced_overruns_total",
        "dspark:calibration_error",  # only once enough was verified
    }
    assert with_samples <= expected
    usages = [completion[0].usage for completion in done]
    assert stats.num_accepted_tokens > 0
    for name, counted in (
        ("num_drafts", [usage.speculation.num_drafts for usage in usages]),
        ("num_draft_tokens", [usage.speculation.num_draft_tokens for usage in usages]),
        ("num_accepted_tokens", [usage.speculation.num_accepted_tokens for usage in usages]),
    ):
        assert value(found, f"vllm:spec_decode_{name}_total") == sum(counted), name
    for position, count in enumerate(stats.num_accepted_tokens_per_pos):
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        assert value(found, name, position=str(position)) == count
    assert value(found, "dspark:request_budget_tokens_sum") == stats.num_draft_tokens
    assert value(found, "dspark:request_budget_tokens_count") == stats.num_steps
    without = value(found, "dspark:request_budget_tokens_bucket", le="0.0")
    assert without == stats.num_steps - stats.num_drafts
    assert value(found, "vllm:prompt_tokens_total") == 18
    assert value(found, "vllm:request_success_total", finished_reason="length") == 6
    assert value(found, "vllm:time_to_first_token_seconds_count") == 6
    answered = value(found, "dspark:drafter_rounds_total", outcome="answered")
    assert 0 < answered <= value(found, "dspark:drafter_round_trip_seconds_count", drafter="d0")
    assert value(found, "dspark:speculation_mode", mode="speculative") == 1
    assert value(found, "dspark:speculation_mode") == 1
    assert value(found, "dspark:speculation_reason") == 1
    assert value(found, "dspark:speculation_mode_seconds_total", mode="speculative") > 0
    assert value(found, "dspark:replicas", state="ready") == 1
    assert all(dict(labels)["model_name"] == "tiny" for _, labels in found)


@asynccontextmanager
async def second_router(replicas: list[tuple[str, str]]) -> AsyncIterator[RouterServer]:
    server = RouterServer(
        tokenizer=TOKENIZER,
        model_name="fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
    )
    await server.start("127.0.0.1")
    server.set_replicas(replicas)
    await until(lambda: server.is_ready)
    try:
        yield server
    finally:
        await server.stop()


def exports(router: RouterServer) -> bool:
    names = {name for name, _ in samples(router.metrics.text())}
    return "vllm:num_requests_running" in names


async def test_of_several_routers_one_exports_a_replica_and_the_next_takes_over() -> None:
    async with running_cluster(1) as cluster:
        await until(lambda: exports(cluster.router))
        replicas = [(replica.replica_id, replica.address) for replica in cluster.replicas]
        async with second_router(replicas) as other:
            await asyncio.sleep(1.2)  # two load reports
            assert exports(cluster.router)
            assert not exports(other)
            assert value(samples(other.metrics.text()), "dspark:replicas", state="ready") == 1
            cluster.router.set_replicas([])
            await until(lambda: exports(other))
            assert not exports(cluster.router)
            cluster.router.set_replicas(replicas)
            await cluster.wait_ready(1)
            await asyncio.sleep(1.2)
            assert exports(other)
            assert not exports(cluster.router)
        await until(lambda: exports(cluster.router))


async def test_a_lost_replica_is_a_restart_and_refusals_are_exported() -> None:
    async with running_cluster(2, step_s=0.01) as cluster:
        generation = cluster.client.generate([5], max_tokens=100)
        async with aclosing(generation) as chunks:
            await anext(chunks)
            busy = next(r for r in cluster.replicas if r.loop.num_active)
            await busy.stop()
            async for _ in chunks:
                pass
        found = samples(cluster.router.metrics.text())
        assert value(found, "dspark:request_restarts_total") == 1
        assert value(found, "dspark:refusals_total", reason="unknown_key") == 0
        with pytest.raises(InvalidRequestError):
            await cluster.client.complete([VOCAB_SIZE])
        found = samples(cluster.router.metrics.text())
        assert value(found, "dspark:requests_failed_total", reason="invalid") == 1


async def test_the_port_for_prometheus_waits_until_it_is_free() -> None:
    metrics = RouterMetrics("m", RouterState)

    def read(port: int) -> Samples:
        # As Prometheus asks; prometheus_client's other form has other names.
        headers = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            return samples(answer.read())

    first = ScrapeServer(metrics.registry, "127.0.0.1", 0, lambda: True)
    second = ScrapeServer(metrics.registry, "127.0.0.1", first.port, lambda: True)
    assert second.port == 0
    assert value(await asyncio.to_thread(read, first.port), "dspark:build_info") == 1
    await first.close()
    await until(lambda: second.port == first.port)
    assert value(await asyncio.to_thread(read, second.port), "dspark:build_info") == 1
    await second.close()


async def test_the_port_for_prometheus_says_whether_the_router_is_ready() -> None:
    async with running_cluster(0) as cluster:
        router = cluster.router
        server = ScrapeServer(router.metrics.registry, "127.0.0.1", 0, lambda: router.is_ready)

        def ready() -> tuple[int, bytes]:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{server.port}/ready", timeout=5
                ) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()

        assert await asyncio.to_thread(ready) == (503, b"not ready\n")
        await cluster.add_replica()
        await cluster.wait_ready(1)
        assert await asyncio.to_thread(ready) == (200, b"ready\n")
        await server.close()


async def test_a_scrape_has_what_the_status_has() -> None:
    async with running_cluster(1) as cluster, AsyncClient(cluster.address) as client:
        status = await client.status()
        await until(lambda: exports(cluster.router))
        found = samples(cluster.router.metrics.text())
        (replica,) = status.replicas
        assert value(found, "dspark:prefix_cached_pages", replica=replica.replica_id) == 7
        assert value(found, "dspark:calibration_error") == pytest.approx(0.03)
        assert value(found, "dspark:malformed_proposals_total") == 7
