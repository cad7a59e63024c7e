"""Speculative generation of one sequence, plain and without a server: the yardstick for a pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from cluster.models.dspark import DSparkDrafter
from cluster.speculation.verification import Verification, verify_coupled, verify_rejection
from cluster.training.features import FeatureTarget


class SpeculativeSession:
    """A growing sequence, extended by rounds of drafting a block and verifying it.

    After every round the draft conventions hold: with n tokens committed, target cache and draft
    context cover positions 0 to n - 2.
    """

    def __init__(
        self,
        target: FeatureTarget,
        drafter: DSparkDrafter,
        prompt: Sequence[int],
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        """``temperature`` 0 is greedy; the prompt needs at least two tokens."""
        self.token_ids = list(prompt)
        self._target = target
        self._drafter = drafter
        self._temperature = temperature
        self._generator = generator
        self._cache = DynamicCache()
        features, _ = target.run(torch.tensor([prompt[:-1]]), self._cache)
        self._keys, self._values = self._context(features[0], first_position=0)

    @torch.no_grad()
    def round(self) -> int:
        """Drafts a block, verifies it and commits the outcome.

        Returns:
            How many drafted tokens were accepted; one more token than that is committed.
        """
        drafted, draft_probs = self._draft()
        length = len(self.token_ids)
        block = torch.tensor([[self.token_ids[-1], *drafted.tolist()]])
        features, logits = self._target.run(block, self._cache)
        verification = self._verify(logits.float(), drafted[None], draft_probs[None])
        accepted = int(verification.num_accepted_tokens)
        if accepted < len(drafted):
            self._cache.crop(accepted - len(drafted))  # removes the rejected tokens
        keys, values = self._context(features[0, : accepted + 1], first_position=length - 1)
        self._keys = torch.cat([self._keys, keys], dim=1)
        self._values = torch.cat([self._values, values], dim=1)
        self.token_ids += verification.output_token_ids[0, : accepted + 1].tolist()
        return accepted

    def _draft(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 ``[block_size]`` and the laws they came from ``[block_size, V]``."""
        drafter, anchor = self._drafter, len(self.token_ids) - 1
        previous = torch.tensor([self.token_ids[-1]])
        hidden = drafter.block_hidden(
            previous,
            torch.tensor([anchor]),
            self._keys[:, None],
            self._values[:, None],
            torch.tensor([anchor]),
        )
        base = drafter.base_logits(hidden)
        state: torch.Tensor | None = None
        drafted, laws = [], []
        for slot in range(drafter.config.block_size):
            logits, state = drafter.markov_step(base[:, slot], previous, hidden[:, slot], state)
            law = self._law(logits)
            previous = torch.multinomial(law, 1, generator=self._generator)[:, 0]
            drafted.append(previous)
            laws.append(law)
        return torch.cat(drafted), torch.cat(laws)

    def _verify(
        self, logits: torch.Tensor, drafted: torch.Tensor, draft_probs: torch.Tensor
    ) -> Verification:
        count = torch.tensor([drafted.shape[1]])
        if self._temperature == 0:
            picks = logits.argmax(dim=-1)
            return verify_coupled(
                target_picks=picks, draft_token_ids=drafted, num_draft_tokens=count
            )
        support = torch.arange(logits.shape[-1]).expand_as(draft_probs)
        noise = torch.empty(1, logits.shape[-1]).exponential_(generator=self._generator)
        return verify_rejection(
            target_probs=self._law(logits),
            draft_token_ids=drafted,
            draft_prob_token_ids=support,
            draft_prob_values=draft_probs,
            num_draft_tokens=count,
            accept_uniforms=torch.rand(drafted.shape, generator=self._generator),
            recovery_noise=noise,
        )

    def _law(self, logits: torch.Tensor) -> torch.Tensor:
        if self._temperature == 0:
            one_hot = torch.zeros_like(logits)
            return one_hot.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        return (logits / self._temperature).softmax(dim=-1)

    @torch.no_grad()
    def _context(
        self, features: torch.Tensor, first_position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(first_position, first_position + len(features))
        return self._drafter.context_kv(self._drafter.project_features(features), positions)
