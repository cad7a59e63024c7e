"""Measures what a drafter's passes cost, at its start."""

from __future__ import annotations

import time

import torch

from cluster.engine.draft_client import DraftRound, DraftSampling, DraftSequence, SessionKey
from cluster.engine.draft_engine import DraftEngine
from cluster.speculation.draft_curve import DraftCurve

_REPLICA_ID = "profile"
_SESSIONS = (1, 4, 16, 64)
_CONTEXT = 32
_REPEATS = 3
_LONGEST_S = 1.0


def measure_draft_curve(engine: DraftEngine, *, longest_s: float = _LONGEST_S) -> DraftCurve:
    """The engine's passes for 1 to 64 sessions, for one token each and for whole blocks.

    Sessions are of its own making and forgotten again. Noise only ever adds time, so the least of
    three passes counts. No larger size is begun behind ``longest_s``.

    Args:
        engine: has no sessions yet, and is used by nobody else meanwhile.
    """
    tokens = sorted({1, engine.block_size})
    sizes: list[int] = []
    table: list[list[float]] = []
    start = time.monotonic()
    for size in _SESSIONS:
        if sizes and (size > engine.max_sessions or time.monotonic() - start > longest_s):
            break
        sequences = _open(engine, size)
        row = [_seconds(engine, sequences, count) for count in tokens]
        engine.drop_replica(_REPLICA_ID)
        sizes.append(size)
        table.append(row)
    return DraftCurve.fit(sizes, tokens, table)


def _open(engine: DraftEngine, size: int) -> list[SessionKey]:
    sampling = DraftSampling(temperature=0.0)
    keys = [SessionKey(f"{index}", 0) for index in range(size)]
    features = torch.zeros(_CONTEXT, engine.feature_size)
    for key in keys:
        engine.open(_REPLICA_ID, key, sampling)
        engine.append(_REPLICA_ID, key, 0, features, [0] * (_CONTEXT + 1))
    return keys


def _seconds(engine: DraftEngine, keys: list[SessionKey], num_tokens: int) -> float:
    """Least time of some rounds, behind one that warms up."""
    times = []
    for _ in range(1 + _REPEATS):
        sequences = []
        for key in keys:
            length = engine.length_of(_REPLICA_ID, key)
            if length is not None:  # else memory holds no more sessions than these
                sequences.append(
                    DraftSequence(
                        session=key,
                        committed_length=length + 2,
                        num_features=1,
                        new_token_ids=(0, 0),
                        num_speculative_tokens=num_tokens,
                    )
                )
        features = torch.zeros(len(sequences), engine.feature_size)
        start = time.monotonic()
        engine.draft([(_REPLICA_ID, DraftRound(tuple(sequences), features))])
        times.append(time.monotonic() - start)
    return min(times[1:])
