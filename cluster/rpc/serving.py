"""What every gRPC server of the cluster offers beside its own service."""

from __future__ import annotations

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.errors import ConfigError
from cluster.rpc.reflection import serve_reflection
from cluster.rpc.tls import ServerTls


class ServingState:
    """``grpc.health.v1`` and reflection of a server; ``set_serving`` says whether it serves.

    Args:
        server: one that is not started yet.
        service_name: full name of its own service, e.g. ``cluster.v1.InferenceService``.
    """

    def __init__(self, server: aio.Server, service_name: str) -> None:
        self._names = ("", service_name)  # The empty name stands for the whole server.
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        serve_reflection(server, (service_name, health.SERVICE_NAME))

    async def set_serving(self, serving: bool) -> None:
        """Reports SERVING or NOT_SERVING from now on."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)


def bind(
    server: aio.Server, host: str, port: int, *, key: str, tls: ServerTls | None = None
) -> int:
    """Binds ``host:port`` and returns the port, which is another one where ``port`` is 0.

    Args:
        tls: unset: plaintext.

    Raises:
        ConfigError: naming ``key``, the address cannot be bound.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is not None:
            return server.add_secure_port(address, tls.credentials())
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(key, f"cannot listen on {address}: {error}") from None
