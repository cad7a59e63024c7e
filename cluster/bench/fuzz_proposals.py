"""What a replica receives from a drafter: greetings, proposals, and acknowledgements."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from google.protobuf.message import DecodeError, Message

from cluster.bench.fuzz_drafter import KEYS, SEQUENCES
from cluster.bench.fuzz_mutators import mutate_encoded
from cluster.bench.fuzz_surfaces import ACCEPTED, BLOCK_SIZE, UNDECODABLE, VOCAB_SIZE, Loaded
from cluster.engine.draft_client import DraftOutcome, DraftResult, DraftSampling, DraftSequence
from cluster.errors import DsparkError
from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.rpc.convert import pace_from_proto
from cluster.rpc.draft_messages import (
    decode_answer,
    decode_curve,
    encode_curve,
    encode_digests,
    encode_session,
)
from cluster.rpc.drafter_handshake import greet_draft, greet_feed
from cluster.rpc.tensors import encode_tensor
from cluster.speculation.draft_cost import DraftCost
from cluster.speculation.draft_curve import DraftCurve
from cluster.v1 import common_pb2, drafter_pb2

DIGESTS = {"target": "t", "tokenizer": "k", "drafter": "d", "projection": "p"}
# A first byte of what is fuzzed says which message it is.
KINDS: tuple[type[Message], ...] = (drafter_pb2.DraftResponse, drafter_pb2.FeedResponse)
_SAMPLINGS = {
    KEYS[0]: DraftSampling(temperature=0.0),
    KEYS[1]: DraftSampling(temperature=1.0, send_probs=True),
}


def load() -> Loaded:
    """The surface."""
    events = asyncio.new_event_loop()

    def check(data: bytes) -> str:
        index = data[0] % len(KINDS) if data else 0
        try:
            if index == 1:
                events.run_until_complete(
                    _check_feed(drafter_pb2.FeedResponse.FromString(data[1:]))
                )
                return ACCEPTED
            message = drafter_pb2.DraftResponse.FromString(data[1:])
            if message.HasField("proposals"):
                _check_proposals(message.proposals)
            else:
                events.run_until_complete(_check_welcome(message))
        except DecodeError:
            return UNDECODABLE
        except DsparkError as error:
            return type(error).__name__
        return ACCEPTED

    proposals = make_proposals(
        1, SEQUENCES, random.Random(1), has_law=lambda key: _SAMPLINGS[key].send_probs
    )
    messages: list[Message] = [
        drafter_pb2.DraftResponse(proposals=proposals),
        drafter_pb2.DraftResponse(welcome=make_welcome("d")),
        drafter_pb2.FeedResponse(welcome=make_credit()),
    ]
    seeds = [bytes([KINDS.index(type(m))]) + m.SerializeToString() for m in messages]
    return Loaded(check, seeds, mutate)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Fields of the message changed."""
    index = data[0] % len(KINDS) if data else 0
    return bytes([index]) + mutate_encoded(KINDS[index], data[1:], rng)


def make_welcome(drafter_id: str, feature_size: int = 0) -> drafter_pb2.DraftResponse.Welcome:
    """As a drafter of ``DIGESTS`` greets, with every field."""
    curve = DraftCurve.fit([1, 8], [1, 8], [[1e-3, 2e-3], [2e-3, 4e-3]])
    return drafter_pb2.DraftResponse.Welcome(
        drafter_id=drafter_id,
        protocol_version=PROTOCOL_VERSION,
        digests=encode_digests(DIGESTS),
        method="ngram",
        block_size=BLOCK_SIZE,
        feed_credit_bytes=1 << 20,
        vocab_size=VOCAB_SIZE,
        feature_size=feature_size,
        paced=common_pb2.Pace(profile="p", time_scale=1.0, num_passes=3),
        draft_curve=encode_curve(curve),
    )


def make_credit() -> drafter_pb2.FeedResponse.Welcome:
    """As it greets on the stream of features."""
    return drafter_pb2.FeedResponse.Welcome(credit_bytes=1 << 20)


