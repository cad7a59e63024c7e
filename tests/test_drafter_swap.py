"""A drafter's server that goes over to another engine while replicas are connected."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cluster.rpc.drafter_client import GrpcDraftClient
from tests.draft_helpers import VOCAB, make_drafter, make_engine
from tests.drafter_rpc_tools import (
    DIGESTS,
    SPECULATIVE,
    LoopThread,
    client_of,
    open_with,
    served,
    state_of,
    wait_for,
)

NEW_DIGESTS = {**DIGESTS, "drafter": "another", "projection": "another"}


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.stop()


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.rpc.drafter_connection.MISMATCH_RETRY_S", 0.05)


@pytest.fixture
def new_client() -> Iterator[GrpcDraftClient]:
    """The same replica, with the digests of the drafter that is swapped to."""
    client = GrpcDraftClient(
        replica_id="replica", digests=NEW_DIGESTS, vocab_size=VOCAB, config=SPECULATIVE
    )
    yield client
    client.close()


def test_replicas_of_the_new_drafter_are_served_and_those_of_the_old_one_are_not(
    loop: LoopThread, new_client: GrpcDraftClient
) -> None:
    former, engine = make_engine(make_drafter()), make_engine(make_drafter())
    with served(loop, former) as (server, address), client_of(address) as client:
        new_client.set_drafters([("d0", address)])
        assert wait_for(client.is_ready)
        session = open_with(client, "r", 9)
        assert wait_for(lambda: state_of(new_client) == "mismatched")
        loop.run(server.swap(engine, digests=NEW_DIGESTS, method="dspark"))
        assert wait_for(new_client.is_ready)
        assert wait_for(lambda: state_of(client) == "mismatched")
        assert not client.has_session(session)
        open_with(new_client, "r", 9)
        assert (former.num_sessions, engine.num_sessions) == (1, 1)
        assert server.is_healthy
    threads = [thread for thread in threading.enumerate() if thread.name == "draft-loop"]
    assert threads == [], "the former drafter's thread lives on"


def test_a_swap_to_the_same_checkpoint_brings_everybody_back(loop: LoopThread) -> None:
    former, engine = make_engine(make_drafter()), make_engine(make_drafter())
    with served(loop, former) as (server, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        session = open_with(client, "r", 9)
        loop.run(server.swap(engine, digests=DIGESTS, method="dspark"))
        assert wait_for(lambda: not client.has_session(session))
        assert wait_for(client.is_ready)
        open_with(client, "s", 9)
        assert engine.num_sessions == 1
