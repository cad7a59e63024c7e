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
from google.protobuf.message import DecodeError
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
from cluster.rpc.convert import pace_to_proto
from cluster.rpc.draft_messages import (
    FEED_CREDIT_BYTES,
    encode_curve,
    encode_digests,
    mismatched_digests,
)
from cluster.rpc.draft_spans import DraftSpans
from cluster.rpc.draft_streams import DraftStream, FeedStream
from cluster.rpc.guard import internal_guard
from cluster.rpc.serving import ServingState, bind
from cluster.rpc.status import DOMAIN, abort
from cluster.rpc.tasks import run_until_first_ends
from cluster.rpc.tls import ServerTls
from cluster.v1 import drafter_pb2, drafter_pb2_grpc

SERVICE_NAME = "cluster.v1.DrafterService"
SESSION_GRACE_S = 5.0
HANDSHAKE_TIMEOUT_S = 10.0
MAX_REPLICA_ID_CHARS = 256


class _Served:
    """One draft engine, how replicas are welcomed to it, and the streams that use it."""

    def __init__(
        self,
        engine: DraftEngine,
        digests: Mapping[str, str],
        welcome: drafter_pb2.DraftResponse.Welcome,
    ) -> None:
        self.engine = engine
        self.digests = digests
        self.welcome = drafter_pb2.DraftResponse(welcome=welcome)
        self.loop = DraftLoop(engine)
        self.streams: set[DraftStream] = set()
        self._end_reason = ""
        self._ended = asyncio.Event()

    def end_streams(self, reason: str) -> None:
        """Ends every stream soon, those that are still to come too."""
        self._end_reason = reason
        self._ended.set()

    async def until_ended(self) -> None:
        """Raises ReplicaLostError once streams are to end."""
        await self._ended.wait()
        raise ReplicaLostError(self._end_reason)


