"""One drafter: a Serve deployment with a gRPC server of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import ray
from ray import serve

from cluster.actors.digests import read_digests
from cluster.config import ClusterConfig, SpeculativeConfig

if TYPE_CHECKING:
    from cluster.engine.draft_engine import DraftEngine


class Drafter:
    """Drafts for every target replica that connects; published once it serves.

    Guarantees: when it is stopped it reports NOT_SERVING, finishes the rounds at hand and closes
    its streams, so that replicas decode plainly or move their sessions; none of them waits for it.
    """

    # Serve awaits the constructor and the destructor of a deployment.
    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]
        speculative = config.speculative
        if speculative is None:
            raise ValueError("a drafter needs the configuration's `speculative` part")
        engine, digests = await asyncio.to_thread(_load, config, speculative)
        # Imported here: whoever builds or starts the application needs neither torch nor gRPC.
        from cluster.rpc.drafter_server import DrafterServer

        self._server = DrafterServer(
            engine,
            drafter_id=serve.get_replica_context().replica_id.unique_id,
            digests=digests,
            config=config.drafter,
            method=speculative.method,
        )
        host = config.drafter.host or ray.util.get_node_ip_address()
        port = await self._server.start(host)
        self._address = f"{host}:{port}"

    def record_replica_metadata(self) -> dict[str, str]:
        """What target replicas get to know of this drafter."""
        return {"address": self._address}

    def check_health(self) -> None:
        """Raises when nothing is drafted any more."""
        if not self._server.is_healthy:
            raise RuntimeError("the drafter's thread has ended")

    async def __del__(self) -> None:
        await self._server.drain()


def _load(
    config: ClusterConfig, speculative: SpeculativeConfig
) -> tuple[DraftEngine, dict[str, str]]:
    import torch

    from cluster.engine.draft_factory import build_draft_engine

    torch.set_num_threads(config.drafter.num_threads)
    return build_draft_engine(config), read_digests(config)
