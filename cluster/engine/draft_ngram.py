"""Prompt lookup: drafting by what followed the last tokens when they were seen before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluster.config import DrafterConfig
from cluster.engine.draft_method import Draft, DraftRows, num_pages_within, page_slots
from cluster.speculation.proposal import DraftProposal

# A round looks at no more tokens than these, however long the context is.
MAX_LOOKUP_TOKENS = 32_768
_PAGE_SIZE = 256


class NgramMethod:
    """A ``DraftMethod`` without any model (prompt lookup; Saxena, 2023).

    The longest run of the last tokens, ``max_match`` down to ``min_match`` of them, that occurred
    earlier is found at its most recent place, and what followed it there is proposed. Where the
    copy reaches the context's end it goes on with what it copied, so that a loop is drafted as
    long as is asked for.

    Guarantees: no draft depends on chance, so every proposal's law is one-hot and none is sent;
    a confidence tells only how much matched; a round's work is bounded by ``MAX_LOOKUP_TOKENS``.

    Args:
        config: its memory.
        num_speculative_tokens: most tokens of a proposal.
        vocab_size, max_model_len: the target's.
        min_match, max_match: tokens that must match, and that are looked for.
    """

    feature_size = 0
    min_length = 0
    page_size = _PAGE_SIZE

    def __init__(
        self,
        config: DrafterConfig,
        num_speculative_tokens: int,
        *,
        vocab_size: int,
        max_model_len: int,
        min_match: int,
        max_match: int,
    ) -> None:
        self.block_size = num_speculative_tokens
        self.vocab_size = vocab_size
        self.max_length = max_model_len
        self._min_match, self._max_match = min_match, max_match
        useful = config.max_sessions * -(-max_model_len // _PAGE_SIZE) + 1
        fitting = num_pages_within(config.kv_cache_memory_mb, np.int32().nbytes, _PAGE_SIZE)
        self.num_pages = min(fitting, useful)
        self._token_ids = np.zeros(self.num_pages * _PAGE_SIZE, dtype=np.int32)

    def num_kept(self, length: int) -> int:
        """All positions."""
        return length

    def write(self, rows: Sequence[DraftRows]) -> None:
        """Keeps the rows' tokens, without the anchor."""
        for part in rows:
            if len(part) > 0:
                positions = np.arange(part.start, part.start + len(part))
                slots = page_slots(part.session.pages, positions, _PAGE_SIZE)
                self._token_ids[slots] = part.token_ids[: len(part)]

    def run(self, drafts: Sequence[Draft]) -> list[DraftProposal]:
        """Looks up each sequence's last tokens."""
        self.write([draft.rows for draft in drafts])
        return [self._lookup(draft) for draft in drafts]

    def _lookup(self, draft: Draft) -> DraftProposal:
        end = draft.sequence.committed_length - 1
        positions = np.arange(max(0, end - MAX_LOOKUP_TOKENS + 1), end)
        context = np.empty(len(positions) + 1, dtype=np.int32)
        if len(positions) > 0:
            slots = page_slots(draft.session.pages, positions, _PAGE_SIZE)
            context[:-1] = self._token_ids[slots]
        context[-1] = draft.sequence.new_token_ids[-1]
        match = longest_match(context, self._min_match, self._max_match)
        if match is None:
            return DraftProposal(draft_token_ids=(), confidences=())
        start, length = match
        offsets = np.arange(draft.sequence.num_speculative_tokens)
        token_ids = context[start + offsets % (len(context) - start)]
        # As likely as that one more of so many successes in a row follows (rule of succession
        # with the first failure counted): each drafted token lengthens the match by one.
        matched = length + offsets
        return DraftProposal(
            draft_token_ids=tuple(token_ids.tolist()),
            confidences=tuple((matched / (matched + 1)).tolist()),
        )


def longest_match(
    token_ids: npt.NDArray[np.int32], min_match: int, max_match: int
) -> tuple[int, int] | None:
    """Where the longest run of last tokens occurred before, at its most recent place.

    Args:
        token_ids: ``[n]``, at least one.
        min_match, max_match: shortest and longest run.

    Returns:
        The place behind the occurrence, below n, and the run's length; ``None`` without any.
    """
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1])
    length = 1
    while len(ends) > 0 and length < max_match:
        earlier = ends[ends >= length]
        longer = earlier[token_ids[earlier - length] == token_ids[-1 - length]]
        if len(longer) == 0:
            break
        ends, length = longer, length + 1
    if len(ends) == 0 or length < min_match:
        return None
    return int(ends[-1]) + 1, length
