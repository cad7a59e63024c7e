"""A drafter that is an enemy: the real engine, `trust_drafter: false`, and a real gRPC server.

Whatever it sends, greedy and seeded outputs are the target's own, sampled ones have the target's
law, and no request stops.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from grpc import aio

from cluster.config import ClusterConfig
from cluster.request import Request, SamplingParams
from cluster.rpc.channels import PROTOCOL_VERSION, server_options
from cluster.rpc.draft_messages import chunk_bytes, encode_digests
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.tensors import encode_tensor
from cluster.v1 import common_pb2, drafter_pb2, drafter_pb2_grpc
from tests.drafter_rpc_tools import LoopThread, wait_for
from tests.engine_law import Case, Fault, generate, save_pair, target_law
from tests.engine_tools import Completion, make_config, make_engine, run
from tests.law import law_p_value
from tests.models import save_tiny_drafter, save_tiny_target
from tests.test_engine_drafters import DIGESTS

VOCAB_SIZE = 96
BLOCK_SIZE = 4
NUM_LAW_SAMPLES = 10_000
_PATIENCE_S = 120.0

Response = drafter_pb2.DraftResponse
Asked = drafter_pb2.DraftRequest.Sequence


class HostileDrafter(drafter_pb2_grpc.DrafterServiceServicer):
    """Welcomes everybody, and answers rounds with what ``answer`` makes of them."""

    def __init__(
        self, answer: Callable[[Any], list[Response]], block_size: int = BLOCK_SIZE
    ) -> None:
        self.num_rounds = 0
        self._answer = answer
        self._block_size = block_size

    async def Draft(self, request_iterator: Any, context: Any) -> None:
        await context.read()
        welcome = Response.Welcome(
            drafter_id="enemy",
            protocol_version=PROTOCOL_VERSION,
            digests=encode_digests(DIGESTS),
            block_size=self._block_size,
            vocab_size=VOCAB_SIZE,
        )
        await context.write(Response(welcome=welcome))
        while (message := await context.read()) is not aio.EOF:
            if message.WhichOneof("message") != "round":
                continue
            self.num_rounds += 1
            for answer in self._answer(message.round):
                await context.write(answer)

    async def Feed(self, request_iterator: Any, context: Any) -> None:
        await context.read()
        credit = drafter_pb2.FeedResponse.Welcome(credit_bytes=1 << 20)
        await context.write(drafter_pb2.FeedResponse(welcome=credit))
        while (message := await context.read()) is not aio.EOF:
            ack = drafter_pb2.FeedResponse.Ack(
                session=message.chunk.session,
                length=message.chunk.start + len(message.chunk.token_ids) - 1,
                credit_bytes=chunk_bytes(message.chunk),
            )
            await context.write(drafter_pb2.FeedResponse(ack=ack))


def answering(proposal: Callable[[Asked], dict[str, Any]]) -> Callable[[Any], list[Response]]:
    """One proposal for each sequence, valid but for what ``proposal`` says."""

    def answer(asked: Any) -> list[Response]:
        proposals = []
        for sequence in asked.sequences:
            count = sequence.num_speculative_tokens
            values = {
                "session": sequence.session,
                "committed_length": sequence.committed_length,
                "outcome": Response.OUTCOME_DRAFTED,
                "draft_token_ids": [random.randrange(VOCAB_SIZE) for _ in range(count)],
                "confidences": [random.random() for _ in range(count)],
            }
            proposals.append(Response.Proposal(**{**values, **proposal(sequence)}))
        return [
            Response(proposals=Response.Proposals(round_id=asked.round_id, proposals=proposals))
        ]

    return answer


def _tensor(count: int, value: float) -> common_pb2.Tensor:
    return encode_tensor(torch.full((count, 2), value).half())


def _law(count: int, value: float) -> dict[str, Any]:
    ids = encode_tensor(torch.zeros(count, 2, dtype=torch.int32))
    return {"draft_prob_token_ids": ids, "draft_prob_values": _tensor(count, value)}


def _endless(asked: Any) -> list[Response]:
    honest = answering(lambda sequence: {})(asked)
    return honest + [Response(proposals=Response.Proposals(round_id=i)) for i in range(5000)]


def _bigger_than_a_message(asked: Any) -> list[Response]:
    huge = common_pb2.Tensor(dtype=1, shape=[20 << 20], data=bytes(80 << 20))
    proposals = [Response.Proposal(draft_prob_values=huge)]
    return [Response(proposals=Response.Proposals(round_id=asked.round_id, proposals=proposals))]


# Those of the first group keep to the protocol: they are used, and must change nothing.
LIARS: dict[str, Callable[[Any], list[Response]]] = {
    "random tokens": answering(lambda sequence: {}),
    "sure of nonsense": answering(lambda s: {"confidences": [1.0] * s.num_speculative_tokens}),
    "never sure": answering(lambda s: {"confidences": [0.0] * s.num_speculative_tokens}),
    "nothing drafted": answering(lambda s: {"draft_token_ids": [], "confidences": []}),
    "always missing": answering(
        lambda s: {
            "outcome": Response.OUTCOME_MISSING,
            "draft_token_ids": [],
            "confidences": [],
            "missing_from": random.randrange(s.committed_length),
        }
    ),
    "knows nobody": answering(
        lambda s: {
            "outcome": Response.OUTCOME_UNKNOWN_SESSION,
            "draft_token_ids": [],
            "confidences": [],
        }
    ),
}
BREAKERS: dict[str, Callable[[Any], list[Response]]] = {
    "NaN": answering(lambda s: {"confidences": [float("nan")] * s.num_speculative_tokens}),
    "infinite": answering(lambda s: {"confidences": [float("inf")] * s.num_speculative_tokens}),
    "negative": answering(lambda s: {"confidences": [-0.5] * s.num_speculative_tokens}),
    "NaN law": answering(lambda s: _law(s.num_speculative_tokens, float("nan"))),
    "negative law": answering(lambda s: _law(s.num_speculative_tokens, -1.0)),
    "ids out of range": answering(
        lambda s: {"draft_token_ids": [VOCAB_SIZE + 2**20] * s.num_speculative_tokens}
    ),
    "huge arrays": answering(
        lambda s: {"draft_token_ids": [1] * 1_000_000, "confidences": [0.5] * 1_000_000}
    ),
    "bigger than a message": _bigger_than_a_message,
    "somebody else's session": answering(
        lambda s: {"session": drafter_pb2.SessionKey(request_id="other", epoch=s.session.epoch)}
    ),
    "former epoch": answering(
        lambda s: {
            "session": drafter_pb2.SessionKey(
                request_id=s.session.request_id, epoch=s.session.epoch - 1
            )
        }
    ),
    "former length": answering(lambda s: {"committed_length": s.committed_length - 1}),
    "endless stream": _endless,
    "welcome again": lambda asked: [Response(welcome=Response.Welcome())],
    "empty": lambda asked: [Response()],
}


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    folder = tmp_path_factory.mktemp("hostile")
    target = save_tiny_target(folder / "target")
    drafter = save_tiny_drafter(folder / "drafter", target)
    return make_config(
        target, drafter, speculative={"draft_timeout_ms": 300, "trust_drafter": False}
    )


@pytest.fixture(scope="module")
def expected(config: ClusterConfig) -> dict[str, list[int]]:
    done = run(make_engine(make_config(config.target.model)), make_requests())
    return {name: c.token_ids for name, c in done.items() if not name.startswith("free")}


def make_requests() -> list[Request]:
    """Greedy, seeded and freely sampled ones."""
    params = {
        "greedy": SamplingParams(temperature=0.0, max_tokens=40),
        "seeded": SamplingParams(temperature=0.9, top_k=30, seed=5, max_tokens=40),
        "free": SamplingParams(temperature=1.0, max_tokens=40),
    }
    return [
        Request(request_id=f"{name}{index}", prompt_token_ids=(index, 9), sampling=sampling)
        for name, sampling in params.items()
        for index in range(2)
    ]


@contextmanager
def hostile(
    loop: LoopThread,
    config: ClusterConfig,
    answer: Callable[[Any], list[Response]],
    *,
    block_size: int = BLOCK_SIZE,
    state: str = "ready",
) -> Iterator[tuple[HostileDrafter, GrpcDraftClient]]:
    """A replica's client of such a drafter, once it is in this state."""
    enemy = HostileDrafter(answer, block_size)

    async def start() -> tuple[aio.Server, int]:
        server = aio.server(options=server_options(256 << 20))
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(enemy, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = loop.run(start())
    assert config.speculative is not None
    client = GrpcDraftClient(
        replica_id="replica",
        digests=DIGESTS,
        vocab_size=VOCAB_SIZE,
        config=config.speculative,
    )
    try:
        client.set_drafters([("enemy", f"127.0.0.1:{port}")])
        assert wait_for(lambda: [drafter.state for drafter in client.status()] == [state])
        yield enemy, client
    finally:
        client.close()
        with suppress(asyncio.CancelledError):
            loop.run(server.stop(0))


def check(done: dict[str, Completion], expected: dict[str, list[int]]) -> None:
    for name, completion in done.items():
        assert completion.error is None, name
        assert len(completion.token_ids) == 40, name
    assert {name: done[name].token_ids for name in expected} == expected


def _params(cases: dict[str, Any], *fast: str) -> list[Any]:
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in cases]


