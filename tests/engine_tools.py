"""Small engines for tests: in this process, or cut over several processes."""

from __future__ import annotations

import multiprocessing
import traceback
from dataclasses import dataclass, field
from typing import Any

from cluster.config import ClusterConfig
from cluster.engine.draft_client import DraftClient
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.engine import Engine
from cluster.engine.local_drafter import LocalDraftClient
from cluster.engine.worker import ShardWorker
from cluster.request import FinishReason, Request, TokenSource, Usage

# Models for tests are so small that speculating would hardly ever pay.
ALWAYS = {"scheduler": "full", "switching": "always", "grouping": "off"}


@dataclass
class Completion:
    """Everything one request produced."""

    token_ids: list[int] = field(default_factory=list)
    token_sources: list[TokenSource] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None


def serve_document(config: ClusterConfig) -> dict[str, Any]:
    """A Serve configuration of it without HTTP, for ``RunningCluster``."""
    application = {
        "name": "dspark",
        "import_path": "cluster.actors.app:build",
        "route_prefix": None,
        "args": config.model_dump(mode="json", exclude_unset=True),
    }
    return {"proxy_location": "Disabled", "applications": [application]}


def make_config(target: str, drafter: str | None = None, **overrides: Any) -> ClusterConfig:
    """A configuration for tests; ``overrides`` go to the target, ``speculative`` to speculation.

    There is speculation when ``drafter`` (a DSpark folder, but for what ``speculative`` says) is
    given, or ``speculative``: of whole blocks and all the time, unless that says otherwise.
    """
    speculative = overrides.pop("speculative", {})
    values: dict[str, Any] = {
        # Compilation takes longer than most tests.
        "target": {
            "model": target,
            "dtype": "float32",
            "num_threads": 1,
            "enforce_eager": True,
            **overrides,
        },
        "drafter": {"dtype": "float32", "enforce_eager": True},
    }
    if drafter is not None:
        speculative = {"method": "dspark", "model": drafter, **speculative}
    if speculative:
        values["speculative"] = {**ALWAYS, **speculative}
    return ClusterConfig.parse(values)


def make_draft_client(config: ClusterConfig) -> DraftClient | None:
    """The configured drafter inside this process."""
    if config.speculative is None:
        return None
    return LocalDraftClient(build_draft_engine(config))


def make_engine(config: ClusterConfig, draft_client: DraftClient | None = None) -> Engine:
    """An engine of one shard; ``draft_client`` unset: the configured drafter, in this process."""
    worker = ShardWorker(config, 0)
    worker.start("", 0, 0)
    return worker.build_engine(draft_client or make_draft_client(config))


def run(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    """Serves all requests at once to their ends, and checks that no page leaked."""
    completions = {request.request_id: Completion() for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            completion = completions[output.request_id]
            assert output.token_offset == len(completion.token_ids) + len(
                next(r for r in requests if r.request_id == output.request_id).resume_token_ids
            )
            completion.token_ids += output.token_ids
            completion.token_sources += output.token_sources
            completion.logprobs += output.logprobs
            completion.finish_reason = output.finish_reason
            completion.usage = output.usage
            completion.error = output.error
    engine.check()
    assert engine.load().kv_cache_usage == 0.0
    return completions


def run_sharded(config: ClusterConfig, requests: list[Request]) -> dict[str, Completion]:
    """Like ``run``, with every shard in a process of its own, as the actors do it."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    ports: Any = context.Queue()
    num_shards = config.target.num_shards
    processes = [
        context.Process(target=_shard, args=(config, rank, requests, ports, results))
        for rank in range(num_shards)
    ]
    for process in processes:
        process.start()
    try:
        outcomes = dict(results.get(timeout=240) for _ in range(num_shards))
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    for rank, outcome in outcomes.items():
        if isinstance(outcome, str):
            raise RuntimeError(f"shard {rank}: {outcome}")
    completions: dict[str, Completion] = outcomes[0]
    return completions


def _shard(
    config: ClusterConfig, rank: int, requests: list[Request], ports: Any, results: Any
) -> None:
    try:
        worker = ShardWorker(config, rank)
        if rank == 0:
            port = worker.open_rendezvous("127.0.0.1")
            for _ in range(config.target.num_shards - 1):
                ports.put(port)
        else:
            port = ports.get(timeout=240)
        worker.start("127.0.0.1", port, 1)
        if rank > 0:
            worker.follow()
            results.put((rank, None))
        else:
            engine = worker.build_engine(make_draft_client(config))
            completions = run(engine, requests)
            mesh = worker._mesh
            if mesh is not None:
                assert len(mesh._pending) <= mesh._max_pending  # sends are freed as it runs
            engine.close()
            results.put((rank, completions))
        worker.close()
    except Exception:
        results.put((rank, traceback.format_exc()))
