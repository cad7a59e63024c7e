"""The replica's side of ``ReplicaService``: the engine's outputs, one message a step and router."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from grpc import aio

from cluster.errors import (
    DeadlineExceededError,
    DsparkError,
    InvalidRequestError,
    RequestCancelledError,
)
from cluster.request import Request, RequestOutput
from cluster.rpc.channels import DEFAULT_MAX_MESSAGE_BYTES, PROTOCOL_VERSION, server_options
from cluster.rpc.cluster_status import (
    ReplicaParts,
    drafter_to_proto,
    load_to_metrics,
    shard_to_proto,
)
from cluster.rpc.convert import add_output, pace_to_proto, stats_to_proto, submit_from_proto
from cluster.rpc.guard import internal_guard
from cluster.rpc.serving import ServingState, bind
from cluster.rpc.status import abort, to_request_error
from cluster.rpc.tls import ServerTls
from cluster.tracing import Span
from cluster.v1 import common_pb2, inference_pb2, replica_pb2, replica_pb2_grpc

if TYPE_CHECKING:
    from cluster.engine.load import EngineLoad
    from cluster.routing.prefix_journal import PrefixJournal

logger = logging.getLogger(__name__)

SERVICE_NAME = "cluster.v1.ReplicaService"
LOAD_INTERVAL_S = 0.1  # at most so often with steps
IDLE_LOAD_INTERVAL_S = 0.5  # at least so often without
HELLO_TIMEOUT_S = 10.0  # for a router's first message
FLUSH_TIMEOUT_S = 0.5  # for what is written already when the server stops


class EngineLoop(Protocol):
    """What the server needs of ``cluster.engine.loop.EngineLoop``; each call is thread-safe."""

    def submit(self, request: Request) -> None:
        """Runs a request; its outputs, or its error, come through ``on_outputs``."""

    def cancel(self, request_id: str, error: Exception) -> None:
        """Ends a request with ``error``; unknown ids are ignored."""

    def load(self) -> EngineLoad:
        """How busy the engine is; requests count in the order of ``submit``."""

    @property
    def prefix_journal(self) -> PrefixJournal:
        """What the prefix cache can find."""


class ReplicaServer(replica_pb2_grpc.ReplicaServiceServicer):
    """Serves an engine to routers.

    Guarantees: every submission is answered by exactly one last delta, as long as its router's
    stream lives. All that one engine step changed goes to a router in one message. The engine
    never waits for a router: what a slow one has not read yet is merged, one delta a request. When
    a router's stream ends, all its requests are cancelled. One request's error ends nothing else.

    Use: construct, give ``on_outputs`` to the engine loop, then ``start(loop)`` in the event loop
    that serves.

    Args:
        replica_id: unique in the cluster.
        max_model_len: the engine's context in tokens.
        vocab_size: ids that the engine accepts are below it.
        model_digests: hex SHA-256 by name (``target``, ``tokenizer``, ``drafter``, ``projection``).
        describe: called in the event loop for each load report: shards and drafters of now.
        max_message_bytes: the largest message sent or received.
        tls: unset: plaintext, and any router.
    """

    def __init__(
        self,
        replica_id: str,
        *,
        max_model_len: int,
        vocab_size: int,
        model_digests: dict[str, str] | None = None,
        describe: Callable[[], ReplicaParts] = ReplicaParts,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls: ServerTls | None = None,
    ) -> None:
        self._replica_id = replica_id
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._digests = common_pb2.ModelDigests(**(model_digests or {}))
        self._describe = describe
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._streams: set[_RouterStream] = set()
        self._stream_numbers = itertools.count()
        self._owners: dict[str, _Owner] = {}  # by the engine's request id
        # Whose requests the engine has not counted into a load report yet, in its order.
        self._uncounted: deque[_RouterStream] = deque()
        self._num_counted = 0
        self._num_steps = 0
        self._draining = False

    @property
    def num_active_requests(self) -> int:
        """Requests of all routers whose last output has not come yet."""
        return len(self._owners)

    async def start(self, loop: EngineLoop, host: str, port: int = 0) -> int:
        """Serves ``loop`` on ``host`` and returns the port.

        Raises:
            ConfigError: the address cannot be bound; ``key`` is ``ReplicaService``, since a
                replica's address is not configured.
        """
        self._loop = loop
        self._event_loop = asyncio.get_running_loop()
        self._server = aio.server(
            options=server_options(self._max_message_bytes), interceptors=internal_guard(self._tls)
        )
        replica_pb2_grpc.add_ReplicaServiceServicer_to_server(self, self._server)
        self._serving = ServingState(self._server, SERVICE_NAME)
        port = bind(self._server, host, port, key="ReplicaService", tls=self._tls)
        await self._server.start()
        await self._serving.set_serving(True)
        self._ticker = asyncio.create_task(self._tick())
        return port

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stops serving.

        Routers are told to send nothing new, and running requests get ``grace_s`` seconds to
        finish. What is left then breaks off, and the routers replay it elsewhere.
        """
        self._draining = True
        await self._serving.set_serving(False)
        self._report_load()
        deadline = time.monotonic() + grace_s
        while self._owners and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._ticker.cancel()
        for stream in self._streams:
            stream.end()
        await self._server.stop(FLUSH_TIMEOUT_S)

    def on_outputs(self, outputs: Sequence[RequestOutput]) -> None:
        """Takes what one engine step changed; called in the engine's thread, never waits."""
        if not outputs or self._event_loop is None:
            return
        try:
            self._event_loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:
            logger.debug("outputs after the event loop was closed have no reader")

    async def Connect(
        self,
        request_iterator: AsyncIterator[replica_pb2.ConnectRequest],
        context: aio.ServicerContext,
    ) -> None:
        """One router's stream."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(request_iterator, None)
        except TimeoutError:
            message = f"did not come within {HELLO_TIMEOUT_S:g} s"
            await abort(context, InvalidRequestError("hello", message))
            return
        if first is None or not first.HasField("hello"):
            await abort(context, InvalidRequestError("hello", "must be the first message"))
            return
        if first.hello.protocol_version != PROTOCOL_VERSION:
            message = f"is {first.hello.protocol_version} and {PROTOCOL_VERSION} here"
            await abort(context, InvalidRequestError("hello.protocol_version", message))
            return
        stream = _RouterStream(next(self._stream_numbers))
        await context.write(self._welcome())
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            await self._write(stream, context)
        finally:
            reader.cancel()
            self._streams.remove(stream)
            gone = RequestCancelledError("the router is gone")
            for request_id in list(stream.request_ids):
                self._owners.pop(request_id).span.end(gone)
                self._loop.cancel(request_id, gone)

    async def _read(
        self, stream: _RouterStream, messages: AsyncIterator[replica_pb2.ConnectRequest]
    ) -> None:
        try:
            async for message in messages:
                if message.HasField("submit"):
                    self._submit(stream, message.submit)
                elif message.HasField("cancel"):
                    self._cancel(stream, message.cancel)
        finally:
            stream.end()

    async def _write(self, stream: _RouterStream, context: aio.ServicerContext) -> None:
        while await stream.wait():
            step = replica_pb2.ConnectResponse.StepUpdate(
                step=self._num_steps, deltas=stream.take_deltas()
            )
            now = time.monotonic()
            if stream.load_due or now - stream.last_load_time >= LOAD_INTERVAL_S:
                stream.load_due = False
                stream.last_load_time = now
                self._report(stream, step)
                step.load.is_exporter = stream.number == self._exporter()
            await context.write(replica_pb2.ConnectResponse(step=step))

    def _submit(self, stream: _RouterStream, submit: replica_pb2.ConnectRequest.Submit) -> None:
        # Unique on the engine, whatever ids other routers choose.
        request_id = f"{stream.number}:{submit.request_id}"
        try:
            if request_id in self._owners:
                raise InvalidRequestError("request_id", "is already running")
            request = submit_from_proto(submit, request_id)
        except DsparkError as error:
            stream.num_counted += 1
            stream.fail(submit.request_id, error)
            return
        self._uncounted.append(stream)
        span = Span(
            "replica",
            submit.traceparent,
            dspark__replica=self._replica_id,
            dspark__request_id=submit.request_id,
        )
        self._owners[request_id] = _Owner(stream, submit.request_id, span)
        stream.request_ids.add(request_id)
        self._loop.submit(replace(request, traceparent=span.traceparent))

    def _cancel(self, stream: _RouterStream, cancel: replica_pb2.ConnectRequest.Cancel) -> None:
        error: DsparkError = RequestCancelledError("the client cancelled the request")
        if cancel.reason == "deadline":
            error = DeadlineExceededError("the request's deadline passed")
        self._loop.cancel(f"{stream.number}:{cancel.request_id}", error)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        self._num_steps += 1
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue  # its router is gone
            stream, request_id = owner.stream, owner.request_id
            if output.is_last:
                del self._owners[output.request_id]
                _end(owner.span, output)
                stream.request_ids.remove(output.request_id)
            stream.add(request_id, output)

    async def _tick(self) -> None:
        """Reports also what the last step before a pause has left, and now and then without one."""
        num_steps = 0
        reported_at = 0.0
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            now = time.monotonic()
            if self._num_steps != num_steps or now - reported_at >= IDLE_LOAD_INTERVAL_S:
                num_steps = self._num_steps
                reported_at = now
                self._report_load()

    def _report_load(self) -> None:
        for stream in self._streams:
            stream.request_load()

    def _report(self, stream: _RouterStream, step: replica_pb2.ConnectResponse.StepUpdate) -> None:
        """Adds what a router chooses replicas by."""
        load = self._loop.load()
        while self._num_counted < load.num_taken_in and self._uncounted:
            self._uncounted.popleft().num_counted += 1
            self._num_counted += 1
        changes = self._loop.prefix_journal.changes(stream.prefix_version)
        stream.prefix_version = changes.version
        step.load.CopyFrom(self._status(load))
        step.num_counted_submissions = stream.num_counted
        step.prefixes.is_full = changes.is_full
        step.prefixes.added.extend(changes.added)
        step.prefixes.removed.extend(changes.removed)

    def _exporter(self) -> int:
        """The oldest stream: of all routers, one exports this replica's metrics."""
        return min(stream.number for stream in self._streams)

    def _welcome(self) -> replica_pb2.ConnectResponse:
        layout = self._loop.prefix_journal.layout
        return replica_pb2.ConnectResponse(
            welcome=replica_pb2.ConnectResponse.Welcome(
                replica_id=self._replica_id,
                protocol_version=PROTOCOL_VERSION,
                max_model_len=self._max_model_len,
                vocab_size=self._vocab_size,
                digests=self._digests,
                page_size=layout.page_size if layout is not None else 0,
                prefix_stride=layout.stride if layout is not None else 0,
            )
        )

    def _status(self, load: EngineLoad) -> inference_pb2.ReplicaStatus:
        parts = self._describe()
        speculation = stats_to_proto(load.stats)
        speculation.num_malformed_proposals += parts.num_malformed_proposals
        return inference_pb2.ReplicaStatus(
            replica_id=self._replica_id,
            state="draining" if self._draining else "ready",
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_cache_usage=load.kv_cache_usage,
            num_queued_tokens=load.num_queued_tokens,
            num_free_tokens=load.num_free_tokens,
            mean_output_tokens=load.mean_output_tokens,
            num_routers=len(self._streams),
            num_output_tokens=load.num_output_tokens,
            prefix_cache=inference_pb2.PrefixCacheStats(**vars(load.prefix_cache)),
            speculation_state=load.speculation_state,
            speculation_reason=load.speculation_reason,
            speculation=speculation,
            speculation_method=parts.speculation_method,
            speculation_model=parts.speculation_model,
            calibration_error=load.calibration_error,
            calibration_drift=load.calibration_drift,
            paced=None if load.paced is None else pace_to_proto(load.paced),
            shards=map(shard_to_proto, parts.shards),
            drafters=map(drafter_to_proto, parts.drafters),
            metrics=load_to_metrics(load),
        )


