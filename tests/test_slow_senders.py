"""Clients that begin a message and do not end it: what of it a router keeps, and for how long."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import DeadlineExceededError, InvalidRequestError, QueueFullError
from cluster.rpc.inbox import Inbox
from cluster.rpc.status import from_rpc_error
from cluster.security.authenticator import Authenticator
from cluster.v1 import inference_pb2, inference_pb2_grpc
from tests.rpc_tools import expected, gather_chunks, running_cluster, until
from tests.test_security import entry, write_keys

_HEADERS, _RST_STREAM, _SETTINGS, _PING = 1, 3, 4, 6
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4


class SilentClient:
    """HTTP/2 by hand: calls whose message is announced, begun, and never ended."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.partition(":")
        self.ended: set[int] = set()  # calls that the server has ended

    async def __aenter__(self) -> SilentClient:
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))
        self._writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._send(_SETTINGS, 0, 0)
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        self._writer.close()

    def begin(self, number: int, path: str, *, message_bytes: int = 1 << 20) -> None:
        """The call ``number`` sends two of the bytes that it announces."""
        stream = 2 * number + 1
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "x",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        block = b"".join(
            b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode()
            for k, v in fields.items()
        )
        self._send(_HEADERS, _END_HEADERS, stream, block)
        self._send(0, 0, stream, b"\0" + struct.pack(">I", message_bytes) + b"xx")

    def _send(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
        self._writer.write(head + struct.pack(">I", stream) + payload)

    async def _read(self) -> None:
        while True:
            head = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                self._send(kind, _ACK, 0, payload if kind == _PING else b"")
            if kind == _RST_STREAM or (kind == _HEADERS and flags & _END_STREAM):
                self.ended.add(stream // 2)


async def test_without_a_key_no_message_is_waited_for(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", entry("me", "secret"))
    router = {"authenticator": Authenticator(keys)}
    methods = ("Generate", "Chat", "Tokenize", "Detokenize", "GetStatus", "ListModels")
    async with (
        running_cluster(router=router, key="secret") as cluster,
        SilentClient(cluster.address) as silent,
    ):
        for number, method in enumerate(methods * 3):
            silent.begin(number, f"/cluster.v1.InferenceService/{method}")
        await until(lambda: len(silent.ended) == 3 * len(methods))
        chunks = await gather_chunks(cluster.client, [1], max_tokens=9)
        assert [t for chunk in chunks for t in chunk.token_ids] == expected([1], 9)
        assert cluster.router.authenticator.refusals.counts["no_key"] == 3 * len(methods)


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_what_is_open_to_all_holds_few_unfinished_messages(path: str) -> None:
    async with running_cluster() as cluster, SilentClient(cluster.address) as silent:
        for number in range(40):
            silent.begin(number, path)
        await until(lambda: len(silent.ended) == 24)
        async with aio.insecure_channel(cluster.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert len(silent.ended) <= 25
        assert cluster.router.authenticator.refusals.counts["slow_sender"] == len(silent.ended)


async def test_a_call_without_a_message_or_with_too_large_a_one() -> None:
    async with running_cluster(router={"max_message_bytes": 1 << 20}) as cluster:
        async with aio.insecure_channel(cluster.address) as channel:
            generate = channel.stream_stream("/cluster.v1.InferenceService/Generate")()
            await generate.done_writing()
            with pytest.raises(aio.AioRpcError) as caught:
                await generate.read()
            error = from_rpc_error(caught.value)
            assert isinstance(error, InvalidRequestError)
            assert error.field == "message"
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Tokenize(inference_pb2.TokenizeRequest(text="x" * (1 << 20)))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        chunks = await gather_chunks(cluster.client, [1], max_tokens=9)
        assert [t for chunk in chunks for t in chunk.token_ids] == expected([1], 9)


class Context:
    """Of a call whose message comes when it is put."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()

    async def read(self) -> Any:
        return await self.messages.get()

    def peer(self) -> str:
        return "somebody"


async def receive(inbox: Inbox) -> tuple[Context, asyncio.Task[Any]]:
    context = Context()
    task = asyncio.create_task(inbox.receive(context))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    return context, task


async def test_the_oldest_give_way_when_they_have_had_their_time() -> None:
    inbox = Inbox(2, patience_s=0.2)
    calls = [await receive(inbox) for _ in range(4)]
    assert inbox.num_awaited == 4  # all are new
    await asyncio.sleep(0.25)
    calls.append(await receive(inbox))
    await asyncio.wait([task for _, task in calls], timeout=0.05)
    assert [task.done() for _, task in calls] == [True, True, True, False, False]
    for _, task in calls[:3]:
        assert isinstance(task.exception(), QueueFullError)
    for context, task in calls[3:]:
        context.messages.put_nowait("all of it")
        assert await task == "all of it"
    assert inbox.num_awaited == 0


async def test_no_message_is_waited_for_longer_than_its_time() -> None:
    inbox = Inbox(2, patience_s=1.0, timeout_s=0.05)
    context, task = await receive(inbox)
    with pytest.raises(DeadlineExceededError, match="did not come within"):
        await task
    context, task = await receive(inbox)
    context.messages.put_nowait(aio.EOF)
    assert await task is None
    assert inbox.num_awaited == 0
