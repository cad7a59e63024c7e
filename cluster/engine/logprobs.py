"""The target's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.request import PositionLogprobs, TokenLogprob


def position_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> list[PositionLogprobs]:
    """The target's own log-probabilities of tokens that follow.

    Args:
        logits: ``[N, V]`` float, not changed by any parameter of the request.
        token_ids: the N tokens.
        num_top: of the best ones beside each.
    """
    logprobs = logits[: len(token_ids)].log_softmax(dim=-1)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logprobs.device)
    chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    best = logprobs.topk(num_top, dim=-1)
    return [
        PositionLogprobs(
            TokenLogprob(token_id, value),
            tuple(TokenLogprob(i, v) for i, v in zip(top_ids, top_values, strict=True)),
        )
        for token_id, value, top_ids, top_values in zip(
            token_ids, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
