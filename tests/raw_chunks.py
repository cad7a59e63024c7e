"""What routers send, before clients judge it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from cluster.rpc.chunk import Chunk
from cluster.rpc.resumption import Resumption
from cluster.v1 import inference_pb2


@contextmanager
def refused_chunks() -> Iterator[list[str]]:
    """Lists the chunks that clients of this process do not take from here on, since they repeat or
    skip tokens. The client's user never sees one: the client leaves the stream and asks anew."""
    refused: list[str] = []
    take = Resumption.take

    def watched(call: Resumption, message: inference_pb2.GenerateResponse) -> Chunk | None:
        chunk = take(call, message)
        if chunk is None:
            refused.append(
                f"{message.request_id}, attempt {message.attempt}: {len(message.token_ids)} tokens "
                f"from {message.token_offset} on"
            )
        return chunk

    with mock.patch.object(Resumption, "take", watched):
        yield refused
