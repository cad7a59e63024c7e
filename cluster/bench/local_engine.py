"""An engine and its drafter in this process, and running requests on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from cluster.config import ClusterConfig
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.drafter_calibration import load_drafter_calibration
from cluster.engine.engine import Engine
from cluster.engine.local_drafter import LocalDraftClient
from cluster.engine.worker import ShardWorker
from cluster.request import Request, RequestOutput
from cluster.speculation.calibration import Calibration


def local_config(
    target: str,
    speculative: dict[str, Any] | None,
    *,
    max_num_seqs: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
) -> ClusterConfig:
    """One shard, and the drafter that ``speculative`` names, as the configuration would.

    Whole blocks of all sequences fit in one pass.

    Raises:
        ConfigError: ``speculative`` has a bad value.
    """
    values: dict[str, Any] = {
        "target": {
            "model": target,
            "dtype": dtype,
            "device": device,
            "num_threads": torch.get_num_threads(),
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(512, 16 * max_num_seqs),
        },
        "drafter": {"dtype": dtype, "device": device, "num_threads": torch.get_num_threads()},
    }
    for part in ("target", "drafter"):  # compiling takes longer than what these engines are for
        values[part]["enforce_eager"] = device == "cpu"
    if speculative is not None:
        # What is evaluated is the drafter, and not whether it pays on this machine.
        always = {"scheduler": "full", "switching": "always", "grouping": "off"}
        values["speculative"] = {**always, **speculative}
    return ClusterConfig.parse(values)


def build_local_engine(
    config: ClusterConfig,
    seed: int | None = None,
    *,
    target_digest: str | None = None,
    calibration: Calibration | None = None,
) -> Engine:
    """The engine of one shard with its drafter beside it.

    Args:
        seed: of every random stream; unset: fresh ones.
        target_digest: with it the verify curve of an earlier start is used, and one is kept.
        calibration: of the drafter; unset: the one beside its checkpoint.

    Raises:
        CheckpointError: target or drafter cannot be loaded, or do not fit each other.
        ConfigError: they cannot be served as configured.
    """
    worker = ShardWorker(config, 0)
    worker.start("", 0, 0)
    if config.speculative is None:
        return worker.build_engine(None, target_digest=target_digest, seed=seed)
    return worker.build_engine(
        LocalDraftClient(build_draft_engine(config, seed=seed)),
        target_digest=target_digest,
        calibration=load_drafter_calibration(config) if calibration is None else calibration,
        seed=seed,
    )


def build_looped_engine(config: ClusterConfig, *, target_digest: str | None = None) -> Engine:
    """As ``build_local_engine``, for an ``EngineLoop``.

    It is built in a thread that ends with that: OpenMP's workers of a thread that has computed and
    goes on living would slow down the loop's (``cluster.actors.own_thread``).
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        build = partial(build_local_engine, config, target_digest=target_digest)
        return executor.submit(build).result()


def run_requests(
    engine: Engine,
    requests: Iterable[Request],
    on_output: Callable[[RequestOutput], None],
    *,
    max_active: int,
) -> None:
    """Runs requests to their ends, at most ``max_active`` (1 or more) at once, in order.

    ``requests`` is asked for the next one when there is room for it, so it may stop early.

    Raises:
        DsparkError: the error of the first request that ended with one.
    """
    queue = iter(requests)
    num_active = 0
    is_exhausted = False
    while num_active or not is_exhausted:
        while num_active < max_active and not is_exhausted:
            request = next(queue, None)
            is_exhausted = request is None
            if request is not None:
                engine.add_request(request)
                num_active += 1
        for output in engine.step():
            if output.error is not None:
                raise output.error
            num_active -= output.is_last
            on_output(output)


def run_together(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """Runs requests all at once; output tokens by request id. Raises: as ``run_requests``."""
    token_ids: dict[str, list[int]] = {request.request_id: [] for request in requests}

    def take(output: RequestOutput) -> None:
        token_ids[output.request_id] += output.token_ids

    run_requests(engine, requests, take, max_active=max(len(requests), 1))
    return token_ids
