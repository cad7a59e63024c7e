"""How long a router takes to choose among many replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cluster.routing.page_digests import PrefixLayout, prefix_keys
from cluster.routing.prefix_journal import PrefixChanges
from cluster.routing.replica_loads import ReplicaLoad
from cluster.routing.replica_picker import Prompt, ReplicaPicker

_LAYOUT = PrefixLayout(page_size=16, stride=1)
_SYSTEM_TOKENS = 512
_PROMPTS_A_REPLICA = 10
_CHANGES = 64
_ROUNDS = 5


def measure_picks(num_replicas: int, num_prompts: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Times the choice for prompts of 700 to 4,000 tokens that begin alike, each held by some
    replicas; every replica is ready and has another load.

    Returns:
        ``pick_us`` and ``pick_p99_us``: filter, score and pick, prefixes looked up; ``digest_us``:
        a prompt's digests, once a request; ``sent_us``: taking the choice down; ``report_us``:
        a replica's report with 64 pages gained and 64 lost. Medians of wall time, of the choice
        the least of five.
    """
    rng = np.random.default_rng(seed)
    system = rng.integers(0, 50_000, _SYSTEM_TOKENS).tolist()
    prompts = [
        Prompt([*system, *rng.integers(0, 50_000, rng.integers(200, 3500)).tolist()], 100)
        for _ in range(num_prompts)
    ]
    digests_s = _times(lambda p: prefix_keys(p.token_ids, _LAYOUT), prompts)
    picker = ReplicaPicker(seed=seed)
    for _ in range(num_replicas):
        slot = picker.add()
        picker.connect(slot, _LAYOUT)
        held = rng.choice(num_prompts, min(_PROMPTS_A_REPLICA, num_prompts), replace=False).tolist()
        keys = dict.fromkeys(key for index in held for key in prompts[index].keys(_LAYOUT))
        picker.report(
            slot,
            ReplicaLoad(float(rng.integers(0, 3000)), float(rng.integers(5000, 500_000))),
            num_counted=0,
            prefixes=PrefixChanges(0, True, tuple(keys)),
        )
    # The least of several medians: what other processes take is not the router's.
    picks_s = min((_times(picker.pick, prompts) for _ in range(_ROUNDS)), key=np.median)
    picked = [(picker.pick(prompt) or 0, str(n), prompt) for n, prompt in enumerate(prompts)]
    sent_s = _times(lambda sent: picker.sent(*sent), picked)
    fresh = rng.integers(0, 2**63, (num_prompts + 1, _CHANGES)).tolist()
    reports = [
        (
            index % num_replicas,
            PrefixChanges(0, False, tuple(fresh[index]), tuple(fresh[index - 1])),
        )
        for index in range(num_prompts)
    ]
    reports_s = _times(
        lambda r: picker.report(r[0], ReplicaLoad(100.0, 1e5), num_counted=0, prefixes=r[1]),
        reports,
    )
    return {
        "pick_us": _median_us(picks_s),
        "pick_p99_us": round(float(np.quantile(picks_s, 0.99)) * 1e6, 1),
        "digest_us": _median_us(digests_s),
        "sent_us": _median_us(sent_s),
        "report_us": _median_us(reports_s),
    }


def _times(call: Callable[[Any], object], arguments: Sequence[Any]) -> list[float]:
    seconds = []
    for argument in arguments:
        started_at = time.perf_counter()
        call(argument)
        seconds.append(time.perf_counter() - started_at)
    return seconds


def _median_us(seconds: Sequence[float]) -> float:
    return round(float(np.median(seconds)) * 1e6, 1)
