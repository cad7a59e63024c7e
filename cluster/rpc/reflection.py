"""Server reflection, as ``grpc.reflection.v1`` and as the ``v1alpha`` that it came from.

The package knows ``v1alpha`` alone. ``v1`` has the same messages with the same numbers under
another name, so that the same servicer answers both, and its descriptor is the other one's renamed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc import aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA, _V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"
_V1_SERVICE = f"{_V1}.ServerReflection"


def serve_reflection(server: aio.Server, service_names: Iterable[str]) -> None:
    """Tells clients without our code of ``service_names`` and their messages, and of itself."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer(
        (*service_names, reflection.SERVICE_NAME, _V1_SERVICE)
    )
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": handler}
    for name in (reflection.SERVICE_NAME, _V1_SERVICE):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


@cache
def _describe_v1() -> None:
    """Adds the descriptor of ``v1`` to those that reflection finds, unless a package has."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileContainingSymbol(_V1_SERVICE)
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        text = text_format.MessageToString(alpha).replace(_ALPHA, _V1)
        file = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
        file.name = "grpc/reflection/v1/reflection.proto"
        pool.AddSerializedFile(file.SerializeToString())
