"""Drafting a whole block in one pass: DSpark and DFlash, of any architecture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from cluster.config import DrafterConfig
from cluster.engine.draft_context import DraftContext
from cluster.engine.draft_method import (
    Draft,
    DraftRows,
    num_pages_within,
    page_slots,
    page_table,
)
from cluster.engine.draft_sampling import ProposalDrawing, own_confidence
from cluster.engine.kernels import has_kernels
from cluster.engine.paged_block import PagedBlocks
from cluster.models.dspark import DSparkDrafter
from cluster.speculation.proposal import DraftProposal


class BlockMethod:
    """A ``DraftMethod`` on a network that drafts blocks.

    Guarantees: all sequences share one pass through the backbone and one sampling step per token;
    the whole block runs whatever number of tokens is asked for, so that a proposal's tokens do
    not depend on how many there are; a network with a window is given no more than that.

    Args:
        drafter: the network, in evaluation mode, on its device.
        config: its page size and memory.
        draft_top_k: entries of each draft distribution.
        generator: the drafter's own randomness, on the network's device.
    """

    min_length = 0

    def __init__(
        self,
        drafter: DSparkDrafter,
        config: DrafterConfig,
        draft_top_k: int,
        generator: torch.Generator,
    ) -> None:
        parameter = next(drafter.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._drafter = drafter
        self._draft_top_k = draft_top_k
        self._generator = generator
        self.block_size = drafter.config.block_size
        self.vocab_size = drafter.config.vocab_size
        self.feature_size = drafter.config.hidden_size
        # A block's last slot must have a position, so the anchor's is at most this.
        self.max_length = drafter.config.max_position_embeddings - self.block_size
        self._window = min(drafter.config.context_window or self.max_length, self.max_length)
        with torch.inference_mode():
            keys, values = drafter.context_kv(
                torch.zeros(1, self.feature_size, dtype=self._dtype, device=self._device),
                self._tensor([0]),
            )
        position_bytes = keys.nbytes + values.nbytes
        self.page_size = config.page_size
        self.num_pages = num_pages_within(config.kv_cache_memory_mb, position_bytes, self.page_size)
        self._context = DraftContext(self.num_pages, self.page_size, keys, values)
        self._paged: PagedBlocks | None = None
        if drafter.config.context_window is None and has_kernels(self._device, self._dtype):
            self._paged = PagedBlocks(
                drafter,
                *self._context.layers(),
                compiles=not config.enforce_eager,
                max_sessions=config.max_sessions,
                max_pages=-(-(self.max_length + self.block_size) // self.page_size),
            )

    def num_kept(self, length: int) -> int:
        """All positions, or those in the window; and the block's own, where they lie in pages."""
        return min(length, self._window) + (self.block_size if self._paged is not None else 0)

    def write(self, rows: Sequence[DraftRows]) -> None:
        """Projects features to keys and values and stores them, all in one go."""
        features: list[torch.Tensor] = []
        positions: list[npt.NDArray[np.int64]] = []
        slots: list[npt.NDArray[np.int64]] = []
        for part in rows:
            if len(part) == 0:
                continue
            end = part.start + len(part)
            start = max(part.start, end - self._window)
            features.append(part.features[start - part.start :])
            positions.append(np.arange(start, end))
            slots.append(page_slots(part.session.pages, positions[-1], self.page_size))
        if not features:
            return
        keys, values = self._drafter.context_kv(
            torch.cat(features).to(device=self._device, dtype=self._dtype),
            self._tensor(np.concatenate(positions)),
        )
        self._context.write(np.concatenate(slots), keys, values)

    def run(self, drafts: Sequence[Draft]) -> list[DraftProposal]:
        """Drafts for B sequences."""
        self.write([draft.rows for draft in drafts])
        num_tokens = max(draft.sequence.num_speculative_tokens for draft in drafts)
        last = np.array([draft.sequence.new_token_ids[-1] for draft in drafts], dtype=np.int64)
        anchors = self._tensor(last)
        hidden = self._hidden(drafts, last)[:, :num_tokens]
        base_logits = self._drafter.base_logits(hidden)
        drawing = ProposalDrawing(
            drafts, top_k=self._draft_top_k, generator=self._generator, device=self._device
        )
        token_ids = [anchors]
        laws: list[torch.Tensor] = []
        state = None
        for index in range(num_tokens):
            logits, state = self._drafter.markov_step(
                base_logits[:, index], token_ids[-1], hidden[:, index], state
            )
            token_ids.append(drawing.draw(logits))
            if self._drafter.confidence_head is None:
                laws.append(own_confidence(logits))
        if self._drafter.confidence_head is None:
            confidences = torch.stack(laws, dim=1)
        else:
            # From the tokens before each slot: a confidence must not know its own (DESIGN, rule 3).
            previous = torch.stack(token_ids[:-1], dim=1)
            confidences = self._drafter.confidence_logit(hidden, previous).sigmoid()
        return drawing.proposals(confidences)

    def _hidden(self, drafts: Sequence[Draft], anchors: npt.NDArray[np.int64]) -> torch.Tensor:
        """The backbone's output ``[B, block_size, d]``."""
        ends = np.array([d.sequence.committed_length - 1 for d in drafts], dtype=np.int64)
        lengths = np.minimum(ends, self._window)
        table = page_table([draft.session for draft in drafts])
        if self._paged is not None:
            return self._paged.hidden(anchors, ends, table)
        keys, values = self._context.gather(table, ends - lengths, lengths)
        return self._drafter.block_hidden(
            self._tensor(anchors),
            self._tensor(ends),
            keys,
            values,
            context_lengths=self._tensor(lengths),
        )

    def _tensor(self, values: Sequence[int] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)
