"""How a target replica greets a drafter, and who fits whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpc import aio

from cluster.config import MAX_SPECULATIVE_TOKENS
from cluster.errors import DsparkError, MalformedProposalError
from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.rpc.draft_messages import FEED_CREDIT_BYTES, encode_digests, mismatched_digests
from cluster.v1 import drafter_pb2


class MismatchError(DsparkError):
    """The drafter does not fit this replica."""


async def greet_draft(
    call: aio.StreamStreamCall, *, replica_id: str, digests: Mapping[str, str], vocab_size: int
) -> drafter_pb2.DraftResponse.Welcome:
    """Greets on a ``Draft`` stream.

    Args:
        digests: hex SHA-256 by name; the drafter's must be equal.
        vocab_size: the target's; the drafter's must be equal.

    Raises:
        MismatchError: naming what differs.
        MalformedProposalError: the answer is no welcome.
        EOFError, aio.AioRpcError: the stream ended.
    """
    hello = drafter_pb2.DraftRequest.Hello(
        replica_id=replica_id, protocol_version=PROTOCOL_VERSION, digests=encode_digests(digests)
    )
    await call.write(drafter_pb2.DraftRequest(hello=hello))
    message = await read_message(call, "welcome")
    welcome: drafter_pb2.DraftResponse.Welcome = message.welcome
    differing = mismatched_digests(digests, welcome.digests)
    if welcome.protocol_version != PROTOCOL_VERSION:
        differing.append("protocol_version")
    if welcome.vocab_size != vocab_size:
        differing.append("vocab_size")
    if differing:
        raise MismatchError(f"replica and drafter differ in {', '.join(differing)}")
    if not 1 <= welcome.block_size <= MAX_SPECULATIVE_TOKENS:
        raise MalformedProposalError(
            f"block_size must be from 1 to {MAX_SPECULATIVE_TOKENS}, got {welcome.block_size}"
        )
    return welcome


async def greet_feed(call: aio.StreamStreamCall, *, replica_id: str) -> int:
    """Greets on a ``Feed`` stream; returns the byte credit, ``FEED_CREDIT_BYTES`` at most.

    Raises:
        MalformedProposalError, EOFError, aio.AioRpcError: as ``greet_draft``.
    """
    hello = drafter_pb2.FeedRequest.Hello(replica_id=replica_id, protocol_version=PROTOCOL_VERSION)
    await call.write(drafter_pb2.FeedRequest(hello=hello))
    message = await read_message(call, "welcome")
    # As much of it may wait here for the network, whatever a drafter says that it would take.
    return min(int(message.welcome.credit_bytes), FEED_CREDIT_BYTES)


async def read_message(call: aio.StreamStreamCall, kind: str) -> Any:
    """The stream's next message, which must be of this kind.

    Raises:
        MalformedProposalError: it is of another kind, or none at all.
        EOFError, aio.AioRpcError: the stream ended.
    """
    message = await call.read()
    if message is None:  # gRPC's way to say so
        raise MalformedProposalError("a message that cannot be decoded")
    if message is aio.EOF:
        raise EOFError("the drafter ended the stream")
    if message.WhichOneof("message") != kind:
        raise MalformedProposalError(f"a message that is not '{kind}'")
    return message
