"""Drafting token by token over paged keys and values: EAGLE-3 and causal language models.

A session's *entries* are what such a network has run over. A causal language model's entry t is
token t. EAGLE-3's entry t joins the target's features of position t with token t+1, so that with n
committed tokens its entries end at n-2, where a language model's end at the anchor, n-1; the last
one's output gives the law of position n. Then the network goes on from what it drafted: these
entries are written behind the committed ones, and the next round writes over them. So nothing has
to be cropped, and after full acceptance nothing is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from cluster.config import DrafterConfig
from cluster.engine.attention import KVCache, PagedBatch
from cluster.engine.cpu.kernels import has_kernels
from cluster.engine.draft_client import DraftSampling, SessionKey
from cluster.engine.draft_method import (
    Draft,
    DraftRows,
    num_pages_within,
    page_slots,
    page_table,
)
from cluster.engine.draft_sampling import ProposalDrawing, own_confidence
from cluster.engine.draft_sessions import DraftSession
from cluster.engine.in_place import InPlaceLayers
from cluster.engine.step_input import StepInput
from cluster.errors import ConfigError
from cluster.speculation.proposal import DraftProposal


class EntryNetwork(Protocol):
    """A network that runs over entries of many sequences, their keys and values paged."""

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    feature_size: int
    max_position_embeddings: int
    num_layers: int
    key_sources: Mapping[int, int]
    """Layers that read another layer's keys and values instead of their own."""
    runs_anchor: bool
    """Whether the anchor is an entry (a language model's) or only a token of one (EAGLE-3's)."""

    def forward(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        paged: PagedBatch | InPlaceLayers,
    ) -> torch.Tensor:
        """Runs N entries; each sees its own sequence's entries up to itself.

        Args:
            features: EAGLE-3's ``[N, d]``, the target's or the output of the entry before; a
                language model ignores them.
            token_ids, positions: int64 ``[N]``; of the entries, not of the tokens.
            paged: where their keys and values are.

        Returns:
            ``[N, d]``.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, d]`` of ``forward`` to fp32 ``[B, V]`` over the target's tokens."""
        ...


