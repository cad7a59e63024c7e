"""How many target replicas there should be."""

from __future__ import annotations

import pytest

from cluster.routing.target_scaling import TargetLoad, TargetPolicy, TargetTiming

_TIMING = TargetTiming(target_load=0.5, tolerance=0.1, up_s=2.0, down_s=10.0)


def _run(
    policy: TargetPolicy,
    current: int,
    seconds: int,
    *,
    requests: int,
    usage: float = 0.0,
    start: float = 0.0,
) -> int:
    for second in range(seconds):
        loads = [TargetLoad(kv_cache_usage=usage) for _ in range(current)]
        current = policy.decide(
            loads, num_requests=requests, current=current, now=start + float(second)
        )
    return current


def test_replicas_follow_requests_after_their_dwell() -> None:
    policy = TargetPolicy(1, 10, 16, _TIMING)
    assert _run(policy, 1, 2, requests=32) == 1
    assert _run(policy, 1, 2, requests=32, start=2.0) == 4  # of 8 requests each
    assert _run(policy, 4, 9, requests=8, start=10.0) == 4
    assert _run(policy, 4, 5, requests=8, start=19.0) == 1


def test_pages_count_as_places_do() -> None:
    policy = TargetPolicy(1, 10, 16, _TIMING)
    assert _run(policy, 2, 3, requests=1, usage=0.9) == 4


def test_what_is_close_enough_stays() -> None:
    policy = TargetPolicy(1, 10, 16, _TIMING)
    assert _run(policy, 10, 60, requests=76) == 10
    assert _run(policy, 10, 60, requests=72) == 10
    assert _run(TargetPolicy(1, 10, 16, _TIMING), 9, 60, requests=76) == 9


def test_waiting_requests_that_no_replica_has_are_counted() -> None:
    policy = TargetPolicy(1, 10, 16, _TIMING)
    loads = [TargetLoad(num_requests=16)]
    for now in (0.0, 3.0):
        wanted = policy.decide(loads, num_requests=64, current=1, now=now)
    assert wanted == 8


def test_bounds() -> None:
    assert _run(TargetPolicy(2, 3, 16, _TIMING), 1, 3, requests=0) == 2
    assert _run(TargetPolicy(1, 3, 16, _TIMING), 1, 5, requests=1000) == 3
    with pytest.raises(ValueError, match="bounds"):
        TargetPolicy(0, 3, 16)
