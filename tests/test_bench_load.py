"""Load: records and their figures, the generator, traces, and a run on a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest

from cluster.bench import load
from cluster.bench.arrival_trace import Arrival, read_trace, scale_lengths, scale_rate
from cluster.bench.frontier_plot import plot_frontier
from cluster.bench.load_clients import Piece
from cluster.bench.load_generator import closed_loop, open_loop, record_request
from cluster.bench.load_record import LoadResult, RequestRecord
from cluster.bench.load_shape import LoadShape
from cluster.bench.own_serving import OwnSettings
from cluster.bench.report import Report
from cluster.errors import ConfigError, DataError, DsparkError
from cluster.request import Request, SpeculationStats
from tests.training_tools import save_target

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def record(started_s: float, *pieces: tuple[float, int], **fields: object) -> RequestRecord:
    return RequestRecord(
        started_s=started_s,
        times_s=tuple(time_s for time_s, _ in pieces),
        num_tokens=tuple(count for _, count in pieces),
        **fields,  # type: ignore[arg-type]
    )


def test_a_request_s_latencies() -> None:
    one = record(1.0, (1.5, 1), (1.7, 2), (2.5, 1))
    assert one.first_token_s == pytest.approx(0.5)
    assert one.tokens_per_second == pytest.approx(3 / 1.0)
    assert one.token_gaps_s() == pytest.approx([0.1, 0.1, 0.8])


def test_a_request_without_a_token_has_no_latencies() -> None:
    none = record(1.0, error="gone")
    assert none.first_token_s is None
    assert none.tokens_per_second is None
    assert none.token_gaps_s() == []
    figures = LoadResult(records=(none,), started_s=1.0, full_until_s=2.0).figures()
    assert figures["failed"] == 1
    assert figures["throughput"] == 0
    assert figures["ttft_ms_p50"] is None


def test_throughput_counts_the_window_only() -> None:
    records = (record(0.0, (1.0, 4), (2.0, 6)), record(0.0, (1.5, 5), (9.0, 100)))
    result = LoadResult(records=records, started_s=0.0, full_until_s=3.0)
    assert result.throughput == pytest.approx(15 / 3.0)


def test_percentiles_are_over_requests_and_tokens() -> None:
    records = tuple(record(0.0, (0.1 * (n + 1), 1), (0.1 * (n + 1) + 0.04, 2)) for n in range(5))
    figures = LoadResult(records=records, started_s=0.0, full_until_s=1.0).figures()
    assert figures["ttft_ms_p50"] == pytest.approx(300)
    assert figures["ttft_ms_p95"] == pytest.approx(480)
    assert figures["ttft_ms_p99"] == pytest.approx(496)
    assert figures["itl_ms_p99"] == pytest.approx(20)
    assert figures["tokens_per_second_per_user"] == pytest.approx(50)


def test_speculation_is_summed_over_requests() -> None:
    told = (
        SpeculationStats(num_drafts=4, num_draft_tokens=28, num_accepted_tokens=10, num_steps=5),
        SpeculationStats(num_drafts=6, num_draft_tokens=12, num_accepted_tokens=5, num_steps=10),
    )
    records = tuple(record(0.0, (1.0, 1), stats=stats) for stats in told)
    figures = LoadResult(records=records, started_s=0.0, full_until_s=1.0).figures()
    assert figures["acceptance_length"] == pytest.approx(1 + 15 / 10)
    assert figures["budget"] == pytest.approx(40 / 10)
    assert figures["tokens_per_pass"] == pytest.approx(1 + 15 / 15)


class FakeClient:
    """Answers with so many pieces, one every turn of the event loop; some requests fail."""

    def __init__(self, num_pieces: Sequence[int], failing: Sequence[int] = ()) -> None:
        self._num_pieces = num_pieces
        self._failing = failing
        self.order: list[int] = []
        self.num_active = 0
        self.most_active = 0

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        index = int(request.request_id)
        self.order.append(index)
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        try:
            for _ in range(self._num_pieces[index]):
                await asyncio.sleep(0.001)
                yield Piece(2)
            if index in self._failing:
                raise DsparkError(f"request {index} is lost")
            yield Piece(0, SpeculationStats(num_steps=self._num_pieces[index]))
        finally:
            self.num_active -= 1

    async def close(self) -> None:
        pass


def requests(count: int) -> list[Request]:
    return [Request(request_id=str(index), prompt_token_ids=(1, 2)) for index in range(count)]


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    client = FakeClient([3, 30, 3, 3, 3, 3], failing=[2])
    result = await closed_loop(client, requests(6), 2)
    assert client.most_active == 2
    assert sorted(client.order) == client.order == list(range(6))
    assert [r.error for r in result.records if r.error is not None] == ["request 2 is lost"]
    assert sum(sum(r.num_tokens) for r in result.records) == 2 * 45
    assert result.stats is not None
    assert result.stats.num_steps == 42
    # The long request outlives the others: from then on one place is empty.
    ends = sorted(r.times_s[-1] for r in result.records)
    assert ends[-2] <= result.full_until_s < ends[-1]


class RoundClient:
    """Sends the tokens of two rounds one by one."""

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        for count in (3, 2):
            for _ in range(count):
                yield Piece(1)
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        pass


async def test_tokens_that_come_together_are_one_piece() -> None:
    one = await record_request(RoundClient(), requests(1)[0])
    assert one.num_tokens == (3, 2)
    first, second = one.token_gaps_s()
    assert first == second >= 0.005


async def test_an_open_loop_sends_in_time_whatever_is_under_way() -> None:
    client = FakeClient([40, 1, 1])
    result = await open_loop(client, requests(3), [0.0, 0.01, 0.03])
    assert client.most_active >= 2
    starts = [r.started_s - result.started_s for r in result.records]
    for start, wanted in zip(starts, [0.0, 0.01, 0.03], strict=True):
        assert wanted <= start < wanted + 0.5
    assert result.full_until_s == max(r.times_s[-1] for r in result.records)


def test_a_trace_is_read_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        HEADER + "2023-11-16 18:15:46.6805900,300,100\n2023-11-16 18:15:48.1805900,1,0\n"
        "2023-11-16 18:16:46.6805900,800,200\n2023-11-16 18:16:50.0000000,8000,2000\n"
    )
    arrivals = read_trace(str(path), 3)
    assert arrivals == [Arrival(0.0, 300, 100), Arrival(1.5, 1, 0), Arrival(60.0, 800, 200)]
    scaled = scale_lengths(arrivals, 100)
    lengths = [(a.num_prompt_tokens, a.num_output_tokens) for a in scaled]
    assert lengths == [(30, 10), (2, 1), (80, 20)]
    assert scale_lengths(arrivals, 5000)[0] == arrivals[0]
    assert [a.arrival_s for a in scale_rate(arrivals, 4.0)] == pytest.approx([0.0, 0.0125, 0.5])


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("TIMESTAMP,ContextTokens\n", 1, "GeneratedTokens"),
        (HEADER, None, "no request"),
        (HEADER + "2023-11-16 18:15:46,3,4\n2023-11-16 18:15:47,x,4\n", 3, "x"),
        (HEADER + "yesterday,3,4\n", 2, "yesterday"),
        (HEADER + "2023-11-16 18:15:46,3,-4\n", 2, "negative"),
    ],
)
def test_a_broken_trace_is_refused(
    tmp_path: Path, text: str, line: int | None, message: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_trace(str(path), 10)
    assert (caught.value.file, caught.value.line) == (str(path), line)


def test_a_prompt_that_fills_the_context_leaves_room_for_a_token() -> None:
    (scaled,) = scale_lengths([Arrival(0.0, 4000, 0)], 100)
    assert (scaled.num_prompt_tokens, scaled.num_output_tokens) == (99, 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> OwnSettings:
    return OwnSettings(
        target=str(save_target(tmp_path_factory.mktemp("load") / "target")),
        drafter=None,
        dtype="float32",
        num_threads=1,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_memory_mb=1,
        enforce_eager=True,
    )


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["def add(a, b):"]}\n{"turns": ["class Stack:"]}\n')
    return str(path)


def test_an_engine_under_load(tiny: OwnSettings, prompts: str, tmp_path: Path) -> None:
    shape = LoadShape(
        concurrencies=(1, 3), waves=2, min_requests=2, prompt_tokens=32, max_tokens=12
    )
    report = load.run_closed(load.ENGINE, tiny, shape=shape, data=prompts)
    rows = report.figures["rows"]
    assert report.passed
    assert [(row["concurrency"], row["requests"], row["failed"]) for row in rows] == [
        (1, 2, 0),
        (3, 6, 0),
    ]
    assert all(row["throughput"] > 0 and row["tokens_per_pass"] == 1 for row in rows)
    plot_frontier(rows, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_an_engine_under_a_trace(tiny: OwnSettings, prompts: str) -> None:
    arrivals = [Arrival(0.0, 5, 4), Arrival(0.01, 60, 4), Arrival(0.02, 3, 2)]
    report = load.run_trace(load.ENGINE, tiny, arrivals=arrivals, data=prompts, temperature=0.0)
    (row,) = report.figures["rows"]
    assert report.passed
    assert (row["requests"], row["requests_per_second"]) == (3, 100.0)


def test_requests_that_fail_fail_the_suite(tiny: OwnSettings, prompts: str) -> None:
    arrivals = [Arrival(0.0, 5, 4), Arrival(0.0, 5, -1)]
    report = load.run_trace(load.ENGINE, tiny, arrivals=arrivals, data=prompts, temperature=0.0)
    assert not report.passed
    assert report.figures["rows"][0]["failed"] == 1
    assert "max_tokens" in report.figures["errors"][0]


def test_an_unknown_server_is_refused(tiny: OwnSettings) -> None:
    with pytest.raises(ConfigError, match="--server"):
        load.client_maker("ftp://somewhere", tiny)


def test_few_rows_are_shown_side_by_side() -> None:
    rows = [{"concurrency": 1, "throughput": 10.5, "p50": None}, {"concurrency": 16, "p50": 3}]
    lines = Report("load", {"server": "engine", "rows": rows}, True).to_text().splitlines()
    assert lines[-3].split() == ["concurrency", "1", "16"]
    assert lines[-2].split() == ["throughput", "10.5", "-"]
    assert lines[-1].split() == ["p50", "-", "3"]
