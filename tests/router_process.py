"""A router in a process of its own, for tests that kill it.

python -m tests.router_process ROUTER_ID PORT REPLICA_ID=ADDRESS ...

prints its port once it is ready.
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from pathlib import Path

from cluster.rpc.router import RouterServer
from tests.rpc_tools import MAX_MODEL_LEN, TOKENIZER, VOCAB_SIZE, Replica

_numbers = itertools.count()


class RouterProcess:
    """One that is started with the block and killed behind it, if it still lives."""

    def __init__(self, replicas: list[Replica], port: int = 0) -> None:
        self.router_id = f"router-{next(_numbers)}"
        self.port = port
        self._replicas = [f"{replica.replica_id}={replica.address}" for replica in replicas]

    async def __aenter__(self) -> RouterProcess:
        arguments = [self.router_id, str(self.port), *self._replicas]
        command = [sys.executable, "-m", "tests.router_process", *arguments]
        self._process = subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(await asyncio.to_thread(self._process.stdout.readline))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """As kill -9 does."""
        self._process.kill()


async def _serve(router_id: str, port: int, replicas: list[str]) -> None:
    server = RouterServer(
        router_id=router_id,
        tokenizer=TOKENIZER,
        model_name="fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
    )
    port = await server.start("127.0.0.1", port)
    pairs = [replica.split("=") for replica in replicas]
    server.set_replicas([(name, address) for name, address in pairs])
    while not server.is_ready:
        await asyncio.sleep(0.01)
    print(port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
