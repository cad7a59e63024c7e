"""The Python client of a cluster: ``Client``, and ``AsyncClient`` for asyncio."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import grpc
from grpc import aio

from cluster.errors import (
    ClusterStateError,
    ConfigError,
    DsparkError,
    InvalidRequestError,
    ReplicaLostError,
)
from cluster.request import (
    FinishReason,
    PositionLogprobs,
    Priority,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
    TokenSource,
    Usage,
)
from cluster.rpc.channels import (
    DEFAULT_MAX_MESSAGE_BYTES,
    open_blocking_channel,
    open_channel,
)
from cluster.rpc.chunk import Chunk
from cluster.rpc.cluster_status import ClusterStatus, cluster_status_from_proto
from cluster.rpc.convert import GenerateCall
from cluster.rpc.credentials import Credentials
from cluster.rpc.resumption import Resumption
from cluster.rpc.status import from_rpc_error, has_details
from cluster.v1 import inference_pb2, inference_pb2_grpc

STATUS_TIMEOUT_S = 5.0
# A router that starts anew, and a target replica behind it, are there again by then.
RESUME_TIMEOUT_S = 60.0


__all__ = ["AsyncClient", "Chunk", "Client", "Completion"]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished choice, as gathered from its chunks."""

    request_id: str
    choice_index: int
    token_ids: tuple[int, ...]
    token_sources: tuple[TokenSource, ...]
    text: str
    logprobs: tuple[PositionLogprobs, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason
    usage: Usage


class Client:
    """A blocking client; one may be shared by threads.

    Every call takes:
        prompt: text, or token ids.
        sampling: how tokens are chosen. Keyword arguments named as fields of ``SamplingParams``
            (``temperature=0``, ``max_tokens=64``, ``stop="\\n"``) override it, or the defaults.
        speculation: ``SpeculationParams``, or False to decode plainly.
        n: number of choices, 1..16.
        timeout_s: the request's deadline from now; unset: none.
        resume_token_ids: with n = 1, the tokens of a broken stream; the answer goes on behind them.
        request_id: unset: a random one.
        attempt: to be raised with each retry of the same request id.
        priority: who may wait for whom; see ``Priority``.
        model: the one that must be served there; unset: whichever is.

    and raises:
        InvalidRequestError, QueueFullError, ReplicaLostError, DeadlineExceededError: the answer.
        ModelNotFoundError: another model is served there.
        UnauthenticatedError: no API key, or an unknown one.
        ClusterStateError: no cluster answers at the address.

    A stream that breaks because its router ended goes on, on whichever router answers then, behind
    the tokens that came (``Resumption``): the caller sees one unbroken stream.

    Args:
        address: ``host:port`` of a router, or of several, with commas between them; a name may
            stand for several too.
        credentials: API key and TLS; unset: ``Credentials.from_environment()``.
        max_message_bytes: the largest message sent or received.
        resume_timeout_s: how long a broken stream is tried to be taken up; 0: not at all.

    Raises:
        ConfigError: the environment names a file that cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        resume_timeout_s: float = RESUME_TIMEOUT_S,
    ) -> None:
        self._address = address
        self._resume_timeout_s = resume_timeout_s
        credentials = credentials or Credentials.from_environment()
        self._metadata = credentials.metadata
        self._channel = open_blocking_channel(
            _target(address), max_message_bytes, tls=credentials.tls
        )
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | bool = True,
        n: int = 1,
        timeout_s: float | None = None,
        resume_token_ids: Sequence[int] = (),
        request_id: str = "",
        attempt: int = 0,
        priority: Priority = Priority.DEFAULT,
        model: str | None = None,
        **sampling_fields: Any,
    ) -> Generator[Chunk, None, None]:
        """Streams the chunks of all choices. The request starts with the first ``next``; closing
        the iterator cancels it."""
        call = _call(
            prompt,
            sampling,
            sampling_fields,
            speculation,
            num_choices=n,
            resume_token_ids=tuple(resume_token_ids),
            request_id=request_id,
            attempt=attempt,
            priority=priority,
            model=model,
        )
        resumption = Resumption(
            call, self._address, timeout_s=timeout_s, resume_timeout_s=self._resume_timeout_s
        )
        while True:
            stream = self._stub.Generate(
                resumption.request(), timeout=resumption.timeout_s(), metadata=self._metadata
            )
            try:
                for message in stream:
                    chunk = resumption.take(message)
                    if chunk is None:
                        break
                    yield chunk
                else:
                    return
            except grpc.RpcError as error:
                if resumption.is_complete:
                    return
                resumption.failed(error, stream.initial_metadata())
            finally:
                stream.cancel()
            time.sleep(resumption.next_delay_s())

    def complete(self, prompt: str | Sequence[int], **arguments: Any) -> list[Completion]:
        """Waits for all choices; arguments as for ``generate``."""
        gathered = _Gathered()
        for chunk in self.generate(prompt, **arguments):
            gathered.add(chunk)
        return gathered.completions()

    def status(self, *, timeout_s: float = STATUS_TIMEOUT_S) -> ClusterStatus:
        """The cluster as the router sees it."""
        try:
            answer = self._stub.GetStatus(
                inference_pb2.GetStatusRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise _status_error(error, self._address) from None
        return cluster_status_from_proto(answer)

    def close(self) -> None:
        """Ends the connection, and what runs on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """``Client`` for asyncio: the same arguments and errors; belongs to one event loop."""

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        resume_timeout_s: float = RESUME_TIMEOUT_S,
    ) -> None:
        self._address = address
        self._resume_timeout_s = resume_timeout_s
        credentials = credentials or Credentials.from_environment()
        self._metadata = credentials.metadata
        self._channel = open_channel(_target(address), max_message_bytes, tls=credentials.tls)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | bool = True,
        n: int = 1,
        timeout_s: float | None = None,
        resume_token_ids: Sequence[int] = (),
        request_id: str = "",
        attempt: int = 0,
        priority: Priority = Priority.DEFAULT,
        model: str | None = None,
        **sampling_fields: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Streams the chunks of all choices. The request starts with the first ``anext``; closing
        the iterator (``contextlib.aclosing``) or cancelling the task cancels it."""
        call = _call(
            prompt,
            sampling,
            sampling_fields,
            speculation,
            num_choices=n,
            resume_token_ids=tuple(resume_token_ids),
            request_id=request_id,
            attempt=attempt,
            priority=priority,
            model=model,
        )
        resumption = Resumption(
            call, self._address, timeout_s=timeout_s, resume_timeout_s=self._resume_timeout_s
        )
        while True:
            stream: aio.UnaryStreamCall = self._stub.Generate(
                resumption.request(), timeout=resumption.timeout_s(), metadata=self._metadata
            )
            try:
                async for message in stream:
                    chunk = resumption.take(message)
                    if chunk is None:
                        break
                    yield chunk
                else:
                    return
            except grpc.RpcError as error:
                if resumption.is_complete:
                    return
                resumption.failed(error, await stream.initial_metadata())
            finally:
                stream.cancel()
            await asyncio.sleep(resumption.next_delay_s())

    async def complete(self, prompt: str | Sequence[int], **arguments: Any) -> list[Completion]:
        """Waits for all choices; arguments as for ``generate``."""
        gathered = _Gathered()
        async for chunk in self.generate(prompt, **arguments):
            gathered.add(chunk)
        return gathered.completions()

    async def status(self, *, timeout_s: float = STATUS_TIMEOUT_S) -> ClusterStatus:
        """The cluster as the router sees it."""
        try:
            answer = await self._stub.GetStatus(
                inference_pb2.GetStatusRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise _status_error(error, self._address) from None
        return cluster_status_from_proto(answer)

    async def close(self) -> None:
        """Ends the connection, and what runs on it."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Gathered:
    """Chunks by choice."""

    def __init__(self) -> None:
        self._chunks: dict[int, list[Chunk]] = {}

    def add(self, chunk: Chunk) -> None:
        self._chunks.setdefault(chunk.choice_index, []).append(chunk)

    def completions(self) -> list[Completion]:
        return [_completion(chunks) for _, chunks in sorted(self._chunks.items())]


