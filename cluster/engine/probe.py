"""Drafting for a few sequences while nothing else is drafted, to see what it would bring."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.engine.sequence import Sequence

_MAX_SEQUENCES = 4


def probe_members(sequences: Iterable[Sequence]) -> set[Sequence]:
    """The shortest of ``sequences``: a drafter needs the features of all their tokens."""
    able = [
        s
        for s in sequences
        if s.num_missing_tokens == 1 and not s.request.speculation.is_off and s.room > 1
    ]
    return set(sorted(able, key=lambda s: s.num_computed_tokens)[:_MAX_SEQUENCES])
