"""Comparisons: their arithmetic, and the processes of both sides."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from cluster import cli
from cluster.bench import overhead
from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.load_generator import closed_loop
from cluster.bench.load_record import LoadResult, RequestRecord
from cluster.bench.load_shape import LoadShape
from cluster.bench.openai_client import OpenAIClient, TokenCounter
from cluster.bench.overhead import overhead_figures
from cluster.bench.own_serving import OwnSettings
from cluster.bench.own_steps import OwnSteps
from cluster.bench.paired import paired_ratio
from cluster.bench.peer import PeerServer, PeerSettings, serve_command
from cluster.bench.plain_steps import compare_steps, start_own_steps
from cluster.bench.served_load import OURS, SideResults
from cluster.bench.speed import formula_figures, throughput_rows
from cluster.bench.step_server import StepServer
from cluster.config import ClusterConfig
from cluster.errors import ConfigError, DsparkError
from cluster.request import Request, SamplingParams, SpeculationStats
from tests.models import save_tiny_target
from tests.training_tools import save_target


def test_the_ratio_is_the_median_of_paired_runs() -> None:
    # A machine that slows down by half in the middle leaves every pair's ratio as it is.
    figures = paired_ratio([10, 11, 21, 20, 22], [10, 10, 20, 20, 20])
    assert (figures["ours"], figures["peer"]) == (20, 20)
    assert figures["ratio"] == pytest.approx(1.05)
    assert figures["ratio_low"] == pytest.approx(1.0)
    assert figures["ratio_high"] == pytest.approx(1.1)
    assert figures["runs"] == 5


def test_one_run_has_no_width() -> None:
    figures = paired_ratio([3.0], [4.0])
    assert figures["ratio_low"] == figures["ratio"] == figures["ratio_high"] == 0.75


def test_runs_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 runs"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="0 and 0 runs"):
        paired_ratio([], [])


def result(
    throughput: float, stats: SpeculationStats | None = None, first_token_s: float = 0.1
) -> LoadResult:
    """One request of so many tokens in a window of one second."""
    record = RequestRecord(
        started_s=0.0, times_s=(first_token_s,), num_tokens=(int(throughput),), stats=stats
    )
    return LoadResult(records=(record,), started_s=0.0, full_until_s=1.0)


def test_throughput_is_compared_with_the_peer_s_best_mode() -> None:
    # 40 passes, 20 of them with 5 guesses each of which 2 were accepted: 2 tokens a pass.
    stats = SpeculationStats(
        num_drafts=20, num_draft_tokens=100, num_accepted_tokens=40, num_steps=40
    )
    sides = {
        OURS: SideResults({4: [result(200, stats), result(220, stats), result(210, stats)]}),
        "plain": SideResults({4: [result(100), result(100), result(100)]}),
        "ngram": SideResults({4: [result(50), result(500), result(105)]}),
    }
    (row,) = throughput_rows(sides)
    assert (row["concurrency"], row["peer_mode"], row["bar"]) == (4, "ngram", 1.4)
    assert (row["ours"], row["peer"]) == (210, 105)
    assert (row["peer_plain"], row["peer_ngram"]) == (100, 105)
    assert row["ratio"] == pytest.approx(2.0)
    assert (row["tokens_per_pass"], row["budget"]) == (2.0, 5.0)
    # Four requests, 210 tokens a second, 2 a pass.
    assert row["round_ms"] == pytest.approx(1e3 * 4 * 2 / 210, abs=1e-3)
    assert [row[f"ratio_at_{n}"] for n in (2, 3, 4)] == pytest.approx([2.0, 3.0, 4.0])


def test_no_acceptance_length_goes_beyond_the_budget() -> None:
    stats = SpeculationStats(
        num_drafts=10, num_draft_tokens=15, num_accepted_tokens=10, num_steps=10
    )
    sides = {
        OURS: SideResults({16: [result(100, stats)]}),
        "plain": SideResults({16: [result(100)]}),
    }
    (row,) = throughput_rows(sides)
    assert [row[f"ratio_at_{n}"] for n in (2, 3, 4)] == pytest.approx([1.0, 1.25, 1.25])


def test_the_formula() -> None:
    figures = formula_figures(
        time_per_token_s=0.012, tokens_per_pass=4.0, draft_s=0.01, verify_s=0.03
    )
    assert figures["expected_ms"] == pytest.approx(10)
    assert figures["measured_ms"] == pytest.approx(12)
    assert figures["ratio"] == pytest.approx(1.2)


def test_overhead_is_of_paired_runs() -> None:
    served = [result(95, first_token_s=0.104), result(48, first_token_s=0.203)]
    in_process = [result(100, first_token_s=0.1), result(50, first_token_s=0.2)]
    figures = overhead_figures(served, in_process)
    assert figures["throughput_ratio"] == pytest.approx((0.95 + 0.96) / 2)
    assert figures["first_token_ms"] == pytest.approx(3.5)
    assert figures["first_token_ms_by_run"] == pytest.approx([4.0, 3.0])
    assert [(row["side"], row["run"]) for row in figures["sides"]] == [
        ("cluster", 1),
        ("cluster", 2),
        ("engine", 1),
        ("engine", 2),
    ]


def test_our_settings_are_a_configuration(tmp_path: Path) -> None:
    drafter = DrafterChoice("small", "dspark", str(tmp_path / "drafter"))
    settings = OwnSettings(target=str(tmp_path), drafter=drafter, drafter_threads=2)
    config = ClusterConfig.parse(settings.values())
    assert config.speculative is not None
    assert config.speculative.scheduler == "prefix"
    assert config.speculative.model == str(tmp_path / "drafter")
    assert (config.target.num_threads, config.drafter.num_threads) == (2, 2)
    (application,) = settings.document()["applications"]
    assert ClusterConfig.parse(application["args"]) == config
    plain = OwnSettings(target=str(tmp_path), drafter=None)
    assert ClusterConfig.parse(plain.values()).speculative is None


# ---------------------------------------------------------------------------- processes


def save_program(folder: Path, code: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(code))
    return [sys.executable, str(path), json.dumps({"step_s": 0.25})]


FAKE_PROGRAM = """
    from cluster.bench.peer_steps import serve
    class Fake:
        def __init__(self, settings):
            print("noise on standard output")
            self.step_s, self.size = settings["step_s"], 0
        def fill(self, prompts, max_tokens):
            self.size = len(prompts)
            self.context = len(prompts[0])
        def steps(self, count):
            if self.size == 3:
                raise RuntimeError("three is too many")
            return [9.0, 9.0] + [self.step_s * self.size * self.context] * (count - 2)
        def clear(self):
            self.size = 0
    serve(Fake)