def _completion(chunks: list[Chunk]) -> Completion:
    last = chunks[-1]
    if last.finish_reason is None or last.usage is None:
        raise DsparkError("the router ended a stream without a last chunk")
    return Completion(
        request_id=last.request_id,
        choice_index=last.choice_index,
        token_ids=_joined(chunks, lambda chunk: chunk.token_ids),
        token_sources=_joined(chunks, lambda chunk: chunk.token_sources),
        text="".join(chunk.text for chunk in chunks),
        logprobs=_joined(chunks, lambda chunk: chunk.logprobs),
        prompt_logprobs=_joined(chunks, lambda chunk: chunk.prompt_logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
    )


def _joined(chunks: list[Chunk], part: Callable[[Chunk], tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(item for chunk in chunks for item in part(chunk))


def _call(
    prompt: str | Sequence[int],
    sampling: SamplingParams | None,
    sampling_fields: dict[str, Any],
    speculation: SpeculationParams | bool,
    **fields: Any,
) -> GenerateCall:
    for name in ("stop", "bad_words"):  # else each character would be one of them
        if isinstance(sampling_fields.get(name), str):
            sampling_fields = {**sampling_fields, name: (sampling_fields[name],)}
    try:
        sampling = replace(sampling or SamplingParams(), **sampling_fields)
    except TypeError as error:
        raise InvalidRequestError("sampling", str(error)) from None
    if isinstance(speculation, bool):
        mode = SpeculationMode.AUTO if speculation else SpeculationMode.OFF
        speculation = SpeculationParams(mode=mode)
    return GenerateCall(
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        sampling=sampling,
        speculation=speculation,
        **fields,
    )


def _target(address: str) -> str:
    """``address`` as gRPC wants it; several become a list of IP addresses. What is written in
    gRPC's own way stays so.

    Raises:
        ConfigError: one of several has no port, or is not known.
    """
    if "," not in address or address.startswith(("ipv4:", "ipv6:")):
        return address
    found = []
    for one in address.split(","):
        host, _, port = one.strip().rpartition(":")
        try:
            found.append(f"{socket.gethostbyname(host)}:{int(port)}")
        except (OSError, ValueError):
            raise ConfigError("address", f"{one.strip()!r} is no host:port that is known") from None
    return f"ipv4:{','.join(found)}"


def _status_error(error: grpc.RpcError, address: str) -> DsparkError:
    rebuilt = from_rpc_error(error)
    if isinstance(rebuilt, ReplicaLostError) and not has_details(error):
        return ClusterStateError(f"no cluster answers at {address}: {rebuilt}")
    return rebuilt
