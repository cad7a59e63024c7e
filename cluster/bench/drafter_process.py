"""A drafter in a process of its own, for an engine in this one; ``python -m`` serves it.

Its argument is a JSON object, the ``args`` of a configuration; it prints its port and serves until
its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

from cluster.bench.port_process import HOST, PortProcess
from cluster.config import ClusterConfig
from cluster.engine.draft_factory import build_measured_draft_engine
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.drafter_server import DrafterServer

_DIGESTS = {"target": "bench"}


class DrafterProcess(PortProcess):
    """The configured drafter while a ``with`` block runs.

    Args:
        values: ``args`` of a configuration with a ``speculative`` part.

    Raises:
        DsparkError: it does not start; its error is on standard error.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(
            "the drafter's process", "cluster.bench.drafter_process", json.dumps(values)
        )

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
    server = DrafterServer(
        build_measured_draft_engine(config),
        drafter_id="bench",
        digests=_DIGESTS,
        config=config.drafter,
        method=config.speculative.method,
    )
    print(await server.start(HOST), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started this is gone
    await server.drain()


def _main() -> None:
    import torch

    config = ClusterConfig.parse(json.loads(sys.argv[1]))
    torch.set_num_threads(config.drafter.num_threads)
    asyncio.run(_serve(config))


if __name__ == "__main__":
    _main()