class AutoregressiveMethod:
    """A ``DraftMethod`` on a network that drafts one token after the other.

    Guarantees: a round's first forward runs the new entries of all sequences together, each
    further one a single entry of each; a proposal's tokens do not depend on how many there are.

    Args:
        network: on its device, in evaluation mode.
        config: its page size and memory.
        num_speculative_tokens: most tokens of a proposal.
        draft_top_k: entries of each draft distribution.
        generator: the drafter's own randomness, on the network's device.

    Raises:
        ConfigError: the network keeps something else than paged keys and values, or has fewer
            positions than it is to draft.
    """

    def __init__(
        self,
        network: EntryNetwork,
        config: DrafterConfig,
        num_speculative_tokens: int,
        draft_top_k: int,
        generator: torch.Generator,
    ) -> None:
        self._network = network
        self._draft_top_k = draft_top_k
        self._generator = generator
        self.block_size = num_speculative_tokens
        self.vocab_size = network.vocab_size
        self.feature_size = network.feature_size
        self.min_length = 0 if network.runs_anchor else 1
        # The last entry that is run must have a position.
        self.max_length = network.max_position_embeddings - self.block_size
        if self.max_length < 1:
            raise ConfigError(
                "speculative.num_speculative_tokens",
                f"is {self.block_size} for a model of {network.max_position_embeddings} positions",
            )
        self.page_size = config.page_size
        self._cache = KVCache(
            1,
            self.page_size,
            network.key_sources,
            in_place=has_kernels(network.device, network.dtype),
        )
        self.num_pages = num_pages_within(
            config.kv_cache_memory_mb, self._position_bytes(), self.page_size
        )
        self._cache.resize(self.num_pages)

    def num_kept(self, length: int) -> int:
        """Committed entries, and those of the longest proposal behind them."""
        return length + self.block_size - (0 if self._network.runs_anchor else 1)

    def write(self, rows: Sequence[DraftRows]) -> None:
        """Runs the entries of the rows, without the anchor."""
        rows = [part for part in rows if len(part) > 0]
        if rows:
            first = 0 if self._network.runs_anchor else 1
            self._run_entries(rows, [part.token_ids[first : first + len(part)] for part in rows])

    def run(self, drafts: Sequence[Draft]) -> list[DraftProposal]:
        """Drafts for B sequences."""
        sessions = [draft.session for draft in drafts]
        hidden = self._first_hidden([draft.rows for draft in drafts])
        drawing = ProposalDrawing(
            drafts, top_k=self._draft_top_k, generator=self._generator, device=self._network.device
        )
        num_tokens = max(draft.sequence.num_speculative_tokens for draft in drafts)
        committed = np.array([d.sequence.committed_length for d in drafts], dtype=np.int64)
        positions = committed - (0 if self._network.runs_anchor else 1)
        table = page_table(sessions)
        ones = np.ones(len(drafts), dtype=np.int64)
        confidences = []
        for index in range(num_tokens):
            logits = self._network.logits(hidden)
            confidences.append(own_confidence(logits))
            token_ids = drawing.draw(logits)
            if index + 1 < num_tokens:
                hidden = self._forward(hidden, token_ids, positions + index, ones, sessions, table)
        return drawing.proposals(torch.stack(confidences, dim=1))

    def _first_hidden(self, rows: Sequence[DraftRows]) -> torch.Tensor:
        """Runs what is new up to the anchor; returns the last outputs ``[B, d]``."""
        if self._network.runs_anchor:
            return self._run_entries(rows, [part.token_ids for part in rows])
        self.write(rows)
        outputs = []
        for part in rows:
            if part.session.hidden is None:
                raise RuntimeError(f"draft session {part.session.key} has no entry to start from")
            outputs.append(part.session.hidden)
        return torch.stack(outputs)

    def _run_entries(
        self, rows: Sequence[DraftRows], token_ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Runs the entries of these tokens from each part's start; returns the last outputs."""
        counts = np.array([len(tokens) for tokens in token_ids], dtype=np.int64)
        positions = np.concatenate(
            [
                np.arange(part.start, part.start + count)
                for part, count in zip(rows, counts, strict=True)
            ]
        )
        sessions = [part.session for part in rows]
        outputs = self._forward(
            torch.cat([part.features for part in rows]),
            torch.tensor([token for tokens in token_ids for token in tokens], dtype=torch.int64),
            positions,
            counts,
            sessions,
            page_table(sessions),
        )
        last = outputs[torch.from_numpy(np.cumsum(counts) - 1).to(outputs.device)]
        if not self._network.runs_anchor:
            for session, output in zip(sessions, last, strict=True):
                session.hidden = output.clone()  # a view would keep the whole batch alive
        return last

    @torch.inference_mode()
    def _position_bytes(self) -> int:
        """What an entry's keys and values take, found out by running one."""
        network = self._network
        session = DraftSession(
            "", SessionKey("", 0), DraftSampling(temperature=0.0), 0.0, pages=[0]
        )
        features = torch.zeros(1, network.feature_size)
        self._run_entries([DraftRows(session, 0, features, (0,))], [(0,)])
        if not all(self._cache.serves(layer) for layer in range(network.num_layers)):
            raise ConfigError("speculative.model", "has layers that do not attend to a cache")
        return self._cache.bytes_per_token

    def _forward(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        positions: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        sessions: Sequence[DraftSession],
        table: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """Runs ``counts`` entries of each of B sessions, one session behind the other."""
        ends = np.cumsum(counts)
        slots = [
            page_slots(session.pages, positions[end - count : end], self.page_size)
            for session, end, count in zip(sessions, ends, counts, strict=True)
        ]
        step = StepInput(
            token_ids=positions,  # attention needs none
            positions=positions,
            slots=np.concatenate(slots),
            query_lens=counts,
            context_lens=positions[ends - 1] + 1,
            block_tables=table,
            logit_rows=ends - 1,
        )
        network = self._network
        paged = self._cache.batch(step, network.device)
        try:
            return network.forward(
                features.to(network.device, network.dtype),
                token_ids.to(network.device),
                torch.from_numpy(positions).to(network.device),
                paged,
            )
        finally:
            self._cache.end()
