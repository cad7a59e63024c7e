"""A router's stream to one target replica."""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import grpc
from grpc import aio

from cluster.request import Request
from cluster.routing.page_digests import PrefixLayout
from cluster.routing.prefix_journal import PrefixChanges
from cluster.routing.replica_loads import ReplicaLoad
from cluster.routing.replica_picker import Prompt, ReplicaPicker
from cluster.rpc.channels import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_RECONNECT_S,
    MIN_RECONNECT_S,
    PROTOCOL_VERSION,
    Options,
    open_channel,
)
from cluster.rpc.convert import submit_to_proto
from cluster.rpc.tasks import run_until_first_ends
from cluster.rpc.tls import ChannelTls
from cluster.v1 import inference_pb2, replica_pb2, replica_pb2_grpc

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0


class ReplicaMismatchError(ConnectionError):
    """The replica does not fit this router."""


# How gRPC, or the handshake, tells that a replica is not there any more.
_LOST = (grpc.RpcError, asyncio.InvalidStateError, TimeoutError, ConnectionError, EOFError)


class Submission(Protocol):
    """Who gets the answers to a submitted request; called in the event loop, must not raise."""

    def on_delta(self, delta: replica_pb2.ConnectResponse.Delta) -> None:
        """The request's next tokens, its end, or its error."""

    def on_lost(self, *, drained: bool) -> None:
        """The replica is gone (``drained``: as it was to go); nothing more comes."""


