"""What a drafter receives from replicas: rounds, and features."""

from __future__ import annotations

import random

import torch
from google.protobuf.message import DecodeError, Message

from cluster.bench.fuzz_mutators import mutate_encoded
from cluster.bench.fuzz_surfaces import (
    ACCEPTED,
    BLOCK_SIZE,
    FEATURE_SIZE,
    UNDECODABLE,
    VOCAB_SIZE,
    Loaded,
)
from cluster.engine.draft_client import DraftSampling, DraftSequence, SessionKey
from cluster.engine.draft_loop import FeatureChunk
from cluster.errors import DsparkError
from cluster.rpc.draft_messages import (
    decode_chunk,
    decode_round,
    decode_session,
    encode_chunk,
    encode_round,
    encode_session,
)
from cluster.v1 import drafter_pb2

KEYS = (SessionKey("a", 1), SessionKey("b", 2))
SEQUENCES = tuple(
    DraftSequence(
        session=key,
        committed_length=10,
        num_features=2,
        new_token_ids=(1, 2, 3),
        num_speculative_tokens=3,
    )
    for key in KEYS
)
# A first byte of what is fuzzed says which message it is.
KINDS: tuple[type[Message], ...] = (drafter_pb2.DraftRequest, drafter_pb2.FeedRequest)


def load() -> Loaded:
    """The surface."""
    return Loaded(_check, _seeds(), mutate)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Fields of the message changed."""
    index = data[0] % len(KINDS) if data else 0
    return bytes([index]) + mutate_encoded(KINDS[index], data[1:], rng)


def _check(data: bytes) -> str:
    checks = (_check_round, _check_chunk)
    try:
        checks[data[0] % len(checks) if data else 0](data[1:])
    except DecodeError:
        return UNDECODABLE
    except DsparkError as error:
        return type(error).__name__
    return ACCEPTED


def _check_round(data: bytes) -> None:
    message = drafter_pb2.DraftRequest.FromString(data)
    for session in message.close.sessions:
        decode_session(session)
    if message.HasField("close"):
        return
    asked = decode_round(
        message.round,
        feature_size=FEATURE_SIZE,
        vocab_size=VOCAB_SIZE,
        block_size=BLOCK_SIZE,
        max_sequences=8,
    )
    assert len(asked.features) == sum(sequence.num_features for sequence in asked.sequences)


def _check_chunk(data: bytes) -> None:
    message = drafter_pb2.FeedRequest.FromString(data)
    chunk = decode_chunk(message.chunk, feature_size=FEATURE_SIZE, vocab_size=VOCAB_SIZE)
    assert len(chunk.token_ids) == len(chunk.features) + 1
    # What is accepted means the same to the next reader.
    assert encode_chunk(chunk).chunk.token_ids == message.chunk.token_ids


def _seeds() -> list[bytes]:
    first = FeatureChunk(
        session=KEYS[0],
        start=0,
        features=torch.ones(2, FEATURE_SIZE),
        token_ids=(1, 2, 3),
        sampling=DraftSampling(temperature=0.7, top_k=3, top_p=0.5, seed=4),
    )
    later = FeatureChunk(
        session=KEYS[1], start=2, features=torch.ones(1, FEATURE_SIZE).half(), token_ids=(4, 5)
    )
    close = drafter_pb2.DraftRequest.Close(sessions=[encode_session(key) for key in KEYS])
    return [
        b"\0" + encode_round(1, SEQUENCES, torch.ones(4, FEATURE_SIZE)).SerializeToString(),
        b"\0" + drafter_pb2.DraftRequest(close=close).SerializeToString(),
        b"\1" + encode_chunk(first).SerializeToString(),
        b"\1" + encode_chunk(later).SerializeToString(),
    ]
