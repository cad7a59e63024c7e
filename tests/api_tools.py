"""A whole small cluster in this process, with its HTTP door under uvicorn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.api.app import create_app
from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.engine.loop import EngineLoop
from cluster.engine.target_config import eos_token_ids
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
from tests.engine_tools import make_engine


@dataclass
class ApiServer:
    """Where it listens, and its parts; they belong to the event loop ``loop``."""

    url: str
    grpc_address: str
    router: RouterServer
    engine_loop: EngineLoop
    loop: asyncio.AbstractEventLoop

    def call(self, coroutine: Any) -> Any:
        """Runs a coroutine where the server runs."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


@contextmanager
def serving(
    config: ClusterConfig,
    *,
    router: dict[str, Any] | None = None,
    engine: Engine | None = None,
    chat_template: str | None = None,
    **app: Any,
) -> Iterator[ApiServer]:
    """Serves ``config`` by the real engine, replica, router and application.

    Args:
        router: arguments of ``RouterServer``.
        engine: unset: one of ``config``, with its drafter in this process.
        chat_template: of the router.
        app: arguments of ``create_app``.
    """
    engine = engine or make_engine(config)
    model = config.target.model
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model)
    started, stop = threading.Event(), threading.Event()
    found: list[ApiServer | BaseException] = []

    async def serve() -> None:
        replica = ReplicaServer(
            "replica-0", max_model_len=engine.max_model_len, vocab_size=engine.vocab_size
        )
        engine_loop = EngineLoop(engine, replica.on_outputs)
        engine_loop.start()
        replica_port = await replica.start(engine_loop, "127.0.0.1")
        server = RouterServer(
            tokenizer=tokenizer,
            model_name=config.model_name,
            vocab_size=engine.vocab_size,
            max_model_len=engine.max_model_len,
            eos_token_ids=eos_token_ids(model),
            chat_template=chat_template,
            **(router or {}),
        )
        grpc_port = await server.start("127.0.0.1")
        http = uvicorn.Server(
            uvicorn.Config(create_app(server, **app), host="127.0.0.1", port=0, log_level="warning")
        )
        http.config.load()
        task = asyncio.create_task(http.serve())
        while not http.started:
            await asyncio.sleep(0.01)
        server.set_replicas([("replica-0", f"127.0.0.1:{replica_port}")])
        while not server.is_ready:
            await asyncio.sleep(0.01)
        port = http.servers[0].sockets[0].getsockname()[1]
        found.append(
            ApiServer(
                f"http://127.0.0.1:{port}",
                f"127.0.0.1:{grpc_port}",
                server,
                engine_loop,
                asyncio.get_running_loop(),
            )
        )
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        http.should_exit = True
        await task
        await server.stop()
        await replica.stop()
        await asyncio.to_thread(engine_loop.stop)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            found.append(error)
            started.set()

    thread = threading.Thread(target=run, name="api-server")
    thread.start()
    try:
        assert started.wait(120)
        first = found[0]
        if isinstance(first, BaseException):
            raise first
        yield first
    finally:
        stop.set()
        thread.join(60)
    if len(found) > 1:
        raise found[1]  # type: ignore[misc]