def make_proposals(
    round_id: int,
    sequences: Sequence[Any],
    rng: random.Random,
    has_law: Callable[[Any], bool] = lambda key: False,
) -> drafter_pb2.DraftResponse.Proposals:
    """A valid answer, with any tokens.

    Args:
        sequences: of the round, as a replica has them, or as messages.
        has_law: whether the law that drafts are from goes with a session's.
    """
    proposals = []
    for sequence in sequences:
        key, count = sequence.session, max(sequence.num_speculative_tokens - 1, 0)
        token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(count)]
        proposal = drafter_pb2.DraftResponse.Proposal(
            session=encode_session(key),
            committed_length=sequence.committed_length,
            outcome=drafter_pb2.DraftResponse.OUTCOME_DRAFTED,
            draft_token_ids=token_ids,
            confidences=[rng.random() for _ in range(count)],
        )
        if has_law(key) and count:
            support = [[token_id, (token_id + 1) % VOCAB_SIZE] for token_id in token_ids]
            ids = encode_tensor(torch.tensor(support, dtype=torch.int32))
            proposal.draft_prob_token_ids.CopyFrom(ids)
            values = encode_tensor(torch.full((count, 2), 0.5).half())
            proposal.draft_prob_values.CopyFrom(values)
        proposals.append(proposal)
    return drafter_pb2.DraftResponse.Proposals(
        round_id=round_id, proposals=proposals, queue_seconds=1e-4, compute_seconds=1e-3
    )


def check_result(result: DraftResult, asked: DraftSequence) -> None:
    """What the engine relies on. Raises: AssertionError."""
    assert result.committed_length == asked.committed_length
    assert 0 <= result.missing_from < asked.committed_length
    assert (result.proposal is not None) == (result.outcome is DraftOutcome.DRAFTED)
    if result.proposal is not None:
        tokens, confidences = result.proposal.draft_token_ids, result.proposal.confidences
        assert len(tokens) == len(confidences) <= asked.num_speculative_tokens
        assert all(0 <= token < VOCAB_SIZE for token in tokens)
        assert all(0 <= value <= 1 for value in confidences)


def _check_proposals(message: drafter_pb2.DraftResponse.Proposals) -> None:
    asked = dict(zip(KEYS, SEQUENCES, strict=True))
    results = decode_answer(message, asked=asked, samplings=_SAMPLINGS, vocab_size=VOCAB_SIZE)
    assert {result.session for result in results} == set(asked)
    for result in results:
        check_result(result, asked[result.session])
    cost = DraftCost()
    cost.observe(
        2,
        3,
        compute_s=message.compute_seconds,
        queue_s=message.queue_seconds,
        network_s=1e-3 - message.compute_seconds - message.queue_seconds,
        now=1.0,
    )
    _check_cost(cost)
    pace_from_proto(message)


async def _check_welcome(message: drafter_pb2.DraftResponse) -> None:
    stream: Any = _Stream(message)
    welcome = await greet_draft(stream, replica_id="r", digests=DIGESTS, vocab_size=VOCAB_SIZE)
    assert welcome.block_size >= 1
    pace_from_proto(welcome)
    if welcome.HasField("draft_curve"):
        _check_cost(DraftCost(decode_curve(welcome.draft_curve)))


async def _check_feed(message: drafter_pb2.FeedResponse) -> None:
    stream: Any = _Stream(message)
    await greet_feed(stream, replica_id="r")


def _check_cost(cost: DraftCost) -> None:
    """Raises: AssertionError: what is predicted is no time."""
    for sessions, tokens in ((1, 1), (3, 8), (1000, 64)):
        seconds = cost.round_trip_s(sessions, tokens, now=2.0)
        assert 0 < seconds < math.inf, (sessions, tokens, seconds)


class _Stream:
    """A call that is answered by one message."""

    def __init__(self, message: Message) -> None:
        self._message = message

    async def write(self, message: Message) -> None:
        message.SerializeToString()

    async def read(self) -> Message:
        return self._message