"""


class FakePrompts:
    """Takes prompts of any length from nowhere."""

    def take(self, num_tokens: int) -> tuple[int, ...]:
        return (5,) * num_tokens


def start_fake(folder: Path, name: str, step_s: float) -> StepServer:
    command = save_program(folder, FAKE_PROGRAM)
    command[-1] = json.dumps({"step_s": step_s})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return StepServer(command, environment, folder / f"{name}.log")


def test_steps_are_compared_without_those_that_wake_up(tmp_path: Path) -> None:
    notes: list[str] = []
    with start_fake(tmp_path, "own", 0.001) as own, start_fake(tmp_path, "peer", 0.002) as peer:
        rows = compare_steps(
            own,
            peer,
            FakePrompts(),  # type: ignore[arg-type]
            batches=(1, 2),
            contexts=(10,),
            runs=3,
            steps=2,
            note=notes.append,
        )
    assert [(row["concurrency"], row["context"]) for row in rows] == [(1, 10), (2, 10)]
    assert [(row["ours"], row["peer"]) for row in rows] == [(10, 20), (20, 40)]
    assert [row["ratio"] for row in rows] == [0.5, 0.5]
    assert len(notes) == 2
    assert "noise" in (tmp_path / "own.log").read_text()


def test_a_step_process_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    with start_fake(tmp_path, "own", 0.1) as server:
        server.fill([[1]] * 3, 5)
        with pytest.raises(DsparkError, match=r"three is too many.*own\.log"):
            server.steps(3)


@pytest.fixture
def tiny(tmp_path: Path) -> OwnSettings:
    return OwnSettings(
        target=save_tiny_target(tmp_path),
        drafter=None,
        dtype="float32",
        num_threads=1,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_memory_mb=1,
    )


def test_our_engine_steps(tiny: OwnSettings) -> None:
    program = OwnSteps(tiny.values())
    for size in (1, 3):
        program.fill([[7] * 9] * size, 12)
        seconds = program.steps(4)
        assert len(seconds) == 4
        assert all(0 < value < 10 for value in seconds)
        program.clear()
    program.fill([[7] * 9], 3)
    with pytest.raises(RuntimeError, match="one token of every request"):
        program.steps(4)


@pytest.mark.slow
def test_our_engine_steps_in_a_process(tiny: OwnSettings, tmp_path: Path) -> None:
    with start_own_steps(tiny, tmp_path / "own.log") as server:
        server.fill([[7] * 9] * 2, 12)
        assert len(server.steps(4)) == 4
        server.clear()
        with pytest.raises(DsparkError, match="prompt"):
            server.fill([[]], 3)


@pytest.mark.slow
@pytest.mark.cluster
def test_overhead_of_a_tiny_cluster(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["def add(a, b):"]}\n{"turns": ["class Stack:"]}\n')
    settings = OwnSettings(
        target=str(save_target(tmp_path / "target")),
        drafter=None,
        dtype="float32",
        num_threads=1,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_memory_mb=1,
    )
    shape = LoadShape(concurrencies=(2,), waves=2, prompt_tokens=32, max_tokens=12)
    figures = overhead.run(
        settings, shape=shape, data=str(prompts), runs=2, folder=tmp_path, note=print
    ).figures
    assert figures["throughput_ratio"] > 0
    assert [(row["requests"], row["failed"]) for row in figures["sides"]] == [(4, 0)] * 4
    assert ClusterConfig.parse(
        yaml.safe_load((tmp_path / "cluster.yaml").read_text())["applications"][0]["args"]
    ).target.verify_curve == str(tmp_path / "verify-curve.json")


FAKE_PEER = """#!{python}
import http.server, multiprocessing, os, signal, sys, time
if "--broken" in sys.argv or "--speculative-config" in sys.argv:
    print("ValueError: no such method")
    sys.exit(1)
