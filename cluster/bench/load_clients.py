"""Who can be put under load: our engine in this process, and our cluster over gRPC.

``cluster.bench.openai_client`` has the third: any OpenAI-compatible server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from cluster.engine.engine import Engine
from cluster.engine.loop import EngineLoop
from cluster.request import Request, RequestOutput, SpeculationStats
from cluster.rpc.client import AsyncClient


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: its output tokens; ``stats`` may come with the last one."""

    num_tokens: int
    stats: SpeculationStats | None = None


class LoadClient(Protocol):
    """Something that answers requests. Belongs to one event loop."""

    def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Streams the answer.

        Raises:
            DsparkError: it did not finish.
        """
        ...

    async def close(self) -> None:
        """Ends what runs."""
        ...


class EngineClient:
    """An engine in a thread of this process.

    Args:
        engine: used by nobody else; closed with the client. To be made in the event loop.
    """

    def __init__(self, engine: Engine) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._queues: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._engine_loop = EngineLoop(engine, self._on_outputs)
        self._engine_loop.start()

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """As ``LoadClient``; a request must not have the id of one that is under way."""
        queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._queues[request.request_id] = queue
        self._engine_loop.submit(request)
        try:
            while True:
                output = await queue.get()
                if output.error is not None:
                    raise output.error
                stats = output.usage.speculation if output.usage is not None else None
                yield Piece(len(output.token_ids), stats)
                if output.is_last:
                    return
        finally:
            del self._queues[request.request_id]

    async def close(self) -> None:
        """Ends the engine's thread, and the engine."""
        await asyncio.to_thread(self._engine_loop.stop)

    def _on_outputs(self, outputs: list[RequestOutput]) -> None:
        self._event_loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output)


class ClusterClient:
    """A running cluster. ``address`` is ``host:port`` of a router."""

    def __init__(self, address: str) -> None:
        self._client = AsyncClient(address)

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """As ``LoadClient``."""
        async for chunk in self._client.generate(
            request.prompt_token_ids, sampling=request.sampling, speculation=request.speculation
        ):
            stats = chunk.usage.speculation if chunk.usage is not None else None
            yield Piece(len(chunk.token_ids), stats)

    async def close(self) -> None:
        """Ends the connection."""
        await self._client.close()
