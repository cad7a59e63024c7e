"""Broken messages through live sockets: a router with a replica, and a drafter, in this process.

Messages are valid ones with fields or bytes changed, sent as they are: whether protobuf, gRPC or we
refuse them is part of what is tested. On a stream a valid greeting, and often valid rounds, come
first, so that what is broken comes behind a good beginning.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.api.app import create_app
from cluster.bench.fuzz_mutators import mutate_bytes
from cluster.bench.fuzz_surfaces import (
    BLOCK_SIZE,
    HTTP_BODIES,
    MAX_MODEL_LEN,
    SURFACES,
    VOCAB_SIZE,
)
from cluster.config import DrafterConfig
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_ngram import NgramMethod
from cluster.engine.load import EngineLoad
from cluster.request import (
    FinishReason,
    PositionLogprobs,
    Request,
    RequestOutput,
    TokenLogprob,
    TokenSource,
    Usage,
)
from cluster.routing.prefix_journal import PrefixJournal
from cluster.rpc.channels import PROTOCOL_VERSION, open_channel
from cluster.rpc.drafter_server import DrafterServer
from cluster.rpc.raw_call import call_stream, call_unary
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
from cluster.v1 import drafter_pb2

_CALL_TIMEOUT_S = 20.0
_GENERATE = "/cluster.v1.InferenceService/Generate"
_NUM_AT_ONCE = 16
# What is broken ends its stream, and those behind it are not read.
_MESSAGES_PER_STREAM = 3
_SESSION_TTL_S = 0.5
_TOKEN_ID = 97
_CHOSEN = TokenLogprob(_TOKEN_ID, -0.5)


class LiveCounts:
    """What became of the messages that were sent.

    Attributes:
        num_messages: sent.
        outcomes: of calls, as ``cluster.rpc.raw_call`` names them.
        untyped: statuses that no message may cause.
    """

    def __init__(self) -> None:
        self.num_messages = 0
        self.outcomes: Counter[str] = Counter()
        self.untyped: list[str] = []
        self.slowest_s = 0.0


def fuzz_sockets(surface: str, num_messages: int, seed: int) -> dict[str, Any]:
    """Sends that many messages to live servers of a surface: ``client``, ``http`` or ``drafter``.

    Returns:
        The figures of it; ``failures`` names what must not be.
    """
    run = {"client": _fuzz_router, "http": _fuzz_http, "drafter": _fuzz_drafter}[surface]
    counts = LiveCounts()
    num_threads = threading.active_count()
    memory_mb = _memory_mb()
    started = time.monotonic()
    failures = asyncio.run(run(counts, num_messages, random.Random(seed)))
    failures += counts.untyped[:10]
    if counts.slowest_s > _CALL_TIMEOUT_S:
        failures.append(f"a call took {counts.slowest_s:.1f} s")
    if threading.active_count() > num_threads + 4:  # gRPC keeps a poller and a few workers
        failures.append(f"{threading.active_count() - num_threads} threads are left")
    return {
        "surface": surface,
        "messages": counts.num_messages,
        "outcomes": dict(counts.outcomes),
        "seconds": round(time.monotonic() - started, 1),
        "memory_growth_mb": round(_memory_mb() - memory_mb, 1),
        "failures": failures,
    }


async def _fuzz_router(counts: LiveCounts, num_messages: int, rng: random.Random) -> list[str]:
    _, seeds, mutate = SURFACES["client"].load()
    failures: list[str] = []
    async with _router(failures) as (_, address), open_channel(address) as channel:

        async def call(data: bytes) -> str:
            return await call_unary(channel, _GENERATE, data, timeout_s=_CALL_TIMEOUT_S)

        if (outcome := await call(seeds[0])) != "OK":
            failures.append(f"a valid request ended with {outcome}")

        async def worker(number: int) -> None:
            while counts.num_messages < num_messages:
                counts.num_messages += 1
                await _count(counts, call(_changed(rng, seeds, mutate)))

        await asyncio.gather(*(worker(number) for number in range(_NUM_AT_ONCE)))
        if (outcome := await call(seeds[0])) != "OK":
            failures.append(f"a valid request ended with {outcome} behind the others")
    return failures


async def _fuzz_http(counts: LiveCounts, num_messages: int, rng: random.Random) -> list[str]:
    _, seeds, mutate = SURFACES["http"].load()
    paths = list(HTTP_BODIES)
    failures: list[str] = []
    async with (
        _router(failures) as (router, _),
        _http_server(router) as url,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_CALL_TIMEOUT_S)) as session,
    ):

        async def call(data: bytes) -> str:
            path = paths[data[0] % len(paths)]
            headers = {"content-type": "application/json"}
            async with session.post(url + path, data=data[1:], headers=headers) as response:
                return _http_outcome(response.status, await response.read())

        for seed in seeds:
            if (outcome := await call(seed)) != "200":
                failures.append(f"{seed!r} ended with {outcome}")

        async def worker(number: int) -> None:
            while counts.num_messages < num_messages:
                counts.num_messages += 1
                changed = _changed(rng, seeds, mutate, bytes_mutator=_behind_first)
                await _count(counts, call(changed), changed)

        await asyncio.gather(*(worker(number) for number in range(_NUM_AT_ONCE)))
    return failures


def _http_outcome(status: int, body: bytes) -> str:
    """The status; what no client can read as an error of ours begins with INTERNAL."""
    if status == 200:
        return "200"
    try:
        error = json.loads(body)["error"]
        is_typed = bool(error["message"]) and bool(error["type"]) and status < 500
    except (ValueError, KeyError, TypeError):
        is_typed = False
    return str(status) if is_typed else f"INTERNAL: {status} {body[:300]!r}"


@asynccontextmanager
async def _router(failures: list[str]) -> AsyncGenerator[tuple[RouterServer, str]]:
    """A router, and its gRPC address, with a replica behind it; at the end nothing may be left."""
    replica = ReplicaServer("r", max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)
    loop = _ImmediateLoop(replica.on_outputs)
    router = RouterServer(
        tokenizer=_tokenizer(),
        model_name="fuzz",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        chat_template="chatml",
        eos_token_ids=(2,),
        wait_s=5.0,
    )
    replica_port = await replica.start(loop, "127.0.0.1")
    address = f"127.0.0.1:{await router.start('127.0.0.1')}"
    router.set_replicas([("r", f"127.0.0.1:{replica_port}")])
    try:
        yield router, address
        await asyncio.sleep(0.2)
        if router.num_active_requests or router.num_queued_tokens or replica.num_active_requests:
            failures.append("requests are left")
    finally:
        await router.stop()
        await replica.stop()


@asynccontextmanager
async def _http_server(router: RouterServer) -> AsyncGenerator[str]:
    """The router's HTTP API; yields its URL."""
    config = uvicorn.Config(
        create_app(router),
        host="127.0.0.1",
        port=0,
        log_level="critical",
        timeout_keep_alive=600,  # none is closed while the next request is on its way
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving


async def _fuzz_drafter(counts: LiveCounts, num_messages: int, rng: random.Random) -> list[str]:
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
    failures: list[str] = []
    seeds = _drafter_seeds()
    _, _, mutate = SURFACES["drafter"].load()
    async with open_channel(address) as channel:

        async def stream(number: int) -> str:
            method_name, mark, greet, valid = seeds[rng.choice(sorted(seeds))]
            greeting = greet(f"replica-{number}")
            if rng.random() < 0.1:
                greeting = _changed(rng, [greeting], lambda data, _: data)
            messages = [greeting] + ([valid] if rng.random() < 0.8 else [])
            for _ in range(rng.randint(1, _MESSAGES_PER_STREAM)):
                counts.num_messages += 1
                # The mutator's inputs say in a first byte which message they are.
                changed = _changed(rng, [mark + valid], mutate, bytes_mutator=_behind_first)
                messages.append(changed[1:])
            method = f"/cluster.v1.DrafterService/{method_name}"
            return await call_stream(channel, method, messages, timeout_s=_CALL_TIMEOUT_S)

        async def worker(number: int) -> None:
            while counts.num_messages < num_messages:
                await _count(counts, stream(number))

        await asyncio.gather(*(worker(number) for number in range(_NUM_AT_ONCE)))
        await asyncio.sleep(0.3)
        if server.num_streams:
            failures.append(f"{server.num_streams} streams are left")
        if not server.is_healthy:
            failures.append("the drafter's thread has ended")
    await server.drain(0.1)
    await asyncio.sleep(_SESSION_TTL_S)
    engine.expire()
    engine.check_integrity()
    if engine.num_sessions:
        failures.append(f"{engine.num_sessions} sessions are left")
    return failures


async def _count(counts: LiveCounts, call: Awaitable[str], sent: bytes = b"") -> None:
    started = time.monotonic()
    try:
        outcome = await call
    except TimeoutError:
        outcome = "TIMEOUT"
    except aiohttp.ClientError as error:
        outcome = f"INTERNAL: {error!r}"
    if outcome.startswith(("INTERNAL: ", "TIMEOUT")):
        counts.untyped.append(f"{outcome} {sent!r}")
    counts.outcomes[outcome.partition(":")[0]] += 1
    counts.slowest_s = max(counts.slowest_s, time.monotonic() - started)


def _changed(
    rng: random.Random,
    seeds: Sequence[bytes],
    mutate: Callable[[bytes, random.Random], bytes],
    bytes_mutator: Callable[[bytes, random.Random], bytes] = mutate_bytes,
) -> bytes:
    data = mutate(rng.choice(seeds), rng)
    return bytes_mutator(data, rng) if rng.random() < 0.3 else data


def _behind_first(data: bytes, rng: random.Random) -> bytes:
    return data[:1] + mutate_bytes(data[1:], rng)


def _drafter_seeds() -> dict[str, tuple[str, bytes, Callable[[str], bytes], bytes]]:
    """By kind: the RPC, the mutator's mark, a greeting for a replica, and a valid message."""
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
    return {
        "round": ("Draft", b"\0", greet_draft, valid_round),
        "chunk": ("Feed", b"\1", greet_feed, valid_chunk),
    }


class _ImmediateLoop:
    """An engine that answers every request at once, with one token."""

    def __init__(self, on_outputs: Callable[[Sequence[RequestOutput]], None]) -> None:
        self.prefix_journal = PrefixJournal(num_pages=0, page_size=4)
        self._on_outputs = on_outputs

    def submit(self, request: Request) -> None:
        sampling = request.sampling
        num_tokens = min(sampling.max_tokens, 1)
        position = PositionLogprobs(_CHOSEN, top=(_CHOSEN,))
        num_prompt = len(request.prompt_token_ids)
        output = RequestOutput(
            request_id=request.request_id,
            token_offset=len(request.resume_token_ids),
            token_ids=(_TOKEN_ID,) * num_tokens,
            token_sources=(TokenSource.TARGET,) * num_tokens,
            logprobs=(position,) * (0 if sampling.logprobs is None else num_tokens),
            prompt_logprobs=(position,)
            * (0 if sampling.prompt_logprobs is None else num_prompt - 1),
            finish_reason=FinishReason.LENGTH,
            usage=Usage(prompt_tokens=num_prompt, completion_tokens=num_tokens),
        )
        self._on_outputs([output])

    def cancel(self, request_id: str, error: Exception) -> None:
        """Nothing runs on."""

    def load(self) -> EngineLoad:
        return EngineLoad()


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _memory_mb() -> float:
    """The most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
