"""Traces of a production service: when requests come and how long they are."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from cluster.errors import DataError

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_FIRST_LINE = 2  # behind the names of the columns


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: seconds from the trace's first one, and its lengths in tokens."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def read_trace(path: str, count: int) -> list[Arrival]:
    """The first ``count`` requests of a CSV in the form of the Azure LLM inference traces.

    Raises:
        DataError: naming file and line: it cannot be read, or has nothing in it.
    """
    arrivals: list[Arrival] = []
    start: datetime | None = None
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(path, 1, f"has no column {missing[0]}")
            for line, row in enumerate(reader, start=_FIRST_LINE):
                if len(arrivals) == count:
                    break
                time, prompt, output = _parse(path, line, row)
                start = start or time
                arrivals.append(Arrival((time - start).total_seconds(), prompt, output))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, None, f"cannot be read: {error}") from None
    if not arrivals:
        raise DataError(path, None, "has no request")
    return arrivals


def scale_lengths(arrivals: Sequence[Arrival], context: int) -> list[Arrival]:
    """Shrinks all lengths by one factor, so that the longest request fills ``context`` (>= 3).

    Requests that fit as they are stay as they are. No length becomes less than 2 prompt tokens or
    1 output token.
    """
    longest = max(a.num_prompt_tokens + a.num_output_tokens for a in arrivals)
    factor = min(1.0, context / longest)
    scaled = []
    for arrival in arrivals:
        prompt = max(2, int(arrival.num_prompt_tokens * factor))
        output = min(max(1, int(arrival.num_output_tokens * factor)), context - prompt)
        if output < 1:
            prompt, output = context - 1, 1
        scaled.append(replace(arrival, num_prompt_tokens=prompt, num_output_tokens=output))
    return scaled


def scale_rate(arrivals: Sequence[Arrival], requests_per_second: float) -> list[Arrival]:
    """Stretches time evenly, so that there are so many requests a second on average."""
    span_s = arrivals[-1].arrival_s
    factor = (len(arrivals) - 1) / requests_per_second / span_s if span_s > 0 else 0.0
    return [replace(arrival, arrival_s=arrival.arrival_s * factor) for arrival in arrivals]


def _parse(path: str, line: int, row: dict[str, str]) -> tuple[datetime, int, int]:
    try:
        # The traces have seven decimals; datetime knows six.
        time = datetime.fromisoformat(row[_COLUMNS[0]][:26])
        prompt, output = int(row[_COLUMNS[1]]), int(row[_COLUMNS[2]])
    except (ValueError, TypeError) as error:
        raise DataError(path, line, str(error)) from None
    if prompt < 0 or output < 0:
        raise DataError(path, line, "has a negative length")
    return time, prompt, output
