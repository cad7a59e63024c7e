"""A client without our code: everything it knows it asks the router for, as grpcurl does."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.json_format import MessageToDict, ParseDict
from grpc import aio
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.rpc_tools import expected, running_cluster


def call_by_hand(
    address: str, method_name: str, fields: dict[str, Any]
) -> tuple[set[str], list[dict[str, Any]]]:
    """The services, and what one streaming call answers, as plain mappings."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        # A pool of its own: nothing that is generated here is in it.
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("cluster.v1.InferenceService")
        method = service.FindMethodByName(method_name)
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_stream(
            f"/{service.full_name}/{method.name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        request = ParseDict(fields, request_class())
        chunks = [MessageToDict(chunk) for chunk in call(request, timeout=30)]
        return set(database.get_services()), chunks


async def test_a_call_from_reflected_descriptors_streams() -> None:
    async with running_cluster() as cluster:
        fields = {"tokenIds": {"ids": [1, 2, 3]}, "sampling": {"maxTokens": 40}}
        services, chunks = await asyncio.to_thread(
            call_by_hand, cluster.address, "Generate", fields
        )
    assert services >= {
        "cluster.v1.InferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert len(chunks) > 1
    tokens = [token for chunk in chunks for token in chunk.get("tokenIds", [])]
    assert tokens == expected([1, 2, 3], 40)
    assert chunks[-1]["finishReason"] == "FINISH_REASON_LENGTH"


async def test_reflection_is_there_as_v1_and_describes_itself() -> None:
    """First asked with the messages of v1alpha, which are the same, then with those it told of."""
    name = "grpc.reflection.v1.ServerReflection"

    async def ask(channel: Any, request: Any, response_class: Any) -> Any:
        call = channel.stream_stream(
            f"/{name}/ServerReflectionInfo",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_class.FromString,
        )
        return await call(iter([request]), timeout=30).read()

    async with running_cluster() as cluster, aio.insecure_channel(cluster.address) as channel:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
        answer = await ask(channel, request, reflection_pb2.ServerReflectionResponse)
        pool = descriptor_pool.DescriptorPool()
        for file in answer.file_descriptor_response.file_descriptor_proto:
            pool.AddSerializedFile(file)
        method = pool.FindServiceByName(name).FindMethodByName("ServerReflectionInfo")
        assert method.client_streaming
        assert method.server_streaming
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        assert request_class.DESCRIPTOR.full_name == "grpc.reflection.v1.ServerReflectionRequest"
        answer = await ask(channel, request_class(list_services="*"), response_class)
    listed = {service.name for service in answer.list_services_response.service}
    assert listed >= {"cluster.v1.InferenceService", "grpc.health.v1.Health", name}


async def test_a_chat_by_hand_streams() -> None:
    async with running_cluster(router={"chat_template": "chatml"}) as cluster:
        fields = {
            "conversation": {"messages": [{"role": "ROLE_USER", "content": "hello"}]},
            "sampling": {"maxTokens": 40},
        }
        _, chunks = await asyncio.to_thread(call_by_hand, cluster.address, "Chat", fields)
        (request,) = cluster.replicas[0].loop.submitted
    assert len(chunks) > 1
    tokens = [token for chunk in chunks for token in chunk.get("tokenIds", [])]
    assert tokens == expected(list(request.prompt_token_ids), 40)
    assert "".join(chunk.get("content", "") for chunk in chunks)