port = int(sys.argv[sys.argv.index("--port") + 1])
def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
child = multiprocessing.Process(target=stay)
child.start()
open(os.environ["FAKE_CHILD"], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def peer(tmp_path: Path) -> PeerSettings:
    """A virtual environment whose Python is a server of nothing but its health."""
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "vllm").touch()
    (bin_folder / "python").write_text(FAKE_PEER.format(python=sys.executable))
    (bin_folder / "python").chmod(0o755)
    return PeerSettings(venv=tmp_path / "venv", target="model")


def state_of(pid: int) -> str:
    """As in proc(5); Z where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_peer_stands_still_with_its_children_and_ends_with_them(
    peer: PeerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHILD", str(tmp_path / "child"))
    server = PeerServer(peer, None, tmp_path / "peer.log")
    try:
        server.wait_ready(60)
        child = int((tmp_path / "child").read_text())
        server.pause()
        wait_for(lambda: state_of(child) == "T")
        server.resume()
        wait_for(lambda: state_of(child) == "S")
        server.wait_ready(10)
        server.pause()
    finally:
        server.close()
    wait_for(lambda: state_of(child) == "Z")


def test_a_peer_that_cannot_start_says_why(peer: PeerSettings, tmp_path: Path) -> None:
    server = PeerServer(peer, {"method": "magic"}, tmp_path / "peer.log")
    try:
        with pytest.raises(DsparkError, match=r"ValueError: no such method.*peer\.log"):
            server.wait_ready(60)
    finally:
        server.close()


def test_a_peer_s_command_and_environment(
    peer: PeerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = serve_command(peer, {"method": "ngram"}, 1234)
    assert command[command.index("--port") + 1] == "1234"
    assert json.loads(command[command.index("--speculative-config") + 1]) == {"method": "ngram"}
    assert "--speculative-config" not in serve_command(peer, None, 1234)
    environment = peer.environment()
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert "OMP_NUM_THREADS" not in environment
    assert "LD_PRELOAD" not in environment or "iomp" not in environment["LD_PRELOAD"]
    library = peer.venv / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert peer.environment()["LD_PRELOAD"] == str(library)


def test_a_virtual_environment_without_the_peer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--peer-venv"):
        PeerServer(PeerSettings(venv=tmp_path, target="model"), None, tmp_path / "peer.log")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "--peer-venv", "{tmp}"], "--peer-venv"),
        (["speed", "--peer-venv", "{venv}", "--cores", "one"], "--cores"),
        (["speed", "--peer-venv", "{venv}", "--cores", "4095"], "4095"),
        (["speed", "--peer-venv", "{venv}", "--concurrency", "2"], "--concurrency"),
        (["load", "--trace", "{tmp}/none.csv"], "none.csv"),
        (["load", "--trace", "{tmp}/none.csv", "--rate", "0"], "--rate"),
        (["load", "--trace", "{tmp}/none.csv", "--context", "2"], "--context"),
        (["load", "--server", "ftp://there"], "--server"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    arguments: list[str],
    message: str,
    peer: PeerSettings,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [text.format(tmp=tmp_path, venv=peer.venv) for text in arguments]
    assert cli.main(["bench", *given, "--json"]) in (1, 2)
    assert message in capfd.readouterr().err


# --------------------------------------------------------------- an OpenAI-compatible server


@asynccontextmanager
async def openai_server(
    answer: Callable[[dict[str, Any]], list[str]],
) -> AsyncGenerator[tuple[str, list[dict[str, Any]]], None]:
    """A server that streams what ``answer`` makes of a body; its URL, and the bodies it got."""
    bodies: list[dict[str, Any]] = []

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "some-model"}]})

    async def complete(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        if bodies[-1]["max_tokens"] > 100:
            return web.json_response({"error": "too long"}, status=400)
        response = web.StreamResponse()
        await response.prepare(request)
        for event in answer(bodies[-1]):
            await response.write(f"data: {event}\n\n".encode())
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", bodies
    finally:
        await runner.cleanup()


def text_event(text: str, completion_tokens: int | None = None) -> str:
    usage = None if completion_tokens is None else {"completion_tokens": completion_tokens}
    return json.dumps({"choices": [{"index": 0, "text": text}], "usage": usage})


def request_of(request_id: str, max_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=request_id, prompt_token_ids=(3, 4, 5), sampling=sampling)


async def run_against(
    answer: Callable[[dict[str, Any]], list[str]], requests: list[Request]
) -> tuple[LoadResult, list[dict[str, Any]]]:
    async with openai_server(answer) as (url, bodies):
        client = OpenAIClient(url + "/")
        try:
            return await closed_loop(client, requests, 1), bodies
        finally:
            await client.close()


async def test_a_server_s_stream_is_counted_by_its_usage() -> None:
    events = [text_event("a", 1), text_event("", 3), text_event("bc", 6), "[DONE]"]
    result, bodies = await run_against(lambda _: events, [request_of("a", 6)])
    (one,) = result.records
    assert one.error is None
    assert one.num_tokens == (6,)  # all that comes at once is one piece
    assert bodies[0]["model"] == "some-model"
    assert bodies[0]["prompt"] == [3, 4, 5]
    assert bodies[0]["ignore_eos"] is True
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"]) == (0.0, 6)


async def test_tokens_that_only_the_last_usage_counts_are_added() -> None:
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 5}})
    events = [text_event("a"), text_event("b"), usage, "[DONE]"]
    result, _ = await run_against(lambda _: events, [request_of("a", 5)])
    assert sum(result.records[0].num_tokens) == 5


async def test_a_server_that_refuses_a_request_fails_it_alone() -> None:
    events = [text_event("a", 1), "[DONE]"]
    requests = [request_of("a", 500), request_of("b", 1)]
    result, _ = await run_against(lambda _: events, requests)
    assert [sum(record.num_tokens) for record in result.records] == [0, 1]
    assert "400" in (result.records[0].error or "")
    assert result.records[1].error is None


async def test_an_error_within_a_stream_fails_the_request() -> None:
    events = [text_event("a", 1), json.dumps({"error": {"message": "out of memory"}})]
    result, _ = await run_against(lambda _: events, [request_of("a", 5)])
    assert "out of memory" in (result.records[0].error or "")


async def test_a_server_that_does_not_answer_fails_requests() -> None:
    client = OpenAIClient("http://127.0.0.1:9")
    result = await closed_loop(client, [request_of("a", 5)], 1)
    await client.close()
    assert "127.0.0.1:9" in (result.records[0].error or "")


def test_tokens_without_usage_are_pieces_with_text() -> None:
    counter = TokenCounter()
    lines = [text_event("a"), text_event(""), text_event("b"), '{"choices": []}']
    pieces = [counter.read(f"data: {line}\n".encode()) for line in lines]
    assert [piece and piece.num_tokens for piece in pieces] == [1, None, 1, None]
    assert counter.missing <= 0
    last = '{"choices": [], "usage": {"completion_tokens": 5}}'
    assert counter.read(f"data: {last}\n".encode()) is None
    assert counter.missing == 3
    assert counter.read(b"\n") is None
    assert counter.read(b": ping\n") is None
