"""Measures what a pass costs, over real batch sizes, when an engine starts."""

from __future__ import annotations

import time

import numpy as np

from cluster.config import TargetConfig
from cluster.engine.runner import Runner
from cluster.engine.step_input import StepInput

_REPEATS = 2
_MAX_DETERMINISTIC_TOKENS = 16  # one pass a token: the curve is a straight line


def profile_verify_curve(runner: Runner, config: TargetConfig) -> dict[int, float]:
    """Times passes of 1, 2, 4, ... tokens; the first run of each size warms up and is not counted.

    Everything is read from and written to page 0, which no request ever holds.

    Returns:
        Seconds of the fastest of the counted runs, by number of tokens.
    """
    curve: dict[int, float] = {}
    largest = min(config.max_num_batched_tokens, config.max_num_seqs * config.page_size)
    if config.deterministic:
        largest = min(largest, _MAX_DETERMINISTIC_TOKENS)
    size = 1
    while size <= largest:
        step = _dummy_step(size, config)
        seconds = []
        for _ in range(1 + _REPEATS):
            start = time.perf_counter()
            runner.launch(step)
            runner.collect()
            seconds.append(time.perf_counter() - start)
        curve[size] = min(seconds[1:])
        size *= 2
    return curve


def _dummy_step(num_tokens: int, config: TargetConfig) -> StepInput:
    """``num_tokens`` tokens in as many sequences as may run at once, all on page 0."""
    num_sequences = min(num_tokens, config.max_num_seqs)
    lengths = np.full(num_sequences, num_tokens // num_sequences, dtype=np.int64)
    lengths[: num_tokens % num_sequences] += 1
    positions = np.concatenate([np.arange(length) for length in lengths])
    return StepInput(
        token_ids=np.zeros(num_tokens, dtype=np.int64),
        positions=positions,
        slots=positions.copy(),
        query_lens=lengths,
        context_lens=lengths,
        block_tables=np.zeros((num_sequences, 1), dtype=np.int64),
        logit_rows=np.arange(num_tokens),
    )
