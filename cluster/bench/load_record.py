"""What a load run saw of each request, and the figures of it.

Terms: *time to first token* (TTFT) is from sending a request to its first token; *inter-token
latency* (ITL) is from one token to the next, where the m tokens of one piece share the time since
the piece before it equally; *tokens per second per user* is the rate of one request behind its
first piece; *throughput* is output tokens of all requests per second of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.request import SpeculationStats

_PERCENTILES = (50, 95, 99)
_DIGITS = 4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request, as its client saw it.

    Attributes:
        started_s: when it was sent; as all times of one clock.
        times_s: when each piece of the answer came.
        num_tokens: output tokens of each piece.
        stats: of its speculation, where the server tells.
        error: why it did not finish; unset: it did.
    """

    started_s: float
    times_s: tuple[float, ...]
    num_tokens: tuple[int, ...]
    stats: SpeculationStats | None = None
    error: str | None = None

    @property
    def first_token_s(self) -> float | None:
        """Time to the first token; ``None`` where there was none."""
        return self.times_s[0] - self.started_s if self.times_s else None

    @property
    def tokens_per_second(self) -> float | None:
        """The rate behind the first piece; ``None`` where nothing came behind it."""
        if len(self.times_s) < 2:
            return None
        return sum(self.num_tokens[1:]) / (self.times_s[-1] - self.times_s[0])

    def token_gaps_s(self) -> list[float]:
        """The latency of each token behind the first piece."""
        gaps: list[float] = []
        for before, now, count in zip(
            self.times_s, self.times_s[1:], self.num_tokens[1:], strict=False
        ):
            gaps += [(now - before) / count] * count
        return gaps


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """All requests of one run.

    Attributes:
        records: in order of their ends.
        started_s, full_until_s: the window: from the start to when the first place stayed empty for
            want of requests, or to the last token of a run that keeps no number of requests active.
    """

    records: tuple[RequestRecord, ...]
    started_s: float
    full_until_s: float

    @property
    def throughput(self) -> float:
        """Output tokens per second within the window."""
        seconds = self.full_until_s - self.started_s
        num_tokens = sum(
            count
            for record in self.records
            for time_s, count in zip(record.times_s, record.num_tokens, strict=True)
            if time_s <= self.full_until_s
        )
        return num_tokens / seconds if seconds > 0 else 0.0

    @property
    def stats(self) -> SpeculationStats | None:
        """Summed over the requests; ``None`` where the server does not tell."""
        told = [record.stats for record in self.records if record.stats is not None]
        if not told:
            return None
        return SpeculationStats(
            num_drafts=sum(stats.num_drafts for stats in told),
            num_draft_tokens=sum(stats.num_draft_tokens for stats in told),
            num_accepted_tokens=sum(stats.num_accepted_tokens for stats in told),
            num_steps=sum(stats.num_steps for stats in told),
        )

    @property
    def first_tokens_s(self) -> list[float]:
        """Times to first token."""
        return [s for record in self.records if (s := record.first_token_s) is not None]

    def figures(self) -> dict[str, Any]:
        """Everything about it, as JSON values; ``None`` where there is nothing to tell."""
        rates = [s for record in self.records if (s := record.tokens_per_second) is not None]
        gaps = [gap for record in self.records for gap in record.token_gaps_s()]
        return {
            "requests": len(self.records),
            "failed": sum(record.error is not None for record in self.records),
            "throughput": round(self.throughput, 2),
            "tokens_per_second_per_user": _round(float(np.median(rates)) if rates else None),
            **_percentiles("ttft_ms", self.first_tokens_s),
            **_percentiles("itl_ms", gaps),
            **speculation_figures(self.stats),
        }


def speculation_figures(stats: SpeculationStats | None) -> dict[str, Any]:
    """Acceptance length, budget (verified guesses a round) and tokens of a target pass."""
    if stats is None or stats.num_steps == 0:
        return {"acceptance_length": None, "budget": None, "tokens_per_pass": None}
    num_drafts = stats.num_drafts
    return {
        "acceptance_length": _round(stats.acceptance_length),
        "budget": _round(stats.num_draft_tokens / num_drafts if num_drafts else 0.0),
        "tokens_per_pass": _round(1 + stats.num_accepted_tokens / stats.num_steps),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    values = np.percentile(seconds, _PERCENTILES) if seconds else [None] * len(_PERCENTILES)
    return {
        f"{name}_p{percentile}": _round(None if value is None else 1e3 * float(value))
        for percentile, value in zip(_PERCENTILES, values, strict=True)
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
