"""One drafter: a Serve deployment with a gRPC server of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from cluster.actors.digests import read_digests
from cluster.actors.drafter_choice import DrafterChoice, DrafterInUse, starting_config
from cluster.actors.own_thread import in_own_thread
from cluster.actors.tracing import start_tracing
from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.garbage import preload

if TYPE_CHECKING:
    from cluster.engine.draft_engine import DraftEngine


class Drafter:
    """Drafts for every target replica that connects; published once it serves.

    Guarantees: when it is stopped it reports NOT_SERVING and drafts on until replicas have moved
    their sessions to other drafters or ended them, or the drain time is over; then it finishes the
    rounds at hand and closes its streams, behind which replicas decode plainly. None waits for it.
    What it is swapped to is loaded beside what it drafts with, which goes on until then, and for
    good where the other cannot be loaded.
    """

    # Serve awaits the constructor and the destructor of a deployment.
    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]
        started = starting_config(config)
        # While speculation is off, a new one is ready for when it comes back.
        speculative = started.speculative or config.speculative
        if speculative is None:
            raise ValueError("a drafter needs the configuration's `speculative` part")
        self._speculative = speculative
        self._config = config
        config = config.model_copy(update={"speculative": speculative})
        engine, digests = await in_own_thread(lambda: _load(config, speculative))
        # Imported here: whoever builds or starts the application needs neither torch nor gRPC.
        from cluster.rpc.drafter_server import DrafterServer
        from cluster.rpc.tls import load_security

        drafter_id = serve.get_replica_context().replica_id.unique_id
        start_tracing(config, "drafter", drafter_id)
        self._server = DrafterServer(
            engine,
            drafter_id=drafter_id,
            digests=digests,
            config=config.drafter,
            method=speculative.method,
            tls=load_security(config.security).internal.server,
        )
        host = config.drafter.host or ray.util.get_node_ip_address()
        port = await self._server.start(host)
        self._address = f"{host}:{port}"
        self._choice = DrafterChoice(started, self._use)
        self._choosing = asyncio.create_task(self._choice.run())

    def record_replica_metadata(self) -> dict[str, str]:
        """What target replicas get to know of this drafter."""
        return {"address": self._address}

    async def reconfigure(self, user_config: Any) -> None:
        """Drafts with what ``user_config`` says as soon as that is loaded."""
        self._choice.want(user_config)

    async def drafter_in_use(self) -> DrafterInUse:
        """How far the last swap is; without speculation there is nothing to wait for."""
        return self._choice.state()

    def check_health(self) -> None:
        """Raises when nothing is drafted, or swapped, any more."""
        if not self._server.is_healthy:
            raise RuntimeError("the drafter's thread has ended")
        if self._choosing.done():
            self._choosing.result()

    async def __del__(self) -> None:
        self._choosing.cancel()
        await self._server.drain(hand_over_s=self._config.drain_timeout_s)

    async def _use(self, config: ClusterConfig) -> bool:
        speculative = config.speculative
        if speculative is None or speculative == self._speculative:
            return True
        engine, digests = await in_own_thread(lambda: _load(config, speculative))
        self._speculative = speculative
        await self._server.swap(engine, digests=digests, method=speculative.method)
        return True


def _load(
    config: ClusterConfig, speculative: SpeculativeConfig
) -> tuple[DraftEngine, dict[str, str]]:
    preload("cluster.engine.draft_factory")
    import torch

    from cluster.engine.draft_factory import build_measured_draft_engine

    torch.set_num_threads(config.drafter.num_threads)
    return build_measured_draft_engine(config), read_digests(config)
