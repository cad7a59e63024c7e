"""What became of one verified proposal: the raw material of calibration and evaluation."""

from __future__ import annotations

from typing import NamedTuple

COUPLED = "coupled"
REJECTION = "rejection"
VERIFIERS = (COUPLED, REJECTION)

# By the largest temperature of each; acceptance and confidence differ between them.
_BUCKETS = ((0.0, "greedy"), (0.5, "low"), (0.85, "medium"), (float("inf"), "high"))
BUCKETS = tuple(name for _, name in _BUCKETS)


class CalibrationKey(NamedTuple):
    """What a fit of temperatures is for: a verifier and a range of sampling temperatures.

    Buckets: ``greedy`` (0), ``low`` (to 0.5), ``medium`` (to 0.85) and ``high``.
    """

    verifier: str
    bucket: str


class VerificationRecord(NamedTuple):
    """One verified proposal, k of whose tokens were admitted.

    Attributes:
        key: its verifier (greedy counts as coupled) and temperature bucket.
        request_id: whose it was; proposals of one request are not independent.
        block_size: drafted tokens of the proposal, at least k; 0 where the drafter had nothing to
            propose.
        confidences: k raw confidences, as the drafter sent them.
        num_accepted_tokens: accepted by the verifier, 0 to k, also where the request then ended
            inside the block.
        acceptance: with rejection the exact chance of acceptance of each of the k tokens given
            the drafted ones before it, sum over x of min(p(x), q(x)); empty with coupled.
    """

    key: CalibrationKey
    request_id: str
    block_size: int
    confidences: tuple[float, ...]
    num_accepted_tokens: int
    acceptance: tuple[float, ...] = ()


def temperature_bucket(temperature: float) -> str:
    """The bucket of a sampling temperature (0 or more)."""
    return next(name for largest, name in _BUCKETS if temperature <= largest)


def calibration_key(temperature: float, *, is_seeded: bool) -> CalibrationKey:
    """The key of a request: greedy and seeded ones are verified coupled, others by rejection."""
    verifier = COUPLED if is_seeded or temperature == 0 else REJECTION
    return CalibrationKey(verifier, temperature_bucket(temperature))
