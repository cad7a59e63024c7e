"""A replica's client and drafters that break the protocol, or are slow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import torch
from grpc import aio

from cluster.engine.draft_client import SessionKey
from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.rpc.draft_messages import chunk_bytes, encode_digests
from cluster.rpc.tensors import encode_tensor
from cluster.v1 import drafter_pb2, drafter_pb2_grpc
from tests.draft_helpers import (
    BLOCK,
    VOCAB,
    feed,
    make_drafter,
    make_engine,
    round_of,
    sequence,
)
from tests.drafter_rpc_tools import (
    DIGESTS,
    SAMPLED,
    LoopThread,
    client_of,
    features,
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
    """Answers every round with what ``answer`` makes of it (``None``: not at all).

    ``in_thread``: where ``answer`` takes its time, which other streams then have too.
    """

    def __init__(self, answer: Callable | None, in_thread: bool = False) -> None:
        self.answer = answer
        self.num_streams = 0
        self._in_thread = in_thread

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
            if self._in_thread:
                proposals = await asyncio.to_thread(self.answer, message.round)
            else:
                proposals = self.answer(message.round)
            await context.write(drafter_pb2.DraftResponse(proposals=proposals))

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
def fake_drafter(
    loop: LoopThread, answer: Callable | None, *, in_thread: bool = False
) -> Iterator[tuple[FakeDrafter, str]]:
    fake = FakeDrafter(answer, in_thread)
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


def answer_well(request):
    """A valid answer to a round of one sequence, also to one that probes."""
    if request.sequences[0].num_speculative_tokens < 2:
        return answer_with(
            draft_token_ids=[4],
            confidences=[0.5],
            draft_prob_token_ids=None,
            draft_prob_values=None,
        )(request)
    return answer_with()(request)


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


def test_quarantine_grows_and_ends_when_a_probe_is_answered_well(loop, monkeypatch):
    monkeypatch.setattr("cluster.rpc.drafter_connection.MALFORMED_QUARANTINE_S", 0.2)
    with fake_drafter(loop, MALFORMED["none"]) as (fake, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9, SAMPLED)
        started = time.monotonic()
        assert client.collect(client.start_round(round_of(sequence(key, 10, count=2))), 5.0) == []
        # Two probes that are answered as badly, and nobody's sequence waits for them.
        assert wait_for(lambda: client.stats.num_malformed == 3)
        assert time.monotonic() - started >= 0.1 + 0.2
        assert fake.num_streams == 3
        assert not client.is_ready()
        fake.answer = answer_well
        assert wait_for(client.is_ready)
        key = open_with(client, "again", 9, SAMPLED)
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10, count=2))), 5.0)
        assert result.proposal.draft_token_ids == (4, 5)


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


def test_late_rounds_are_dropped_and_three_open_the_breaker(loop):
    with fake_drafter(loop, None) as (fake, address), client_of(address) as client:
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
        assert state_of(client) == "open"
        assert (client.stats.num_late, client.stats.num_dropped) == (2, 1)
        assert not client.has_session(key)
        # It is tried again, on nobody's account, until it is in time.
        assert wait_for(lambda: fake.num_streams >= 3)
        assert not client.is_ready()
        assert client.stats.num_late == 2
        fake.answer = answer_well
        assert wait_for(client.is_ready)


def test_a_drafter_that_hangs_costs_a_few_rounds_and_then_nothing(loop):
    """Rounds as an engine sends them, for seconds: a good one answers, the other after 2 s."""

    def answer_late(request):
        time.sleep(2.0)
        return answer_well(request)

    with (
        fake_drafter(loop, answer_late, in_thread=True) as (slow, one),
        fake_drafter(loop, answer_well) as (_, two),
        client_of(one, two) as client,
    ):
        assert wait_for(lambda: sum(s.state == "ready" for s in client.status()) == 2)
        waited_s, num_answered, started = 0.0, 0, time.monotonic()
        key, epoch, length = None, 0, 10
        while time.monotonic() - started < 2.5:
            if key is None or not client.has_session(key):
                epoch += 1
                key = SessionKey("r", epoch)
                assert client.open_session(key, SAMPLED)  # the first goes to the slow one
                feed(client, key, 0, features(9))
                assert wait_for(lambda key=key: client.acknowledged_length(key) == 9)
                length = 10
            asked = time.monotonic()
            results = client.collect(
                client.start_round(round_of(sequence(key, length, count=2))), 0.2
            )
            num_answered += len(results)
            if not results:
                waited_s += time.monotonic() - asked
            time.sleep(0.01)
        states = {s.drafter_id: s.state for s in client.status()}
        assert states["d1"] == "ready"
        assert states["d0"] in ("open", "half-open")
        assert client.stats.num_late + client.stats.num_dropped == 3
        assert waited_s < 3 * 0.2 + 1.0
        assert num_answered > 20
        slow.answer = answer_well
        assert wait_for(lambda: sum(s.state == "ready" for s in client.status()) == 2)


def test_a_drafter_that_is_lost_again_and_again_is_left_alone(loop):
    def fail(request):
        raise RuntimeError("broke")

    with fake_drafter(loop, fail) as (fake, address), client_of(address) as client:
        for index in range(3):
            assert wait_for(client.is_ready)
            key = open_with(client, f"r{index}", 9, SAMPLED)
            handle = client.start_round(round_of(sequence(key, 10, count=2)))
            assert client.collect(handle, 5.0) == []
        assert wait_for(lambda: state_of(client) == "open")
        assert "lost too often" in client.status()[0].reason
        assert client.stats.num_lost == 3
        num_streams = fake.num_streams
        assert wait_for(lambda: fake.num_streams >= num_streams + 2)  # probes
        assert client.stats.num_lost == 3
        assert not client.is_ready()


def test_answers_of_before_a_restart_are_refused(loop):
    """A drafter that comes back with what it had before: answers, sessions, acknowledgements."""
    answers = []

    def record(request):
        answers.append(answer_with()(request))
        return answers[-1]

    with contextlib.ExitStack() as first, contextlib.ExitStack() as stack:
        _, one = first.enter_context(fake_drafter(loop, record))
        client = stack.enter_context(client_of(one))
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9, SAMPLED)
        for length in (10, 11):
            draft_round = round_of(sequence(key, length, count=2))
            assert len(client.collect(client.start_round(draft_round), 5.0)) == 1
        first.close()
        # Restarted elsewhere, it answers the first round with what it has answered before.
        with fake_drafter(loop, lambda request: answers[1]) as (_, two):
            client.set_drafters([("d0", two)])
            assert wait_for(lambda: state_of(client) == "ready")
            client.collect(client.start_round(round_of(sequence(key, 11, count=2))), 5.0)
            assert not client.has_session(key)
            client.close_session(key)
            key = open_with(client, "r", 9, SAMPLED)
            draft_round = round_of(sequence(key, 11, count=2))
            assert client.collect(client.start_round(draft_round), 5.0) == []
            assert state_of(client) == "quarantined"
            assert "not outstanding" in client.status()[0].reason

    # The right number on an old base, or on the session's former epoch.
    other_epoch = drafter_pb2.SessionKey(request_id="r", epoch=3)
    for stale in (answer_with(committed_length=10), answer_with(session=other_epoch)):
        with fake_drafter(loop, stale) as (_, address), client_of(address) as client:
            assert wait_for(client.is_ready)
            key = open_with(client, "r", 9, SAMPLED)
            draft_round = round_of(sequence(key, 11, count=2))
            assert client.collect(client.start_round(draft_round), 5.0) == []
            assert state_of(client) == "quarantined"


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
