"""The engine with drafters in processes of their own, which die, hang and come back (rule 8)."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.request import Request, SamplingParams
from cluster.rpc.drafter_client import GrpcDraftClient
from tests.engine_tools import Completion, make_config, make_engine, run
from tests.models import save_tiny_drafter, save_tiny_target

DIGESTS = {"target": "t", "tokenizer": "k", "drafter": "d", "projection": "p"}


def serve(config: ClusterConfig, drafter_id: str, ports: Any) -> None:
    """A drafter process: publishes its port and serves until it is killed."""
    import torch

    from cluster.engine.draft_factory import build_draft_engine
    from cluster.rpc.drafter_server import DrafterServer

    torch.set_num_threads(1)
    engine = build_draft_engine(config)

    async def serve_forever() -> None:
        server = DrafterServer(
            engine, drafter_id=drafter_id, digests=DIGESTS, config=config.drafter
        )
        ports.put(await server.start("127.0.0.1"))
        await asyncio.Event().wait()

    asyncio.run(serve_forever())


class Pool:
    """Drafter processes and a client that knows them."""

    def __init__(self, config: ClusterConfig) -> None:
        assert config.speculative is not None
        self.config = config
        self.processes: dict[str, Any] = {}
        self.addresses: list[tuple[str, str]] = []
        self._context = multiprocessing.get_context("spawn")
        self._num_started = 0
        self.client = GrpcDraftClient(
            replica_id="replica", digests=DIGESTS, vocab_size=96, config=config.speculative
        )

    def add(self) -> str:
        drafter_id = f"drafter-{self._num_started}"
        self._num_started += 1
        ports = self._context.Queue()
        process = self._context.Process(
            target=serve, args=(self.config, drafter_id, ports), daemon=True
        )
        process.start()
        self.processes[drafter_id] = process
        self.addresses.append((drafter_id, f"127.0.0.1:{ports.get(timeout=240)}"))
        self.client.set_drafters(self.addresses)
        wait_until(lambda: self.state(drafter_id) == "ready")
        return drafter_id

    def state(self, drafter_id: str) -> str:
        states = {s.drafter_id: s.state for s in self.client.status()}
        return states.get(drafter_id, "unknown")

    def signal(self, drafter_id: str, number: int) -> None:
        os.kill(self.processes[drafter_id].pid, number)

    def close(self) -> None:
        self.client.close()
        for process in self.processes.values():
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target")
    drafter = save_tiny_drafter(folder / "drafter", target)
    return make_config(target, drafter, speculative={"draft_timeout_ms": 300})


@contextmanager
def drafter_pool(config: ClusterConfig, size: int) -> Iterator[Pool]:
    pool = Pool(config)
    try:
        for _ in range(size):
            pool.add()
        yield pool
    finally:
        pool.close()


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def make_requests() -> list[Request]:
    greedy = SamplingParams(temperature=0.0, max_tokens=100)
    requests = [
        Request(request_id=f"g{i}", prompt_token_ids=(i, i + 1), sampling=greedy) for i in range(4)
    ]
    for i in range(4):
        params = SamplingParams(temperature=0.9, top_k=30, seed=i, max_tokens=100)
        requests.append(
            Request(request_id=f"s{i}", prompt_token_ids=(i, 9), sampling=params, choice_index=i)
        )
    return requests


@pytest.fixture(scope="module")
def expected(config: ClusterConfig) -> dict[str, list[int]]:
    plain = make_engine(make_config(config.target.model))
    return {k: c.token_ids for k, c in run(plain, make_requests()).items()}


def run_with_event(engine: Engine, after_tokens: int, event: Any) -> dict[str, Completion]:
    """Serves all requests, and lets ``event`` happen once so many tokens are out."""
    completions = {r.request_id: Completion() for r in make_requests()}
    for request in make_requests():
        engine.add_request(request)
    num_tokens, happened = 0, False
    while engine.has_work:
        if num_tokens >= after_tokens and not happened:
            happened = True
            event()
        for output in engine.step():
            assert output.error is None
            completion = completions[output.request_id]
            assert output.token_offset == len(completion.token_ids)
            completion.token_ids += output.token_ids
            completion.usage = output.usage or completion.usage
            num_tokens += len(output.token_ids)
    assert happened
    engine.check()
    return completions


def tokens_of(done: dict[str, Completion]) -> dict[str, list[int]]:
    return {k: c.token_ids for k, c in done.items()}


def num_drafts(done: dict[str, Completion]) -> int:
    return sum(c.usage.speculation.num_drafts for c in done.values() if c.usage)


def test_a_killed_drafter_changes_no_token(
    config: ClusterConfig, expected: dict[str, list[int]]
) -> None:
    with drafter_pool(config, 1) as pool:
        engine = make_engine(config, pool.client)
        whole = run(engine, make_requests())
        assert tokens_of(whole) == expected
        assert num_drafts(whole) > 0

        killed = run_with_event(engine, 200, lambda: pool.signal("drafter-0", signal.SIGKILL))
        assert tokens_of(killed) == expected
        assert 0 < num_drafts(killed) < num_drafts(whole)
        assert engine.load().speculation_state == "off"

        pool.add()
        back = run(engine, make_requests())
        assert tokens_of(back) == expected
        assert num_drafts(back) > 0
        assert engine.load().speculation_state == "on"


def test_sessions_move_to_another_drafter(
    config: ClusterConfig, expected: dict[str, list[int]]
) -> None:
    with drafter_pool(config, 2) as pool:
        engine = make_engine(config, pool.client)
        done = run_with_event(engine, 200, lambda: pool.signal("drafter-0", signal.SIGKILL))
        assert tokens_of(done) == expected
        # Those of the dead one went on with the other: far more rounds than before the kill.
        assert all(c.usage and c.usage.speculation.num_drafts > 10 for c in done.values())


def test_a_hanging_drafter_costs_its_timeouts_and_no_more(
    config: ClusterConfig, expected: dict[str, list[int]]
) -> None:
    with drafter_pool(config, 1) as pool:
        engine = make_engine(config, pool.client)
        run(engine, make_requests())
        stopped_at = time.monotonic()

        def stop() -> None:
            nonlocal stopped_at
            stopped_at = time.monotonic()
            pool.signal("drafter-0", signal.SIGSTOP)

        done = run_with_event(engine, 200, stop)
        assert tokens_of(done) == expected
        late = sum(c.usage.speculation.num_late_proposals for c in done.values() if c.usage)
        assert late > 0
        assert pool.state("drafter-0") != "ready"
        pool.signal("drafter-0", signal.SIGCONT)
        wait_until(lambda: pool.state("drafter-0") == "ready")
        assert tokens_of(run(engine, make_requests())) == expected
