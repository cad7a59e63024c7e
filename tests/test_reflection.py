"""A client without our code: everything it knows it asks the router for, as grpcurl does."""

from __future__ import annotations

import asyncio

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.json_format import MessageToDict, ParseDict
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.rpc_tools import expected, running_cluster


def call_by_hand(address: str) -> tuple[set[str], list[dict[str, object]]]:
    """The services, and the chunks of one call, as plain mappings."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        # A pool of its own: nothing that is generated here is in it.
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("cluster.v1.InferenceService")
        method = service.FindMethodByName("Generate")
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_stream(
            f"/{service.full_name}/{method.name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        request = ParseDict(
            {"tokenIds": {"ids": [1, 2, 3]}, "sampling": {"maxTokens": 40}}, request_class()
        )
        chunks = [MessageToDict(chunk) for chunk in call(request, timeout=30)]
        return set(database.get_services()), chunks


async def test_a_call_from_reflected_descriptors_streams() -> None:
    async with running_cluster() as cluster:
        services, chunks = await asyncio.to_thread(call_by_hand, cluster.address)
    assert services >= {
        "cluster.v1.InferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert len(chunks) > 1
    tokens = [token for chunk in chunks for token in chunk.get("tokenIds", [])]  # type: ignore[attr-defined]
    assert tokens == expected([1, 2, 3], 40)
    assert chunks[-1]["finishReason"] == "FINISH_REASON_LENGTH"
