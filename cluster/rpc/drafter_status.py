"""Asking a drafter what it holds."""

from __future__ import annotations

from typing import NamedTuple

from grpc import aio

from cluster.rpc.channels import open_channel
from cluster.rpc.status import from_rpc_error
from cluster.rpc.tls import ChannelTls
from cluster.v1 import drafter_pb2, drafter_pb2_grpc


class DrafterHoldings(NamedTuple):
    """Sessions of all replicas, and ``Draft`` streams."""

    num_sessions: int
    num_streams: int


async def drafter_holdings(
    address: str, *, timeout_s: float, tls: ChannelTls | None = None
) -> DrafterHoldings:
    """What the drafter at ``address`` (``host:port``) holds now.

    Raises:
        ReplicaLostError, DeadlineExceededError: it does not answer, or not in time.
        PermissionDeniedError: it takes us for a client.
    """
    async with open_channel(address, tls=tls) as channel:
        stub = drafter_pb2_grpc.DrafterServiceStub(channel)
        try:
            answer = await stub.GetDrafterStatus(
                drafter_pb2.GetDrafterStatusRequest(), timeout=timeout_s
            )
        except aio.AioRpcError as error:
            raise from_rpc_error(error) from None
    return DrafterHoldings(answer.num_sessions, answer.num_streams)
