"""Suite ``verify_curve``: does the curve say what mixed batches take?

A target's curve is measured as ``dspark profile`` does it, and so are random batches as serving has
them: sequences that decode with or without guesses at contexts of 50 to 900 tokens, with or without
a prompt's chunk beside them. The same batches are predicted from batch tokens alone, and from batch
tokens and context. Points and batches are measured in turn, each several times, and the least
counts; a factor common to all batches is divided out, as the cost model learns it while serving.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.bench.report import Report
from cluster.config import ClusterConfig
from cluster.engine.local_shards import local_shards
from cluster.engine.pages import PagePool
from cluster.engine.profile import BLOCK_TOKENS, BatchShape, CurveProfiler, StepProbe
from cluster.speculation.verify_curve import VerifyCurve

_MAX_SEQS = 16
_MAX_MODEL_LEN = 1024
_CONTEXTS = (50, 900)
_MAX_CHUNK = 128
_TURNS = 5

Floats = npt.NDArray[np.float64]


def run(*, target: str, num_batches: int = 60, seed: int = 0) -> Report:
    """Runs the suite; passes where the context makes the predictions better."""
    config = ClusterConfig.parse(
        {
            "target": {
                "model": target,
                "dtype": "float32",
                "num_threads": torch.get_num_threads(),
                "max_num_seqs": _MAX_SEQS,
                "max_model_len": _MAX_MODEL_LEN,
                "max_num_batched_tokens": 256,
                "enforce_eager": True,
            }
        }
    )
    batches = random_batches(num_batches, seed)
    measured = np.full(num_batches, np.inf)
    with local_shards(config) as runner:
        shard = runner.shard
        pages = PagePool(shard.num_pages, shard.page_size, shard.cache.release)
        probe = StepProbe(runner, pages, config.target, min(_MAX_MODEL_LEN, shard.max_model_len))
        profiler = CurveProfiler(probe)
        probe.warm_up()
        for _ in range(_TURNS):
            curve = profiler.profile_all(repeats=1)
            seconds = [probe.measure(batch) for batch in batches]
            measured = np.minimum(measured, seconds)
    tokens = np.array([sum(batch.query_lens) for batch in batches])
    contexts = np.array([sum(batch.cached_lens) for batch in batches])
    alone = VerifyCurve.of_tokens(dict(zip(curve.tokens, curve.table[:, 0], strict=True)))
    without = _errors(alone.seconds(tokens), measured)
    predicted = [float(curve.seconds(*size)) for size in zip(tokens, contexts, strict=True)]
    with_context = _errors(np.array(predicted), measured)
    return Report(
        suite="verify_curve",
        figures={
            "batches": num_batches,
            "step_ms": {
                "least": round(1e3 * float(measured.min()), 3),
                "most": round(1e3 * float(measured.max()), 3),
            },
            "error_by_tokens": _summary(without),
            "error_by_tokens_and_context": _summary(with_context),
        },
        passed=bool(np.median(with_context) < np.median(without)),
    )


def random_batches(count: int, seed: int) -> list[BatchShape]:
    """Batches as serving has them; the chunk of a prompt is the last sequence."""
    generator = random.Random(seed)
    batches = []
    for _ in range(count):
        size = generator.choice([1, 2, 4, 8, 12, _MAX_SEQS - 1])
        block = generator.choice([1, BLOCK_TOKENS // 2, BLOCK_TOKENS])
        typical = generator.uniform(*_CONTEXTS)
        query_lens = [block] * size
        cached_lens = [int(typical * generator.uniform(0.8, 1.1)) for _ in range(size)]
        if generator.random() < 0.4:
            query_lens.append(generator.randint(1, _MAX_CHUNK))
            cached_lens.append(generator.choice([0, 128, 512]))
        batches.append(BatchShape(tuple(query_lens), tuple(cached_lens)))
    return batches


def _errors(predicted: Floats, measured: Floats) -> Floats:
    """Relative errors, a common factor aside."""
    ratio = predicted / measured
    return np.asarray(np.abs(ratio / np.median(ratio) - 1.0))


def _summary(errors: Floats) -> dict[str, Any]:
    return {
        "median": round(float(np.median(errors)), 4),
        "p90": round(float(np.quantile(errors, 0.9)), 4),
    }