class _Owner(NamedTuple):
    """Whose request it is, under which id, and its part of the trace."""

    stream: _RouterStream
    request_id: str
    span: Span


def _end(span: Span, output: RequestOutput) -> None:
    usage = output.usage
    if usage is not None and span.is_recorded:
        stats = usage.speculation
        span.set(
            gen_ai__usage__input_tokens=usage.prompt_tokens,
            gen_ai__usage__output_tokens=usage.completion_tokens,
            dspark__cached_prompt_tokens=usage.cached_prompt_tokens,
            dspark__queue_seconds=usage.queue_s,
            dspark__num_drafts=stats.num_drafts,
            dspark__num_draft_tokens=stats.num_draft_tokens,
            dspark__num_accepted_tokens=stats.num_accepted_tokens,
            dspark__num_late_proposals=stats.num_late_proposals,
        )
    span.end(output.error)


class _RouterStream:
    """What one router has to be told; holds at most one delta for each of its requests."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.request_ids: set[str] = set()  # the engine's ids
        self.load_due = True
        self.last_load_time = 0.0
        self.num_counted = 0  # submissions that are in load reports
        self.prefix_version = -1
        self._deltas: dict[str, replica_pb2.ConnectResponse.Delta] = {}
        self._ended = False
        self._wake = asyncio.Event()
        self._wake.set()

    def add(self, request_id: str, output: RequestOutput) -> None:
        """Merges an output into the request's delta."""
        delta = self._deltas.get(request_id)
        if delta is None:
            delta = replica_pb2.ConnectResponse.Delta(request_id=request_id)
            self._deltas[request_id] = delta
        add_output(delta, output)
        self._wake.set()

    def fail(self, request_id: str, error: Exception) -> None:
        """Answers a submission that never reached the engine."""
        self._deltas[request_id] = replica_pb2.ConnectResponse.Delta(
            request_id=request_id, error=to_request_error(error)
        )
        self._wake.set()

    def request_load(self) -> None:
        """Sends a load report soon, even if nothing else is to be sent."""
        self.load_due = True
        self._wake.set()

    def end(self) -> None:
        """Nothing more comes; what is there may still be sent."""
        self._ended = True
        self._wake.set()

    async def wait(self) -> bool:
        """Waits for something to send. Returns False when all is sent and the stream has ended."""
        if not self._ended:
            await self._wake.wait()
            self._wake.clear()
        # The last report says that the replica drains: to be lost behind that is no failure.
        return not self._ended or bool(self._deltas) or self.load_due

    def take_deltas(self) -> list[replica_pb2.ConnectResponse.Delta]:
        """Hands over what is to be sent."""
        deltas = list(self._deltas.values())
        self._deltas.clear()
        return deltas
