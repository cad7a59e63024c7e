"""Sequential heads of a DSpark drafter: what the previous token adds to a slot's logits.

Names of weights and mathematics are those of DeepSpec's ``markov_head.py``. Every head works on
any leading dimensions, written ``*`` below.
"""

from __future__ import annotations

import torch
from torch import nn

from cluster.models.dspark_config import DSparkConfig


class MarkovHead(nn.Module):
    """Vanilla head: logits += w2(w1[previous token]), of rank r. It has no memory."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.vocab_size, bias=False)

    def step(
        self, prev_token_ids: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bias of one slot.

        Args:
            prev_token_ids: int64 ``[*]``, the token before the slot.
            hidden: ``[*, d]``, the backbone's output at the slot.
            state: what the slot before returned; ``None`` at a block's first slot.

        Returns:
            ``(bias [*, vocab], state for the next slot)``.
        """
        return self.markov_w2(self.markov_w1(prev_token_ids)), None

    def block(self, prev_token_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Bias of a whole block at once: int64 ``[*, slots]``, ``[*, slots, d]`` to
        ``[*, slots, vocab]``. Only for known tokens, that is in training."""
        return self.step(prev_token_ids, hidden, None)[0]


class GatedMarkovHead(MarkovHead):
    """Vanilla head whose token embedding is gated by the slot's own state."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        rank = config.markov_rank
        self.gate_proj = nn.Linear(config.hidden_size + rank, rank)

    def step(
        self, prev_token_ids: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``MarkovHead.step``."""
        previous = self.markov_w1(prev_token_ids)
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, previous], dim=-1)))
        return self.markov_w2(gate * previous), None


class RnnHead(MarkovHead):
    """Gated recurrence over a block's slots, so that a slot knows all tokens before it."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        rank = config.markov_rank
        self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    def step(
        self, prev_token_ids: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``MarkovHead.step``; the state is ``[*, rank]``."""
        previous = self.markov_w1(prev_token_ids)
        if state is None:
            state = torch.zeros_like(previous)
        joint = self.joint_proj(torch.cat([state, previous, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        next_state = gate * state + (1 - gate) * torch.tanh(candidate)
        return self.markov_w2(torch.tanh(output)), next_state

    def block(self, prev_token_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """As ``MarkovHead.block``, one slot after the other."""
        state: torch.Tensor | None = None
        biases = []
        for slot in range(prev_token_ids.shape[-1]):
            bias, state = self.step(prev_token_ids[..., slot], hidden[..., slot, :], state)
            biases.append(bias)
        return torch.stack(biases, dim=-2)


_HEADS = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RnnHead}


def build_markov_head(config: DSparkConfig) -> MarkovHead | None:
    """The head that ``config`` names; ``None`` for rank 0 (DFlash)."""
    if config.markov_rank == 0:
        return None
    return _HEADS[config.markov_head_type](config)
