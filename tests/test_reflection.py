"""A client without our code: everything it knows it asks the router for, as grpcurl does."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.json_format import MessageToDict, ParseDict
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
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert len(chunks) > 1
    tokens = [token for chunk in chunks for token in chunk.get("tokenIds", [])]
    assert tokens == expected([1, 2, 3], 40)
    assert chunks[-1]["finishReason"] == "FINISH_REASON_LENGTH"


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
