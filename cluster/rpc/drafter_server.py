"""The drafter's side of ``DrafterService``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from cluster.config import DrafterConfig
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_loop import DraftLoop
from cluster.errors import (
    ConfigError,
    DeadlineExceededError,
    InvalidRequestError,
    ReplicaLostError,
)
from cluster.rpc.channels import PROTOCOL_VERSION, server_options
from cluster.rpc.draft_messages import encode_digests, mismatched_digests
from cluster.rpc.draft_streams import DraftStream, FeedStream
from cluster.rpc.serving import ServingState, bind
from cluster.rpc.status import DOMAIN, abort
from cluster.rpc.tasks import run_until_first_ends
from cluster.v1 import drafter_pb2, drafter_pb2_grpc

SERVICE_NAME = "cluster.v1.DrafterService"
FEED_CREDIT_BYTES = 4 << 20
SESSION_GRACE_S = 5.0
HANDSHAKE_TIMEOUT_S = 10.0
MAX_REPLICA_ID_CHARS = 256


class DrafterServer(drafter_pb2_grpc.DrafterServiceServicer):
    """Serves a draft engine to target replicas.

    Guarantees: rounds of all replicas that wait together share one pass; features never stand in
    front of a round for longer than one chunk takes; a stream that breaks the protocol is ended
    with a status that names the field, and nothing else is disturbed; memory is bounded (rounds
    and feature bytes by stream, sessions and pages by the engine); what a replica has here is
    forgotten ``session_grace_s`` after its last ``Draft`` stream ended, or when it opens the next.

    Use: construct, then ``start`` in the event loop that serves, then ``drain``.

    Args:
        engine: used by nobody else from now on.
        drafter_id: unique in the cluster.
        digests: hex SHA-256 by name (``target``, ``tokenizer``, ``drafter``, ``projection``).
        config: port range.
    """

    def __init__(
        self,
        engine: DraftEngine,
        *,
        drafter_id: str,
        digests: Mapping[str, str],
        config: DrafterConfig,
        method: str = "dspark",
        feed_credit_bytes: int = FEED_CREDIT_BYTES,
        session_grace_s: float = SESSION_GRACE_S,
    ) -> None:
        self._engine = engine
        self._config = config
        self._digests = digests
        self._session_grace_s = session_grace_s
        self._feed_credit_bytes = feed_credit_bytes
        self._welcome = drafter_pb2.DraftResponse(
            welcome=drafter_pb2.DraftResponse.Welcome(
                drafter_id=drafter_id,
                protocol_version=PROTOCOL_VERSION,
                digests=encode_digests(digests),
                method=method,
                block_size=engine.block_size,
                feed_credit_bytes=feed_credit_bytes,
                vocab_size=engine.vocab_size,
            )
        )
        self._loop = DraftLoop(engine)
        self._num_streams: defaultdict[str, int] = defaultdict(int)
        self._streams: set[DraftStream] = set()
        self._graces: dict[str, asyncio.TimerHandle] = {}
        self._drained = asyncio.Event()

    @property
    def num_streams(self) -> int:
        """``Draft`` streams of now."""
        return len(self._streams)

    @property
    def is_healthy(self) -> bool:
        """Whether rounds that come in will be worked on."""
        return self._loop.is_running

    async def start(self, host: str) -> int:
        """Serves on ``host`` and the first free port of the configured range; returns the port.

        Raises:
            ConfigError: no port of the range can be bound.
        """
        self._server = aio.server(options=server_options())
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(self, self._server)
        self._serving = ServingState(self._server, SERVICE_NAME)
        port = self._bind(host)
        self._loop.start()
        await self._server.start()
        await self._serving.set_serving(True)
        return port

    async def drain(self, grace_s: float = 1.0) -> None:
        """Stops serving: rounds in flight get ``grace_s`` seconds, then every stream ends."""
        await self._serving.set_serving(False)
        deadline = time.monotonic() + grace_s
        while any(stream.num_outstanding for stream in self._streams):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.005)
        self._drained.set()
        await self._server.stop(0.1)
        for grace in self._graces.values():
            grace.cancel()
        # The pass at hand may take a while, and the event loop is not ours alone.
        await asyncio.to_thread(self._loop.stop)

    async def Draft(
        self,
        request_iterator: AsyncIterator[drafter_pb2.DraftRequest],
        context: aio.ServicerContext,
    ) -> None:
        """Rounds of one replica."""
        hello = await _read_hello(context)
        mismatches = mismatched_digests(self._digests, hello.digests)
        if hello.protocol_version != PROTOCOL_VERSION:
            mismatches.insert(0, "protocol_version")
        if mismatches:
            # Welcomed all the same, so that the replica sees what it does not fit.
            await context.write(self._welcome)
            await _abort_mismatch(context, mismatches)
        stream = DraftStream(context, hello.replica_id, self._engine, self._loop)
        self._enter(hello.replica_id, stream)
        try:
            # Only now, so that nothing of this stream is forgotten with what was before it.
            await context.write(self._welcome)
            await self._run(context, stream)
        finally:
            self._leave(hello.replica_id, stream)

    async def Feed(
        self,
        request_iterator: AsyncIterator[drafter_pb2.FeedRequest],
        context: aio.ServicerContext,
    ) -> None:
        """Features of one replica."""
        hello = await _read_hello(context)
        if hello.protocol_version != PROTOCOL_VERSION:
            await _abort_mismatch(context, ["protocol_version"])
        credit = self._feed_credit_bytes
        await context.write(
            drafter_pb2.FeedResponse(welcome=drafter_pb2.FeedResponse.Welcome(credit_bytes=credit))
        )
        stream = FeedStream(context, hello.replica_id, self._engine, self._loop, credit)
        await self._run(context, stream)

    async def _run(self, context: aio.ServicerContext, stream: DraftStream | FeedStream) -> None:
        """Serves a stream until its replica ends it, it fails, or the server drains."""
        try:
            await run_until_first_ends(stream.read(), stream.write(), self._until_drained())
        except Exception as error:  # every error ends this stream, with a status that says why
            await abort(context, error)

    async def _until_drained(self) -> None:
        await self._drained.wait()
        raise ReplicaLostError("the drafter is draining")

    def _bind(self, host: str) -> int:
        first = self._config.port
        if first == 0:
            return bind(self._server, host, 0, key="drafter.port")
        last = min(first + self._config.num_ports - 1, 65535)
        for port in range(first, last + 1):
            with contextlib.suppress(ConfigError):  # taken: the next one may be free
                return bind(self._server, host, port, key="drafter.port")
        raise ConfigError("drafter.port", f"no port from {first} to {last} can be bound on {host}")

    def _enter(self, replica_id: str, stream: DraftStream) -> None:
        self._streams.add(stream)
        self._num_streams[replica_id] += 1
        grace = self._graces.pop(replica_id, None)
        if grace is not None:  # its last stream has ended, and nobody asks for its sessions again
            grace.cancel()
            self._loop.drop_replica(replica_id)

    def _leave(self, replica_id: str, stream: DraftStream) -> None:
        self._streams.remove(stream)
        self._num_streams[replica_id] -= 1
        if self._num_streams[replica_id] == 0:
            del self._num_streams[replica_id]
            self._graces[replica_id] = asyncio.get_running_loop().call_later(
                self._session_grace_s, self._forget, replica_id
            )

    def _forget(self, replica_id: str) -> None:
        del self._graces[replica_id]
        self._loop.drop_replica(replica_id)


async def _read_hello(context: aio.ServicerContext) -> Any:
    """The ``Hello`` that begins a stream of either RPC; ends the call where there is none."""
    try:
        message = await asyncio.wait_for(context.read(), HANDSHAKE_TIMEOUT_S)
    except TimeoutError:
        await abort(context, DeadlineExceededError("no greeting"))
    if message is aio.EOF or message.WhichOneof("message") != "hello":
        await abort(context, InvalidRequestError("hello", "must be a stream's first message"))
    if not 1 <= len(message.hello.replica_id) <= MAX_REPLICA_ID_CHARS:
        await abort(context, InvalidRequestError("hello.replica_id", "is empty or too long"))
    return message.hello


async def _abort_mismatch(context: aio.ServicerContext, names: list[str]) -> None:
    """Ends the call with FAILED_PRECONDITION that names what differs."""
    info = error_details_pb2.ErrorInfo(
        reason="MISMATCH", domain=DOMAIN, metadata={"differs": ",".join(names)}
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(
        code=grpc.StatusCode.FAILED_PRECONDITION.value[0],
        message=f"replica and drafter differ in {', '.join(names)}",
        details=[detail],
    )
    await context.abort_with_status(rpc_status.to_status(status))
