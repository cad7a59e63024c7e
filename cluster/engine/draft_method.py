"""What a draft engine needs of a way of drafting, whatever network or table is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.draft_client import DraftSequence
from cluster.engine.draft_sessions import DraftSession
from cluster.speculation.proposal import DraftProposal


@dataclass(frozen=True, eq=False)
class DraftRows:
    """Committed positions ``start .. start+N-1`` that are new to a session; N may be 0.

    Attributes:
        features: ``[N, d]``; d is 0 for methods without features.
        token_ids: N+1 of them, of positions ``start .. start+N``.
    """

    session: DraftSession
    start: int
    features: torch.Tensor
    token_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, eq=False)
class Draft:
    """One sequence that a pass drafts for; ``rows`` end right before its anchor."""

    sequence: DraftSequence
    rows: DraftRows

    @property
    def session(self) -> DraftSession:
        """The sequence's session."""
        return self.rows.session


class DraftMethod(Protocol):
    """A way of drafting over paged memory that a ``DraftEngine`` shares out.

    A session's ``pages`` hold ``num_kept(length)`` positions whenever it is passed in here with
    rows that end at ``length``. Implementations keep nothing else by session but what
    ``DraftSession`` has a field for, so that a dropped session leaves nothing behind.
    """

    @property
    def block_size(self) -> int:
        """Most tokens drafted in a round."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids drafted are below it."""
        ...

    @property
    def feature_size(self) -> int:
        """Values of one position's features; 0: token ids are enough."""
        ...

    @property
    def min_length(self) -> int:
        """Fewest positions before the anchor that it drafts behind."""
        ...

    @property
    def max_length(self) -> int:
        """Most positions before the anchor that it drafts behind; what follows is not kept."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages in all, page 0 included, which belongs to nobody."""
        ...

    @property
    def page_size(self) -> int:
        """Positions of one page."""
        ...

    def num_kept(self, length: int) -> int:
        """Positions that a session of ``length`` (at most ``max_length``) needs memory for."""
        ...

    def write(self, rows: Sequence[DraftRows]) -> None:
        """Takes in new positions of sessions that do not draft now; each session once."""
        ...

    def run(self, drafts: Sequence[Draft]) -> list[DraftProposal]:
        """Takes in each draft's rows, and drafts ``num_speculative_tokens`` (at least one) or
        fewer for each of them, all in one pass; each session once."""
        ...


def page_slots(
    pages: Sequence[int], positions: npt.NDArray[np.int64], page_size: int
) -> npt.NDArray[np.int64]:
    """``[N]`` places of positions in paged memory: page times page size plus the offset.

    Positions that a sliding window has left give their places to those that came in.
    """
    table = np.asarray(pages, dtype=np.int64)
    slots: npt.NDArray[np.int64] = table[positions // page_size % len(table)] * page_size
    slots += positions % page_size
    return slots


def page_table(sessions: Sequence[DraftSession]) -> npt.NDArray[np.int64]:
    """``[B, P]`` pages of sessions, padded with page 0; P is at least 1."""
    table = np.zeros((len(sessions), max(1, *(len(s.pages) for s in sessions))), dtype=np.int64)
    for row, session in enumerate(sessions):
        table[row, : len(session.pages)] = session.pages
    return table


def num_pages_within(memory_mb: int, position_bytes: int, page_size: int) -> int:
    """Pages of positions of ``position_bytes`` that fit into ``memory_mb`` MiB."""
    return (memory_mb << 20) // (position_bytes * page_size)
