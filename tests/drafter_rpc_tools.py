"""Drafter servers and clients of one process, for the tests of the drafter's gRPC."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch

from cluster.config import ClusterConfig, DrafterConfig, SpeculativeConfig
from cluster.engine.draft_client import DraftSampling, SessionKey
from cluster.engine.draft_engine import DraftEngine
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.drafter_server import DrafterServer
from cluster.v1 import common_pb2
from tests.draft_helpers import VOCAB, D, feed, make_drafter, make_engine
from tests.rpc_tools import until

DIGESTS = {"target": "t", "tokenizer": "k", "drafter": "d", "projection": "p"}
GREEDY = DraftSampling(temperature=0.0)
SAMPLED = DraftSampling(temperature=1.0, send_probs=True)
REPOSITORY = Path(__file__).resolve().parents[1]
_PATIENCE_S = 120.0
SPECULATIVE = SpeculativeConfig(model="none")


class PatientDraftClient(GrpcDraftClient):
    """The real client, but it waits for acknowledgements before it tells of them.

    The engine would not wait: on a busy machine short requests would be over, decoded plainly,
    before their drafter knows their prompts.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._fed: dict[SessionKey, int] = {}

    def feed(
        self, session: SessionKey, start: int, features: torch.Tensor, token_ids: Sequence[int]
    ) -> int:
        num_rows = super().feed(session, start, features, token_ids)
        self._fed[session] = start + num_rows
        return num_rows

    def acknowledged_length(self, session: SessionKey) -> int:
        deadline = time.monotonic() + _PATIENCE_S
        while (length := super().acknowledged_length(session)) < self._fed[session]:
            assert time.monotonic() < deadline, "the drafter does not acknowledge"
            time.sleep(0.0005)
        return length

    def close_session(self, session: SessionKey) -> None:
        self._fed.pop(session, None)
        super().close_session(session)


class LoopThread:
    """An event loop in a thread, where a test's servers run."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine, timeout_s: float = 120.0):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def start(self, coroutine):
        """Runs it there and does not wait; returns its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def served(
    loop: LoopThread, engine: DraftEngine, *, digests: dict[str, str] = DIGESTS, **options
) -> Iterator[tuple[DrafterServer, str]]:
    """A running server and its address."""
    server = DrafterServer(
        engine, drafter_id="d0", digests=digests, config=DrafterConfig(), **options
    )
    port = loop.run(server.start("127.0.0.1"))
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        loop.run(server.drain(0.1))


@asynccontextmanager
async def connected_drafter(
    config: ClusterConfig, engine: DraftEngine, *, vocab_size: int, **client: Any
) -> AsyncIterator[tuple[DrafterServer, GrpcDraftClient]]:
    """``engine`` served as ``config`` says, by this event loop, and a client that it has welcomed.

    An engine that is built with the client closes it; the server drains when the block is left.
    """
    assert config.speculative is not None
    server = DrafterServer(engine, drafter_id="d0", digests=DIGESTS, config=config.drafter)
    port = await server.start("127.0.0.1")
    try:
        drafts = GrpcDraftClient(
            replica_id="replica-0",
            digests=DIGESTS,
            vocab_size=vocab_size,
            config=config.speculative,
            **client,
        )
        drafts.set_drafters([("d0", f"127.0.0.1:{port}")])
        await until(drafts.is_ready)
        yield server, drafts
    finally:
        await server.drain(0.1)


@contextmanager
def client_of(*addresses: str, replica_id: str = "replica", **options) -> Iterator[GrpcDraftClient]:
    client = GrpcDraftClient(
        replica_id=replica_id, digests=DIGESTS, vocab_size=VOCAB, config=SPECULATIVE, **options
    )
    try:
        client.set_drafters([(f"d{i}", address) for i, address in enumerate(addresses)])
        yield client
    finally:
        client.close()


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def state_of(client: GrpcDraftClient) -> str:
    statuses = client.status()
    return statuses[0].state if statuses else "none"


def features(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, D, generator=torch.Generator().manual_seed(seed))


def open_with(
    client: GrpcDraftClient, name: str, length: int, sampling: DraftSampling = GREEDY
) -> SessionKey:
    key = SessionKey(name, 0)
    assert client.open_session(key, sampling)
    assert feed(client, key, 0, features(length)) == length
    assert wait_for(lambda: client.acknowledged_length(key) == length)
    return key


def tensor_of(shape: list[int], data: bytes, dtype: int = 1) -> common_pb2.Tensor:
    return common_pb2.Tensor(dtype=dtype, shape=shape, data=data)


def serve_forever(port_path: str) -> None:
    """A drafter in a process of its own, to be killed."""

    async def serve() -> None:
        server = DrafterServer(
            make_engine(make_drafter()), drafter_id="d0", digests=DIGESTS, config=DrafterConfig()
        )
        port = await server.start("127.0.0.1")
        with open(f"{port_path}.new", "w") as file:
            file.write(str(port))
        os.rename(f"{port_path}.new", port_path)
        await asyncio.Event().wait()

    torch.set_num_threads(1)
    asyncio.run(serve())