@pytest.mark.parametrize("name", _params(LIARS, "random tokens"))
def test_lies_change_no_output(
    loop: LoopThread, config: ClusterConfig, expected: dict[str, list[int]], name: str
) -> None:
    with hostile(loop, config, LIARS[name]) as (enemy, client):
        engine = make_engine(config, client)
        deadline = time.monotonic() + _PATIENCE_S
        while enemy.num_rounds < 10:
            assert time.monotonic() < deadline, "the engine asks for nothing"
            check(run(engine, make_requests()), expected)
        assert client.stats.num_malformed == 0


@pytest.mark.parametrize("name", _params(BREAKERS, "NaN", "huge arrays", "endless stream"))
def test_broken_protocol_changes_no_output(
    loop: LoopThread, config: ClusterConfig, expected: dict[str, list[int]], name: str
) -> None:
    with hostile(loop, config, BREAKERS[name]) as (enemy, client):
        engine = make_engine(config, client)
        deadline = time.monotonic() + _PATIENCE_S
        while enemy.num_rounds == 0 or client.status()[0].state == "ready":
            assert time.monotonic() < deadline, "the drafter is still trusted with rounds"
            check(run(engine, make_requests()), expected)
        # Nothing of it is used any more, and requests go on.
        check(run(engine, make_requests()), expected)
        stats = client.stats
        assert stats.num_malformed + stats.num_lost + stats.num_late > 0


