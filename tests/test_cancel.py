"""A client that leaves, or whose deadline passes, through every real part down to the drafter."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.engine.draft_engine import Addition, DraftEngine
from cluster.engine.draft_factory import build_draft_method
from cluster.engine.engine import Engine
from cluster.engine.loop import EngineLoop
from cluster.errors import DeadlineExceededError
from cluster.request import RequestOutput, SamplingParams
from cluster.rpc.client import AsyncClient
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
from tests.drafter_rpc_tools import connected_drafter
from tests.engine_tools import make_config, make_engine
from tests.models import save_tiny_drafter, save_tiny_target
from tests.rpc_tools import until
from tests.test_text import small_tokenizer

NUM_CHOICES = 4
SAMPLING = SamplingParams(temperature=0.9, seed=5, max_tokens=250)
STEP_S = 0.02  # at least: 250 tokens take longer than any request here lives
DEADLINE_S = 1.5


class _HeldDraftEngine(DraftEngine):
    """Takes features only while its gate is open."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.is_holding = threading.Event()
        self.num_held = 0  # sessions in the call that is held

    def append_all(self, additions: Sequence[Addition]) -> list[int | None]:
        if not self.gate.is_set():
            self.num_held = len(additions)
            self.is_holding.set()
            self.gate.wait(60)
        return super().append_all(additions)


@dataclass
class _Cluster:
    client: AsyncClient
    server: ReplicaServer
    loop: EngineLoop
    draft_engine: _HeldDraftEngine

    @property
    def num_drafts(self) -> int:
        return self.loop.load().stats.num_drafts

    @property
    def is_serving(self) -> bool:
        return self.server.num_active_requests > 0 or self.loop.load().kv_cache_usage > 0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target")
    drafter = save_tiny_drafter(folder / "drafter", target)
    # A busy machine must not make the drafter late, or it is quarantined.
    return make_config(target, drafter, speculative={"draft_timeout_ms": 1000})


def _slow_down(engine: Engine) -> None:
    step = engine.step

    def slow_step() -> list[RequestOutput]:
        time.sleep(STEP_S)
        return step()

    engine.step = slow_step  # type: ignore[method-assign]


@asynccontextmanager
async def _running(config: ClusterConfig) -> AsyncIterator[_Cluster]:
    draft_engine = _HeldDraftEngine(build_draft_method(config), config.drafter)
    client_loop = {"event_loop": asyncio.get_running_loop()}
    async with connected_drafter(config, draft_engine, vocab_size=96, **client_loop) as connected:
        _, draft_client = connected
        engine = make_engine(config, draft_client)
        _slow_down(engine)
        server = ReplicaServer(
            "replica", max_model_len=engine.max_model_len, vocab_size=engine.vocab_size
        )
        loop = EngineLoop(engine, server.on_outputs)
        loop.start()
        router = RouterServer(
            tokenizer=small_tokenizer(), model_name="tiny", vocab_size=96, max_model_len=256
        )
        port = await router.start("127.0.0.1")
        router.set_replicas([("replica", f"127.0.0.1:{await server.start(loop, '127.0.0.1')}")])
        try:
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                yield _Cluster(client, server, loop, draft_engine)
        finally:
            draft_engine.gate.set()
            await router.stop()
            await server.stop()
            await asyncio.to_thread(loop.stop)


async def _leave(cluster: _Cluster, ready_to_leave: Any) -> None:
    stream = cluster.client.generate([1, 2, 3], sampling=SAMPLING, n=NUM_CHOICES)
    async with aclosing(stream) as chunks:
        await anext(chunks)
        await until(ready_to_leave)


async def _pass_the_deadline(cluster: _Cluster, ready_to_leave: Any) -> None:
    with pytest.raises(DeadlineExceededError):
        await cluster.client.complete(
            [1, 2, 3], sampling=SAMPLING, n=NUM_CHOICES, timeout_s=DEADLINE_S
        )
    assert ready_to_leave()


@pytest.mark.parametrize("end", [_leave, _pass_the_deadline])
async def test_the_end_of_a_request_frees_pages_and_draft_sessions(
    config: ClusterConfig, end: Any
) -> None:
    async with _running(config) as cluster:
        draft_engine = cluster.draft_engine
        # In the middle of its rounds.
        await end(cluster, lambda: cluster.num_drafts > 0)
        await until(lambda: not cluster.is_serving)
        await until(lambda: draft_engine.num_sessions == 0)

        # With features on their way that the drafter has not acknowledged.
        draft_engine.gate.clear()
        num_drafts = cluster.num_drafts
        await end(cluster, draft_engine.is_holding.is_set)
        await until(lambda: not cluster.is_serving)
        # Those whose features are held; how many share a call is the drafter's to choose.
        assert draft_engine.num_sessions == draft_engine.num_held > 0
        assert cluster.num_drafts == num_drafts
        draft_engine.gate.set()
        await until(lambda: draft_engine.num_sessions == 0)
        draft_engine.check_integrity()

        # Nobody was quarantined or lost for it: the next request is drafted for.
        await end(cluster, lambda: cluster.num_drafts > num_drafts)
        await until(lambda: not cluster.is_serving)
        await until(lambda: draft_engine.num_sessions == 0)
        assert cluster.loop.failure is None