class DrafterServer(drafter_pb2_grpc.DrafterServiceServicer):
    """Serves a draft engine to target replicas.

    Guarantees: rounds of all replicas that wait together share one pass; features never stand in
    front of a round for longer than one chunk takes; a stream that breaks the protocol is ended
    with a status that names the field, and nothing else is disturbed; memory is bounded (rounds
    and feature bytes by stream, sessions and pages by the engine); what a replica has here is
    forgotten ``session_grace_s`` after its last ``Draft`` stream ended, or when it opens the next.

    Use: construct, then ``start`` in the event loop that serves, ``swap`` at any time behind that,
    then ``drain``.

    Args:
        engine: used by nobody else from now on.
        drafter_id: unique in the cluster.
        digests: hex SHA-256 by name (``target``, ``tokenizer``, ``drafter``, ``projection``).
        config: port range.
        method: how it drafts, for the replicas' information.
        tls: unset: plaintext, and any replica.
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
        tls: ServerTls | None = None,
    ) -> None:
        self._tls = tls
        self._drafter_id = drafter_id
        self._config = config
        self._session_grace_s = session_grace_s
        self._feed_credit_bytes = feed_credit_bytes
        self._served = self._make_served(engine, digests, method)
        self._spans = DraftSpans()
        self._num_streams: defaultdict[str, int] = defaultdict(int)
        self._graces: dict[str, asyncio.TimerHandle] = {}

    @property
    def num_streams(self) -> int:
        """``Draft`` streams of now."""
        return sum(self._num_streams.values())

    @property
    def is_healthy(self) -> bool:
        """Whether rounds that come in will be worked on."""
        return self._served.loop.is_running

    async def start(self, host: str) -> int:
        """Serves on ``host`` and the first free port of the configured range; returns the port.

        Raises:
            ConfigError: no port of the range can be bound.
        """
        self._server = aio.server(options=server_options(), interceptors=internal_guard(self._tls))
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(self, self._server)
        self._serving = ServingState(self._server, SERVICE_NAME)
        port = self._bind(host)
        self._served.loop.start()
        await self._server.start()
        await self._serving.set_serving(True)
        return port

    async def swap(self, engine: DraftEngine, *, digests: Mapping[str, str], method: str) -> None:
        """Drafts with another engine from now on; returns when the former one rests.

        Streams that use the former end, and their replicas are welcomed anew when they come back:
        nothing of one drafter is ever answered by another.

        Args:
            engine, digests, method: as for the constructor.
        """
        former, self._served = self._served, self._make_served(engine, digests, method)
        self._served.loop.start()
        former.end_streams("the drafter was swapped")
        # The pass at hand may take a while, and the event loop is not ours alone.
        await asyncio.to_thread(former.loop.stop)

    async def drain(self, grace_s: float = 1.0, *, hand_over_s: float = 0.0) -> None:
        """Stops serving: rounds in flight get ``grace_s`` seconds, then every stream ends.

        Args:
            hand_over_s: how long replicas may go on first, while they move their sessions; those
                that have moved all of them end their streams.
        """
        await self._serving.set_serving(False)
        deadline = time.monotonic() + hand_over_s
        while self._served.streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        deadline = time.monotonic() + grace_s
        while any(stream.num_outstanding for stream in self._served.streams):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.005)
        self._served.end_streams("the drafter is draining")
        await self._server.stop(0.1)
        for grace in self._graces.values():
            grace.cancel()
        await asyncio.to_thread(self._served.loop.stop)

    async def Draft(
        self,
        request_iterator: AsyncIterator[drafter_pb2.DraftRequest],
        context: aio.ServicerContext,
    ) -> None:
        """Rounds of one replica."""
        hello = await _read_hello(context)
        served = self._served
        mismatches = mismatched_digests(served.digests, hello.digests)
        if hello.protocol_version != PROTOCOL_VERSION:
            mismatches.insert(0, "protocol_version")
        if mismatches:
            # Welcomed all the same, so that the replica sees what it does not fit.
            await context.write(served.welcome)
            await _abort_mismatch(context, mismatches)
        stream = DraftStream(context, hello.replica_id, served.engine, served.loop, self._spans)
        self._enter(hello.replica_id)
        served.streams.add(stream)
        try:
            # Only now, so that nothing of this stream is forgotten with what was before it.
            await context.write(served.welcome)
            await _run(context, stream, served)
        finally:
            served.streams.remove(stream)
            self._spans.close_replica(hello.replica_id)
            self._leave(hello.replica_id)

    async def Feed(
        self,
        request_iterator: AsyncIterator[drafter_pb2.FeedRequest],
        context: aio.ServicerContext,
    ) -> None:
        """Features of one replica."""
        hello = await _read_hello(context)
        if hello.protocol_version != PROTOCOL_VERSION:
            await _abort_mismatch(context, ["protocol_version"])
        served = self._served
        credit = self._feed_credit_bytes
        await context.write(
            drafter_pb2.FeedResponse(welcome=drafter_pb2.FeedResponse.Welcome(credit_bytes=credit))
        )
        stream = FeedStream(
            context, hello.replica_id, served.engine, served.loop, credit, self._spans
        )
        await _run(context, stream, served)

    async def GetDrafterStatus(
        self, request: drafter_pb2.GetDrafterStatusRequest, context: aio.ServicerContext
    ) -> drafter_pb2.GetDrafterStatusResponse:
        """What is held now."""
        return drafter_pb2.GetDrafterStatusResponse(
            drafter_id=self._drafter_id,
            num_sessions=self._served.engine.num_sessions,
            num_streams=self.num_streams,
        )

    def _make_served(self, engine: DraftEngine, digests: Mapping[str, str], method: str) -> _Served:
        welcome = drafter_pb2.DraftResponse.Welcome(
            drafter_id=self._drafter_id,
            protocol_version=PROTOCOL_VERSION,
            digests=encode_digests(digests),
            method=method,
            block_size=engine.block_size,
            feed_credit_bytes=self._feed_credit_bytes,
            vocab_size=engine.vocab_size,
            feature_size=engine.feature_size,
            paced=None if engine.paced is None else pace_to_proto(engine.paced),
            draft_curve=None if engine.curve is None else encode_curve(engine.curve),
        )
        return _Served(engine, digests, welcome)

    def _bind(self, host: str) -> int:
        first = self._config.port
        if first == 0:
            return bind(self._server, host, 0, key="drafter.port", tls=self._tls)
        last = min(first + self._config.num_ports - 1, 65535)
        for port in range(first, last + 1):
            with contextlib.suppress(ConfigError):  # taken: the next one may be free
                return bind(self._server, host, port, key="drafter.port", tls=self._tls)
        raise ConfigError("drafter.port", f"no port from {first} to {last} can be bound on {host}")

    def _enter(self, replica_id: str) -> None:
        self._num_streams[replica_id] += 1
        grace = self._graces.pop(replica_id, None)
        if grace is not None:  # its last stream has ended, and nobody asks for its sessions again
            grace.cancel()
            self._served.loop.drop_replica(replica_id)

    def _leave(self, replica_id: str) -> None:
        self._num_streams[replica_id] -= 1
        if self._num_streams[replica_id] == 0:
            del self._num_streams[replica_id]
            self._graces[replica_id] = asyncio.get_running_loop().call_later(
                self._session_grace_s, self._forget, replica_id
            )

    def _forget(self, replica_id: str) -> None:
        del self._graces[replica_id]
        self._served.loop.drop_replica(replica_id)


async def _run(
    context: aio.ServicerContext, stream: DraftStream | FeedStream, served: _Served
) -> None:
    """Serves a stream until its replica ends it, it fails, or streams of its engine are to end."""
    try:
        await run_until_first_ends(stream.read(), stream.write(), served.until_ended())
    except Exception as error:  # every error ends this stream, with a status that says why
        await abort(context, error)


async def _read_hello(context: aio.ServicerContext) -> Any:
    """The ``Hello`` that begins a stream of either RPC; ends the call where there is none."""
    try:
        message = await asyncio.wait_for(context.read(), HANDSHAKE_TIMEOUT_S)
    except TimeoutError:
        await abort(context, DeadlineExceededError("no greeting"))
    except DecodeError as error:
        await abort(context, error)
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
