"""Broken messages to a live drafter, behind a valid greeting and often behind valid messages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from cluster.bench import fuzz_drafter
from cluster.bench.fuzz_live_counts import CALL_TIMEOUT_S, LiveCounts
from cluster.bench.fuzz_mutators import mutate_behind_first, mutate_bytes
from cluster.bench.fuzz_surfaces import BLOCK_SIZE, MAX_MODEL_LEN, VOCAB_SIZE
from cluster.config import DrafterConfig
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_ngram import NgramMethod
from cluster.rpc.channels import PROTOCOL_VERSION, open_channel
from cluster.rpc.drafter_server import DrafterServer
from cluster.rpc.raw_call import call_stream
from cluster.v1 import drafter_pb2

# What is broken ends its stream, and those behind it are not read.
_MESSAGES_PER_STREAM = 3
_MAX_VALID = 3
_BYTES_TOO = 0.3  # of messages have bytes changed behind their fields
_SESSION_TTL_S = 0.5


async def fuzz_drafter_streams(counts: LiveCounts, num_messages: int, rng: random.Random) -> None:
    """Streams of a replica's: the k-th message is the first that is broken."""
    config = DrafterConfig(kv_cache_memory_mb=4, max_sessions=64, session_ttl_s=_SESSION_TTL_S)
    method = NgramMethod(
        config,
        BLOCK_SIZE,
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        min_match=1,
        max_match=3,
    )
    engine = DraftEngine(method, config)
    server = DrafterServer(
        engine, drafter_id="d", digests={}, config=config, method="ngram", session_grace_s=0.0
    )
    address = f"127.0.0.1:{await server.start('127.0.0.1')}"
    kinds = _stream_kinds()
    numbers = iter(range(1 << 60))
    async with open_channel(address) as channel:

        def make_call() -> tuple[Callable[[], Awaitable[str]], bytes]:
            kind = rng.choice(kinds)
            greeting = kind.greet(f"replica-{next(numbers)}")
            if rng.random() < 0.1:
                greeting = mutate_bytes(greeting, rng)
            messages = [greeting, *[kind.valid] * rng.randint(0, _MAX_VALID)]
            for _ in range(rng.randint(1, _MESSAGES_PER_STREAM)):
                counts.num_messages += 1
                data = fuzz_drafter.mutate(kind.mark + kind.valid, rng)
                if rng.random() < _BYTES_TOO:
                    data = mutate_behind_first(data, rng)
                messages.append(data[1:])
            name = f"/cluster.v1.DrafterService/{kind.method}"
            return (
                lambda: call_stream(channel, name, messages, timeout_s=CALL_TIMEOUT_S),
                b" ".join(messages),
            )

        await counts.send_all(num_messages, make_call)
        await asyncio.sleep(0.3)
        for kind in kinds:
            sent = [kind.greet("last"), kind.valid]
            name = f"/cluster.v1.DrafterService/{kind.method}"
            outcome = await call_stream(channel, name, sent, timeout_s=CALL_TIMEOUT_S)
            if outcome != "OK":
                counts.fail(f"a valid stream behind the others ended with {outcome}")
        if server.num_streams:
            counts.fail(f"{server.num_streams} streams are left")
        if not server.is_healthy:
            counts.fail("the drafter's thread has ended")
    await server.drain(0.1)
    await asyncio.sleep(_SESSION_TTL_S)
    engine.expire()
    engine.check_integrity()
    if engine.num_sessions:
        counts.fail(f"{engine.num_sessions} sessions are left")


class _StreamKind(NamedTuple):
    """One of the two RPCs.

    Attributes:
        mark: what ``fuzz_drafter``'s inputs of its messages begin with.
        greet: the greeting of a replica, by its id.
        valid: a message that may follow it.
    """

    method: str
    mark: bytes
    greet: Callable[[str], bytes]
    valid: bytes


def _stream_kinds() -> tuple[_StreamKind, _StreamKind]:
    key = drafter_pb2.SessionKey(request_id="a", epoch=1)
    empty = {"dtype": 1, "shape": [2, 0]}
    sampling = drafter_pb2.FeedRequest.DraftSampling(temperature=0.0, top_p=1.0)
    chunk = drafter_pb2.FeedRequest.Chunk(
        session=key, start=0, features=empty, token_ids=[1, 2, 3], sampling=sampling
    )
    sequence = drafter_pb2.DraftRequest.Sequence(
        session=key,
        committed_length=3,
        num_features=2,
        new_token_ids=[1, 2, 3],
        num_speculative_tokens=2,
    )
    draft_round = drafter_pb2.DraftRequest.Round(round_id=1, sequences=[sequence], features=empty)

    def greet_draft(replica_id: str) -> bytes:
        hello = drafter_pb2.DraftRequest.Hello(
            replica_id=replica_id, protocol_version=PROTOCOL_VERSION
        )
        return drafter_pb2.DraftRequest(hello=hello).SerializeToString()

    def greet_feed(replica_id: str) -> bytes:
        hello = drafter_pb2.FeedRequest.Hello(
            replica_id=replica_id, protocol_version=PROTOCOL_VERSION
        )
        return drafter_pb2.FeedRequest(hello=hello).SerializeToString()

    valid_round = drafter_pb2.DraftRequest(round=draft_round).SerializeToString()
    valid_chunk = drafter_pb2.FeedRequest(chunk=chunk).SerializeToString()
    return (
        _StreamKind("Draft", b"\0", greet_draft, valid_round),
        _StreamKind("Feed", b"\1", greet_feed, valid_chunk),
    )
