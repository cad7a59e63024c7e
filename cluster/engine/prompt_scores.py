"""Log-probabilities of prompts, where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.engine.logprobs import position_logprobs
from cluster.engine.scheduler import ScheduledSequence


def take_prompt_scores(logits: torch.Tensor, entries: Sequence[ScheduledSequence]) -> torch.Tensor:
    """Reads what a pass says of prompts into their sequences; to be called before it is committed.

    Args:
        logits: ``[R, V]`` of the pass's ``logit_rows``.
        entries: of the pass, in order.

    Returns:
        The rows that are sampled from.
    """
    if not any(entry.scored for entry in entries):
        return logits
    sampled: list[int] = []
    row = 0
    for entry in entries:
        scored, sequence = entry.scored, entry.sequence
        if scored:
            following = sequence.token_ids[scored.start + 1 : scored.stop + 1]
            num_top = sequence.request.sampling.prompt_logprobs or 0
            rows = logits[row : row + len(scored)]
            row += len(scored)
            sequence.prompt_logprobs += position_logprobs(rows, following, num_top)
        if entry.samples:
            num_rows = len(entry.draft_token_ids) + 1
            sampled += range(row, row + num_rows)
            row += num_rows
    return logits[sampled]
