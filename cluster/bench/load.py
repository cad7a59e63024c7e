"""Suite ``load``: one server under load, so many requests at once or as a trace has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cluster.bench.arrival_trace import Arrival
from cluster.bench.load_clients import ClusterClient, EngineClient, LoadClient
from cluster.bench.load_generator import open_loop
from cluster.bench.load_prompts import PromptSource
from cluster.bench.load_record import LoadResult
from cluster.bench.load_shape import LoadShape, make_work, run_work
from cluster.bench.local_engine import build_looped_engine
from cluster.bench.openai_client import OpenAIClient
from cluster.bench.own_serving import OwnSettings
from cluster.bench.report import Report
from cluster.config import ClusterConfig
from cluster.engine.target_config import load_tokenizer
from cluster.errors import ConfigError
from cluster.models.checkpoint import target_digest

ENGINE = "engine"
_MAX_ERRORS = 5
_GRPC = "grpc://"
_HTTP = ("http://", "https://")


def client_maker(server: str, own: OwnSettings) -> Callable[[], LoadClient]:
    """What makes the client of a server, in the event loop that it will belong to.

    Args:
        server: ``engine``, ``grpc://HOST:PORT`` (a router of our cluster) or ``http://HOST:PORT``
            (an OpenAI-compatible server).
        own: of the engine.

    Raises:
        ConfigError: it is none of these.
        CheckpointError: the engine's target or drafter cannot be loaded.
    """
    if server == ENGINE:
        config = ClusterConfig.parse(own.values())
        engine = build_looped_engine(config, target_digest=target_digest(config.target.model))
        return partial(EngineClient, engine)
    if server.startswith(_GRPC):
        return partial(ClusterClient, server.removeprefix(_GRPC))
    if server.startswith(_HTTP):
        return partial(OpenAIClient, server)
    raise ConfigError("--server", f"must be engine, grpc://HOST:PORT or http://..., got {server!r}")


def run_closed(server: str, own: OwnSettings, *, shape: LoadShape, data: str) -> Report:
    """Runs every concurrency; passes where no request failed.

    Args:
        server: as ``client_maker``.
        own: what the engine serves; the target's tokenizer makes the prompts in any case.
        shape: of the load.
        data: prompts, as ``load_prompt_set``.

    Raises:
        ConfigError, CheckpointError, DataError: before anything was sent.
        DsparkError: a request of the warm-up failed.
    """
    prompts = PromptSource(
        data,
        load_tokenizer(own.target),
        count=shape.num_prompts(1),
        num_tokens=shape.prompt_tokens,
    )
    results = run_work(client_maker(server, own), *make_work(prompts, shape))
    rows = [
        {"concurrency": concurrency, **result.figures()} for concurrency, result in results.items()
    ]
    return _report(server, rows, list(results.values()))


def run_trace(
    server: str,
    own: OwnSettings,
    *,
    arrivals: Sequence[Arrival],
    data: str,
    temperature: float,
) -> Report:
    """Sends requests when the trace has them; passes where none failed.

    Args:
        arrivals: of lengths that the server takes.
        server, own, data: as ``run_closed``.

    Raises:
        ConfigError, CheckpointError, DataError: before anything was sent.
    """
    prompt_tokens = [arrival.num_prompt_tokens for arrival in arrivals]
    prompts = PromptSource(
        data, load_tokenizer(own.target), count=len(arrivals), num_tokens=max(prompt_tokens)
    )
    requests = prompts.requests(
        [arrival.num_output_tokens for arrival in arrivals], prompt_tokens, temperature
    )
    make_client = client_maker(server, own)

    async def run() -> LoadResult:
        client = make_client()
        try:
            return await open_loop(client, requests, [arrival.arrival_s for arrival in arrivals])
        finally:
            await client.close()

    result = asyncio.run(run())
    span_s = arrivals[-1].arrival_s
    rate = round((len(arrivals) - 1) / span_s, 3) if span_s > 0 else None
    return _report(server, [{"requests_per_second": rate, **result.figures()}], [result])


def _report(server: str, rows: list[dict[str, Any]], results: list[LoadResult]) -> Report:
    errors = dict.fromkeys(
        record.error for result in results for record in result.records if record.error is not None
    )
    return Report(
        suite="load",
        figures={"server": server, "rows": rows, "errors": list(errors)[:_MAX_ERRORS]},
        passed=not errors,
    )