@pytest.mark.parametrize("size", [-1, 0, 129, 20_000, 2**31 - 1])
def test_an_impossible_block_is_refused_and_costs_nothing(
    loop: LoopThread, config: ClusterConfig, expected: dict[str, list[int]], size: int
) -> None:
    liar = LIARS["random tokens"]
    with hostile(loop, config, liar, block_size=size, state="quarantined") as (enemy, client):
        assert "block_size must be from 1 to 128" in client.status()[0].reason
        assert client.block_size == 0
        check(run(make_engine(config, client), make_requests()), expected)
        assert enemy.num_rounds == 0


def test_the_largest_block_stops_no_request(
    loop: LoopThread, config: ClusterConfig, expected: dict[str, list[int]]
) -> None:
    with hostile(loop, config, LIARS["random tokens"], block_size=128) as (enemy, client):
        assert client.block_size == 128
        check(run(make_engine(config, client), make_requests()), expected)
        assert enemy.num_rounds > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sampled_outputs_keep_the_targets_law(tmp_path: Path) -> None:
    case = Case("hostile", SamplingParams(temperature=1.1))
    target, drafter = save_pair(tmp_path)
    samples = generate(
        target,
        drafter,
        [case],
        num_samples=NUM_LAW_SAMPLES,
        fault=Fault.HOSTILE,
        trust_drafter=False,
        scheduler="prefix",
        online_calibration=False,
    )[case.name]
    assert samples.num_draft_tokens > NUM_LAW_SAMPLES / 2  # verified, not just left alone
    assert law_p_value(samples.tokens, target_law(target, case.params)) > 1e-3