class ReplicaConnection:
    """Keeps a stream to a replica, reconnecting with jittered delays until it is closed.

    Guarantees: each submission gets deltas in order until its last one, or ``on_lost`` once, or
    nothing more behind ``cancel``. Submitting and cancelling never wait. What is queued for writing
    is at most one submission and one cancellation for each request that the router has admitted.
    Whatever goes wrong with a stream, a message that cannot be read included, ends that stream.
    A replica that speaks another protocol or has another tokenizer is never ready; ``reason`` says
    so, and each further handshake may find that it has changed.

    Args:
        replica_id: the replica's name.
        address: ``host:port`` of its ``ReplicaService``.
        router_id: who connects.
        picker: is told what the replica reports, and what is sent there.
        on_ready: called whenever the replica has become ready for submissions.
        on_closed: called once when a retired connection has closed itself.
        tokenizer_digest: hex SHA-256 of the router's tokenizer; empty: the replica's may be any.
        max_message_bytes: the largest message sent or received.
        tls: unset: plaintext.
    """

    def __init__(
        self,
        replica_id: str,
        address: str,
        router_id: str,
        *,
        picker: ReplicaPicker,
        on_ready: Callable[[ReplicaConnection], None],
        on_closed: Callable[[ReplicaConnection], None],
        tokenizer_digest: str = "",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls: ChannelTls | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.address = address
        self.welcome: replica_pb2.ConnectResponse.Welcome | None = None
        self.reason = ""  # why it is mismatched
        self._fault = ""  # what the last broken stream was logged with
        self.slot = picker.add()
        self._picker = picker
        self._router_id = router_id
        self._on_ready = on_ready
        self._on_closed = on_closed
        self._tokenizer_digest = tokenizer_digest
        self._tls = tls
        self._max_message_bytes = max_message_bytes
        self._load = inference_pb2.ReplicaStatus()
        self._state = "connecting"
        self._retired = False
        self._submissions: dict[str, Submission] = {}
        self._queued: dict[str, int] = {}  # tokens that each submission still needs
        self._num_queued_tokens = 0
        self._outbox: list[replica_pb2.ConnectRequest] = []
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def state(self) -> str:
        """connecting, ready, draining, mismatched or lost."""
        if self._state == "ready" and (self._retired or self._load.state == "draining"):
            return "draining"
        return self._state

    @property
    def is_ready(self) -> bool:
        """Whether new requests may be submitted."""
        return self.state == "ready"

    @property
    def target_digest(self) -> str:
        """Hex SHA-256 of the target that runs, or last ran, there; empty where it is not known."""
        return self.welcome.digests.target if self.welcome is not None else ""

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that this router's requests there still need: prompts, and outputs to come."""
        return self._num_queued_tokens

    def status(self) -> inference_pb2.ReplicaStatus:
        """The last load report, with the state of now."""
        status = inference_pb2.ReplicaStatus()
        status.CopyFrom(self._load)
        status.replica_id = self.replica_id
        status.address = self.address
        status.state = self.state
        status.reason = self.reason
        return status

    def submit(self, request: Request, prompt: Prompt, submission: Submission) -> None:
        """Sends a request; ``request.request_id`` must be new on this connection.

        Args:
            prompt: of the request, as it was given to the picker.

        Raises:
            RuntimeError: the connection is not ready.
        """
        if not self.is_ready:
            raise RuntimeError(f"replica {self.replica_id} is {self.state}")
        num_tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
        message = submit_to_proto(request)
        self._submissions[request.request_id] = submission
        self._queued[request.request_id] = num_tokens
        self._num_queued_tokens += num_tokens
        self._picker.sent(self.slot, request.request_id, prompt)
        self._send(message)

    def cancel(self, request_id: str, reason: str) -> None:
        """Ends a request (``reason``: cancelled or deadline); unknown ids are ignored."""
        if request_id not in self._submissions:
            return
        self._forget(request_id)
        cancel = replica_pb2.ConnectRequest.Cancel(request_id=request_id, reason=reason)
        self._send(replica_pb2.ConnectRequest(cancel=cancel))

    def retire(self) -> None:
        """Takes nothing new, and closes when the last submission has ended."""
        self._retired = True
        self._picker.set_ready(self.slot, False)
        if not self._submissions:
            self._task.cancel()

    async def close(self) -> None:
        """Ends the connection; its submissions are lost."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        delay_s = MIN_RECONNECT_S
        try:
            while not self._retired:
                if await self._connect():
                    delay_s = MIN_RECONNECT_S
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))
                delay_s = min(delay_s * 2, MAX_RECONNECT_S)
        finally:
            self._lose()
            self._picker.remove(self.slot)
            self._on_closed(self)

    async def _connect(self) -> bool:
        """One connection from beginning to end. Returns whether it was ready and sound, so that
        the next one may follow soon."""
        was_ready = is_sound = False
        reason = ""
        try:
            async with self._open_channel() as channel:
                call: aio.StreamStreamCall = replica_pb2_grpc.ReplicaServiceStub(channel).Connect()
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    self.welcome = await self._handshake(call)
                was_ready = True
                self._state = "ready"
                self._picker.connect(self.slot, _layout(self.welcome))
                self._picker.set_ready(self.slot, self.is_ready)
                self.reason = ""
                logger.info("replica %s at %s is ready", self.replica_id, self.address)
                self._on_ready(self)
                await run_until_first_ends(self._take_all(call), self._write(call))
                is_sound = True
                logger.warning("replica %s ended its stream", self.replica_id)
        except ReplicaMismatchError as error:
            reason = str(error)
            if reason != self.reason:  # it is asked again and again
                logger.warning("replica %s at %s %s", self.replica_id, self.address, reason)
        except _LOST as error:
            is_sound = was_ready
            details = error.details() if isinstance(error, aio.AioRpcError) else repr(error)
            # A lost replica is news, one that is still not there is none.
            level = logging.WARNING if was_ready else logging.INFO
            logger.log(level, "replica %s at %s: %s", self.replica_id, self.address, details)
        except Exception as error:  # what it sent; this task must live on to connect again
            frames = "".join(traceback.format_tb(error.__traceback__))  # its text may be a client's
            fault = f"{type(error).__name__}\n{frames}"
            if fault != self._fault:  # which each further stream may meet again
                where = f"replica {self.replica_id} at {self.address}"
                logger.error("%s broke its stream with %s", where, fault)
            self._fault = fault
        self._lose()
        self.reason = reason
        if reason:
            self._state = "mismatched"
        return is_sound

    def _open_channel(self) -> aio.Channel:
        # A fixed window (64 KiB): what a slow router has not read waits merged on the replica, and
        # not step by step in a window that grows with the delay.
        fixed_window: Options = [("grpc.http2.bdp_probe", 0)]
        return open_channel(
            self.address, self._max_message_bytes, tls=self._tls, options=fixed_window
        )

    async def _handshake(self, call: aio.StreamStreamCall) -> replica_pb2.ConnectResponse.Welcome:
        hello = replica_pb2.ConnectRequest.Hello(
            router_id=self._router_id, protocol_version=PROTOCOL_VERSION
        )
        await call.write(replica_pb2.ConnectRequest(hello=hello))
        answer = await _read(call)
        if answer is aio.EOF or not answer.HasField("welcome"):
            raise ConnectionError("the replica did not answer the handshake")
        if answer.welcome.protocol_version != PROTOCOL_VERSION:
            raise ReplicaMismatchError(f"speaks protocol {answer.welcome.protocol_version}")
        theirs = answer.welcome.digests.tokenizer
        if self._tokenizer_digest and theirs and theirs != self._tokenizer_digest:
            raise ReplicaMismatchError(
                f"has tokenizer {theirs[:12]}, the router has {self._tokenizer_digest[:12]}"
            )
        return answer.welcome

    async def _take_all(self, call: aio.StreamStreamCall) -> None:
        while (message := await _read(call)) is not aio.EOF:
            self._take(message.step)

    async def _write(self, call: aio.StreamStreamCall) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            messages, self._outbox = self._outbox, []
            for message in messages:
                await call.write(message)

    def _send(self, message: replica_pb2.ConnectRequest) -> None:
        self._outbox.append(message)
        self._wake.set()

    def _take(self, step: replica_pb2.ConnectResponse.StepUpdate) -> None:
        if step.HasField("load"):
            was_ready = self.is_ready
            self._load = step.load
            self._picker.report(
                self.slot,
                _load(step.load),
                num_counted=step.num_counted_submissions,
                prefixes=_prefix_changes(step.prefixes),
            )
            self._picker.set_ready(self.slot, self.is_ready)
            if self.is_ready and not was_ready:
                self._on_ready(self)
        for delta in step.deltas:
            submission = self._submissions.get(delta.request_id)
            if submission is None:
                continue  # cancelled in the meantime
            if delta.finish_reason or delta.HasField("error"):
                self._forget(delta.request_id)
            else:
                self._queued[delta.request_id] -= len(delta.token_ids)
                self._num_queued_tokens -= len(delta.token_ids)
                if delta.token_ids:
                    self._picker.started(self.slot, delta.request_id)
            submission.on_delta(delta)

    def _forget(self, request_id: str) -> None:
        del self._submissions[request_id]
        self._num_queued_tokens -= self._queued.pop(request_id)
        self._picker.ended(self.slot, request_id)
        if self._retired and not self._submissions:
            self._task.cancel()

    def _lose(self) -> None:
        drained = self.state == "draining"
        self._state = "lost"
        self._load.state = ""
        self._picker.disconnect(self.slot)
        self._outbox.clear()
        self._wake.clear()
        lost = list(self._submissions.values())
        self._submissions.clear()
        self._queued.clear()
        self._num_queued_tokens = 0
        for submission in lost:
            submission.on_lost(drained=drained)


class _UndecodableError(Exception):
    """A message that is none of the protocol's."""


async def _read(call: aio.StreamStreamCall) -> Any:
    """The next message, or EOF. Raises: _UndecodableError."""
    message = await call.read()
    if message is None:  # so gRPC tells of one that its deserializer has refused
        raise _UndecodableError
    return message


def _layout(welcome: replica_pb2.ConnectResponse.Welcome) -> PrefixLayout | None:
    """Which pages the replica reports; ``None``: none, as one of an earlier version does."""
    if welcome.page_size < 1 or welcome.prefix_stride < 1:
        return None
    return PrefixLayout(welcome.page_size, welcome.prefix_stride)


def _load(status: inference_pb2.ReplicaStatus) -> ReplicaLoad:
    return ReplicaLoad(
        num_queued_tokens=status.num_queued_tokens,
        num_free_tokens=status.num_free_tokens,
        num_routers=status.num_routers,
        mean_output_tokens=status.mean_output_tokens,
    )


def _prefix_changes(report: replica_pb2.ConnectResponse.PrefixReport) -> PrefixChanges:
    # The version stays on the replica, which knows what this stream was told.
    return PrefixChanges(0, report.is_full, tuple(report.added), tuple(report.removed))
