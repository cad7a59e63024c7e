"""A drafter in a process of its own, for an engine in this one; ``python -m`` serves it.

Its argument is a JSON object, the ``args`` of a configuration; it prints its port and serves until
its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from cluster.config import ClusterConfig
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.draft_profile import measure_draft_curve
from cluster.errors import DsparkError
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.drafter_server import DrafterServer

_HOST = "127.0.0.1"
_DIGESTS = {"target": "bench"}


class DrafterProcess:
    """The configured drafter while a ``with`` block runs.

    Args:
        values: ``args`` of a configuration with a ``speculative`` part.

    Raises:
        DsparkError: it does not start; its error is on standard error.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "cluster.bench.drafter_process", json.dumps(self._values)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line.strip().isdigit():
            self._process.kill()
            raise DsparkError("the drafter's process does not start")
        self.address = f"{_HOST}:{int(line)}"
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def connect(
        self,
        config: ClusterConfig,
        vocab_size: int,
        replica_id: str = "bench",
        addresses: Sequence[str] = (),
    ) -> GrpcDraftClient:
        """A client of it, as one of its replicas; whoever calls closes it.

        Args:
            addresses: of drafters like it, or of ways to it; none: its own.
        """
        if config.speculative is None:
            raise ValueError("there is nothing to draft with")
        client = GrpcDraftClient(
            replica_id=replica_id,
            digests=_DIGESTS,
            vocab_size=vocab_size,
            config=config.speculative,
        )
        client.set_drafters([(f"bench-{a}", a) for a in addresses or [self.address]])
        return client


async def _serve(config: ClusterConfig) -> None:
    if config.speculative is None:
        raise ValueError("a drafter needs the configuration's `speculative` part")
    engine = build_draft_engine(config)
    if engine.curve is None:
        engine.curve = measure_draft_curve(engine)
    server = DrafterServer(
        engine,
        drafter_id="bench",
        digests=_DIGESTS,
        config=config.drafter,
        method=config.speculative.method,
    )
    print(await server.start(_HOST), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started this is gone
    await server.drain()


def _main() -> None:
    import torch

    config = ClusterConfig.parse(json.loads(sys.argv[1]))
    torch.set_num_threads(config.drafter.num_threads)
    asyncio.run(_serve(config))


if __name__ == "__main__":
    _main()
