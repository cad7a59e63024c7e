"""The clients' door: a Serve deployment, HTTP by Serve and gRPC by a server of its own."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.exceptions import RayError

from cluster.actors.discovery import ReplicaAddress, is_being_stopped, watch_replicas
from cluster.actors.names import ROUTER, TARGET_REPLICA
from cluster.actors.tracing import start_tracing
from cluster.config import ClusterConfig
from cluster.garbage import preload

if TYPE_CHECKING:
    from fastapi import FastAPI

    from cluster.rpc.router import RouterServer

# Addresses that stand for all of a machine's; clients elsewhere need one that is its own.
_ANY_ADDRESS = ("0.0.0.0", "::")
# How often a router that Serve lists no longer asks whether it is being stopped.
_UNLISTED_PERIOD_S = 1.0
# Open files that clients leave to what the process opens itself: to replicas, Ray, models, logs.
_OWN_FILES = 512

_logger = logging.getLogger("ray.serve")


@serve.ingress()
class Router:
    """Takes clients' requests and spreads them over the target replicas that Serve calls running.

    Guarantees: what comes over HTTP goes the way of what comes over gRPC; several routers of one
    machine share the configured port; when this one is stopped it listens no longer, its streams
    get the drain time to finish, and those that take longer go on at another router.
    """

    # Serve awaits the constructor and the destructor of a deployment.
    async def __init__(self, config: ClusterConfig, *parts: object) -> None:  # type: ignore[misc]
        """``parts`` are handles to the deployments this one uses; Serve wants to know them."""
        context = serve.get_replica_context()
        self._config = config
        self._app_name = context.app_name
        self._id = context.replica_id.unique_id
        self._is_listed = self._was_listed = False
        self._draining: asyncio.Task[None] | None = None
        start_tracing(config, "router", self._id)
        self._server = await asyncio.to_thread(_make_server, config, self._id)
        port = await self._server.start(config.router.host, config.router.port)
        host, metrics_port = config.router.host, config.router.metrics_port
        self._scrapes = None
        if metrics_port is not None:
            from cluster.metrics.scrape_server import ScrapeServer

            self._scrapes = ScrapeServer(
                self._server.metrics.registry, host, metrics_port, lambda: self._server.is_ready
            )
        self._address = f"{ray.util.get_node_ip_address() if host in _ANY_ADDRESS else host}:{port}"
        self._watches = [
            asyncio.create_task(
                watch_replicas(context.app_name, TARGET_REPLICA, self._on_replicas)
            ),
            asyncio.create_task(watch_replicas(context.app_name, ROUTER, self._on_routers)),
        ]

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve's proxies hand HTTP requests to; Serve asks for it behind the constructor."""
        from cluster.api.app import create_app

        return create_app(self._server, max_body_bytes=self._config.router.max_message_mb << 20)

    def record_replica_metadata(self) -> dict[str, str]:
        """Where this router listens."""
        return {"address": self._address}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Requests of clients, those included that no replica has yet, and their tokens."""
        return {
            "num_requests": self._server.num_active_requests,
            "num_queued_tokens": self._server.num_queued_tokens,
        }

    def check_health(self) -> None:
        """Raises what ended a watch, if anything did."""
        for watch in self._watches:
            if watch.done():
                watch.result()

    async def __del__(self) -> None:
        await self._stop()
        # Not before: what runs until then may need another replica.
        for task in (*self._watches, self._draining):
            if task is not None:
                task.cancel()

    def _on_replicas(self, replicas: list[ReplicaAddress]) -> None:
        self._server.set_replicas([(replica.replica_id, replica.address) for replica in replicas])

    def _on_routers(self, routers: list[ReplicaAddress]) -> None:
        self._server.set_routers([(router.replica_id, router.address) for router in routers])
        self._is_listed = any(router.replica_id == self._id for router in routers)
        self._was_listed |= self._is_listed
        if self._was_listed and not self._is_listed and self._draining is None:
            self._draining = asyncio.create_task(self._drain_if_stopping())

    async def _drain_if_stopping(self) -> None:
        """Serve tells nothing of its decision to stop a replica before the last request that came
        over HTTP has ended, and what came over gRPC must not wait for that."""
        while not self._is_listed:
            try:
                if await is_being_stopped(self._app_name, ROUTER, self._id):
                    await self._stop()
                    return
            except (RayError, ValueError) as error:
                _logger.warning("Serve controller cannot be asked about this router: %s", error)
            await asyncio.sleep(_UNLISTED_PERIOD_S)
        self._draining = None

    async def _stop(self) -> None:
        if self._scrapes is not None:  # first, since the router that comes behind may want its port
            await self._scrapes.close()
        await self._server.stop(self._config.drain_timeout_s)


def _make_server(config: ClusterConfig, router_id: str) -> RouterServer:
    # Imported here: whoever builds or starts the application needs neither torch nor gRPC.
    preload("cluster.rpc.router")
    from cluster.chat.template import read_template
    from cluster.engine.target_config import eos_token_ids, load_text_config, load_tokenizer
    from cluster.models.checkpoint import tokenizer_digest
    from cluster.routing.replica_choice import POLICIES
    from cluster.rpc.router import RouterServer
    from cluster.rpc.tls import load_security
    from cluster.security.authenticator import Authenticator

    security = load_security(config.security, is_router=True)
    target = config.target
    trust = target.trust_remote_code
    model_config = load_text_config(target.model, trust_remote_code=trust)
    context = model_config.max_position_embeddings
    return RouterServer(
        tokenizer=load_tokenizer(target.model, trust_remote_code=trust),
        model_name=config.model_name,
        vocab_size=model_config.vocab_size,
        max_model_len=min(target.max_model_len or context, context),
        eos_token_ids=eos_token_ids(target.model, trust_remote_code=trust),
        tokenizer_digest=tokenizer_digest(target.model),
        router_id=router_id,
        num_routers=config.router.num_replicas,
        chat_template=read_template(config.router.chat_template),
        trust_request_chat_template=config.router.trust_request_chat_template,
        max_queued_tokens=config.router.max_queued_tokens,
        queue_timeout_s=config.router.queue_timeout_s,
        policy=POLICIES[config.router.replica_choice],
        wait_s=config.router.replica_wait_s,
        max_message_bytes=config.router.max_message_mb << 20,
        max_connection_age_s=config.router.max_connection_age_s,
        max_connection_age_grace_s=config.router.max_connection_age_grace_s,
        max_metadata_bytes=config.router.max_metadata_kb << 10,
        max_connections=_max_connections(config.router.max_connections),
        max_streams=config.router.max_streams_per_connection,
        slow_reader_timeout_s=config.router.slow_reader_timeout_s,
        authenticator=Authenticator(config.security.api_keys_file, security.refusals),
        tls=security.client,
        replica_tls=security.internal.channel,
    )


def _max_connections(wanted: int) -> int:
    """Of clients, so that the files that the process may open do for them and for its own."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed - _OWN_FILES >= wanted:
        return wanted
    fewer = max(allowed - _OWN_FILES, allowed // 2)
    _logger.warning(
        "router.max_connections is %d, but %d open files are allowed (ulimit -n): %d are taken",
        wanted,
        allowed,
        fewer,
    )
    return fewer
