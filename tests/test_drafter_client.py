"""A replica's client and drafters that break the protocol, or are slow."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import torch
from grpc import aio

from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.rpc.draft_messages import chunk_bytes, encode_digests
from cluster.rpc.tensors import encode_tensor
from cluster.v1 import drafter_pb2, drafter_pb2_grpc
from tests.draft_helpers import BLOCK, VOCAB, make_drafter, make_engine, round_of, sequence
from tests.drafter_rpc_tools import (
    DIGESTS,
    SAMPLED,
    LoopThread,
    client_of,
    open_with,
    served,
    state_of,
    tensor_of,
    wait_for,
)


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


class FakeDrafter(drafter_pb2_grpc.DrafterServiceServicer):
    """Answers every round with what ``answer`` makes of it (``None``: not at all)."""

    def __init__(self, answer: Callable | None) -> None:
        self.answer = answer
        self.num_streams = 0

    async def Draft(self, request_iterator, context) -> None:
        self.num_streams += 1
        await context.read()
        await context.write(
            drafter_pb2.DraftResponse(
                welcome=drafter_pb2.DraftResponse.Welcome(
                    drafter_id="fake",
                    protocol_version=PROTOCOL_VERSION,
                    digests=encode_digests(DIGESTS),
                    block_size=BLOCK,
                    vocab_size=VOCAB,
                )
            )
        )
        while (message := await context.read()) is not aio.EOF:
            if message.WhichOneof("message") != "round" or self.answer is None:
                continue
            await context.write(drafter_pb2.DraftResponse(proposals=self.answer(message.round)))

    async def Feed(self, request_iterator, context) -> None:
        await context.read()
        await context.write(
            drafter_pb2.FeedResponse(welcome=drafter_pb2.FeedResponse.Welcome(credit_bytes=1 << 20))
        )
        while (message := await context.read()) is not aio.EOF:
            rows = message.chunk.features
            ack = drafter_pb2.FeedResponse.Ack(
                session=message.chunk.session,
                length=message.chunk.start + rows.shape[0],
                credit_bytes=chunk_bytes(message.chunk),
            )
            await context.write(drafter_pb2.FeedResponse(ack=ack))


@asynccontextmanager
async def _fake(fake: FakeDrafter) -> AsyncIterator[int]:
    server = aio.server()
    drafter_pb2_grpc.add_DrafterServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@contextmanager
def fake_drafter(loop: LoopThread, answer: Callable | None) -> Iterator[tuple[FakeDrafter, str]]:
    fake = FakeDrafter(answer)
    manager = _fake(fake)
    port = loop.run(manager.__aenter__())
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        loop.run(manager.__aexit__(None, None, None))


def answer_with(*, round_id: int | None = None, copies: int = 1, **changes) -> Callable:
    """A valid answer to a sampled round of one sequence and two tokens, but for the changes."""

    def answer(request):
        asked = request.sequences[0]
        values = {
            "session": asked.session,
            "committed_length": asked.committed_length,
            "outcome": drafter_pb2.DraftResponse.OUTCOME_DRAFTED,
            "draft_token_ids": [4, 5],
            "confidences": [0.5, 0.25],
            "draft_prob_token_ids": encode_tensor(torch.tensor([[4, 5]] * 2, dtype=torch.int32)),
            "draft_prob_values": encode_tensor(torch.tensor([[0.5, 0.5]] * 2).half()),
        }
        proposal = drafter_pb2.DraftResponse.Proposal(**{**values, **changes})
        return drafter_pb2.DraftResponse.Proposals(
            round_id=request.round_id if round_id is None else round_id,
            proposals=[proposal] * copies,
        )

    return answer


MALFORMED = {
    "nan confidence": answer_with(confidences=[0.5, float("nan")]),
    "confidence above 1": answer_with(confidences=[0.5, 1.5]),
    "too few confidences": answer_with(confidences=[0.5]),
    "id out of range": answer_with(draft_token_ids=[4, VOCAB]),
    "negative id": answer_with(draft_token_ids=[-1, 4]),
    "too many tokens": answer_with(draft_token_ids=[4, 5, 4], confidences=[0.5] * 3),
    "no law": answer_with(draft_prob_token_ids=None, draft_prob_values=None),
    "law of other shape": answer_with(draft_prob_values=encode_tensor(torch.ones(2, 1).half())),
    "law of other dtype": answer_with(draft_prob_values=encode_tensor(torch.ones(2, 2))),
    "nan in the law": answer_with(
        draft_prob_values=encode_tensor(torch.full((2, 2), torch.nan).half())
    ),
    "token outside its law": answer_with(
        draft_prob_token_ids=encode_tensor(torch.tensor([[6, 7]] * 2, dtype=torch.int32))
    ),
    "truncated law": answer_with(draft_prob_values=tensor_of([2, 2], b"12345", 2)),
    "other length": answer_with(committed_length=3),
    "other session": answer_with(session=drafter_pb2.SessionKey(request_id="no", epoch=0)),
    "no outcome": answer_with(outcome=0),
    "missing_from": answer_with(outcome=drafter_pb2.DraftResponse.OUTCOME_MISSING, missing_from=-1),
    "twice": answer_with(copies=2),
    "none": answer_with(copies=0),
    "unknown round": answer_with(round_id=10**9),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_proposal_quarantines_its_drafter(loop, name):
    with fake_drafter(loop, MALFORMED[name]) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9, SAMPLED)
        started = time.monotonic()
        handle = client.start_round(round_of(sequence(key, 10, count=2)))
        assert client.collect(handle, 5.0) == []
        assert time.monotonic() - started < 4.0
        assert state_of(client) == "quarantined"
        assert client.status()[0].reason
        assert client.stats.num_malformed == 1
        assert not client.has_session(key)
        assert not client.is_ready()


def test_the_fakes_answer_would_be_good(loop):
    with fake_drafter(loop, answer_with()) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9, SAMPLED)
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10, count=2))), 5.0)
        assert result.proposal.draft_token_ids == (4, 5)


def test_quarantine_ends_and_grows(loop, monkeypatch):
    monkeypatch.setattr("cluster.rpc.drafter_connection.MALFORMED_QUARANTINE_S", 0.2)
    with fake_drafter(loop, MALFORMED["none"]) as (fake, address), client_of(address) as client:
        times = []
        for index in range(3):
            started = time.monotonic()
            assert wait_for(client.is_ready)
            times.append(time.monotonic() - started)
            key = open_with(client, f"r{index}", 9, SAMPLED)
            handle = client.start_round(round_of(sequence(key, 10, count=2)))
            assert client.collect(handle, 5.0) == []
        assert fake.num_streams == 3
        assert times[1] >= 0.1
        assert times[2] >= 0.2


def test_a_drafter_that_stays_unusable_is_logged_once(loop, monkeypatch, caplog):
    monkeypatch.setattr("cluster.rpc.drafter_connection.MISMATCH_RETRY_S", 0.05)
    engine = make_engine(make_drafter())
    with (
        served(loop, engine, digests={**DIGESTS, "target": "other"}) as (_, address),
        client_of(address) as client,
    ):
        assert wait_for(lambda: client.stats.num_mismatched >= 3)
    (record,) = [record for record in caplog.records if "mismatched" in record.message]
    assert record.levelname == "WARNING"
    assert "differ in target; DraftClientStats(" in record.message


def test_late_rounds_are_dropped_and_three_quarantine(loop):
    with fake_drafter(loop, None) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9)
        for index in range(2):
            started = time.monotonic()
            handle = client.start_round(round_of(sequence(key, 10 + index)))
            assert client.collect(handle, 0.1) == []
            assert 0.09 < time.monotonic() - started < 3.0
        assert client.is_ready()
        # Two are outstanding: the third is not sent, and nobody waits for it.
        started = time.monotonic()
        assert client.collect(client.start_round(round_of(sequence(key, 12))), 5.0) == []
        assert time.monotonic() - started < 3.0
        assert state_of(client) == "quarantined"
        assert (client.stats.num_late, client.stats.num_dropped) == (2, 1)
        assert not client.has_session(key)
        assert wait_for(client.is_ready)  # it is tried again


def test_a_late_answer_is_never_used(loop):
    delay_s = [0.3]

    def answer(request):
        time.sleep(delay_s[0])
        return answer_with()(request)

    with fake_drafter(loop, answer) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9, SAMPLED)
        late = client.start_round(round_of(sequence(key, 10, count=2)))
        assert client.collect(late, 0.05) == []
        time.sleep(0.5)
        assert client.collect(late, 0.05) == []
        assert client.stats.num_late == 1
        delay_s[0] = 0.0
        (result,) = client.collect(client.start_round(round_of(sequence(key, 11, count=2))), 5.0)
        assert result.committed_length == 11
