"""The real engine behind replica, router and client: what the fakes cannot tell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from cluster.config import ClusterConfig
from cluster.engine.loop import EngineLoop
from cluster.errors import DeadlineExceededError, InvalidRequestError
from cluster.request import Request, SamplingParams
from cluster.rpc.client import AsyncClient, Completion
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
from tests.engine_tools import make_config, make_engine, run
from tests.models import save_tiny_drafter, save_tiny_target
from tests.rpc_tools import until
from tests.test_text import small_tokenizer

SEEDED = SamplingParams(temperature=0.9, top_k=40, seed=5, max_tokens=60)
GREEDY = SamplingParams(temperature=0.0, max_tokens=60)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target")
    return make_config(target, save_tiny_drafter(folder / "drafter", target))


Replica = tuple[EngineLoop, ReplicaServer]


@asynccontextmanager
async def running(
    config: ClusterConfig, num_replicas: int
) -> AsyncIterator[tuple[AsyncClient, list[Replica]]]:
    replicas: list[Replica] = []
    addresses = []
    for index in range(num_replicas):
        engine = make_engine(config)
        server = ReplicaServer(
            f"replica-{index}", max_model_len=engine.max_model_len, vocab_size=engine.vocab_size
        )
        loop = EngineLoop(engine, server.on_outputs)
        loop.start()
        addresses.append((f"replica-{index}", f"127.0.0.1:{await server.start(loop, '127.0.0.1')}"))
        replicas.append((loop, server))
    router = RouterServer(
        tokenizer=small_tokenizer(), model_name="tiny", vocab_size=96, max_model_len=256
    )
    port = await router.start("127.0.0.1")
    router.set_replicas(addresses)
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        yield client, replicas
        for loop, server in replicas:
            await until(lambda server=server: server.num_active_requests == 0)
            assert loop.failure is None
            await until(lambda loop=loop: loop.load().kv_cache_usage == 0.0)
    await router.stop()
    for loop, server in replicas:
        await server.stop()
        await asyncio.to_thread(loop.stop)


def reference(config: ClusterConfig, prompts: list[list[int]], n: int) -> dict[str, list[int]]:
    requests = [
        Request(
            request_id=f"{index}/{choice}",
            prompt_token_ids=tuple(prompt),
            sampling=SEEDED if index % 2 else GREEDY,
            choice_index=choice,
        )
        for index, prompt in enumerate(prompts)
        for choice in range(n)
    ]
    done = run(make_engine(config), requests)
    return {request_id: completion.token_ids for request_id, completion in done.items()}


async def test_replica_lost_in_mid_stream_changes_no_token(config: ClusterConfig) -> None:
    prompts = [[(7 * index + k) % 96 for k in range(1 + 3 * index)] for index in range(8)]
    wanted = reference(config, prompts, 2)
    async with running(config, 2) as (client, replicas):
        tasks = [
            asyncio.create_task(
                client.complete(prompt, sampling=SEEDED if index % 2 else GREEDY, n=2)
            )
            for index, prompt in enumerate(prompts)
        ]
        loop, server = replicas[0]
        await until(lambda: loop.load().num_output_tokens > 20)
        lost = loop.load()
        await server.stop()
        done: list[list[Completion]] = [await task for task in tasks]
        assert 0 < lost.num_output_tokens < 8 * 60  # or it was not in mid-stream
        for index, completions in enumerate(done):
            for completion in completions:
                key = f"{index}/{completion.choice_index}"
                assert list(completion.token_ids) == wanted[key], key
                assert completion.usage.completion_tokens == 60
        assert done[1][0].token_ids != done[1][1].token_ids


async def test_leaving_frees_the_pages(config: ClusterConfig) -> None:
    async with running(config, 1) as (client, [(loop, server)]):
        bystander = asyncio.create_task(client.complete([3, 4], sampling=GREEDY))
        long = replace(SEEDED, max_tokens=250)
        async with aclosing(client.generate([1, 2], sampling=long, n=4)) as chunks:
            await anext(chunks)
        left_at = time.monotonic()
        await bystander
        await until(lambda: server.num_active_requests == 0)
        await until(lambda: loop.load().kv_cache_usage == 0.0)
        assert time.monotonic() - left_at < 2

        with pytest.raises(DeadlineExceededError):
            await client.complete([1, 2], sampling=long, n=4, timeout_s=0.1)
        with pytest.raises(InvalidRequestError) as caught:
            await client.complete([96])
        assert caught.value.field == "prompt.token_ids"
