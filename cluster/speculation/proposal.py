"""What a drafter proposes for one request, and the wire form of the law it sampled from.

The verifier must know exactly the law that the drafter sampled from. So the drafter first brings
its law into the wire's form (top-k, float16), restores it from that form, and samples from the
restored one; the verifier restores the same numbers from the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import MalformedProposalError


@dataclass(frozen=True, eq=False)
class DraftProposal:
    """A drafted block for one request: k tokens and what the drafter thinks of them.

    Attributes:
        draft_token_ids: k ids of the *target's* vocabulary.
        confidences: k conditional acceptance probabilities; ``confidences[j]`` was computed from
            the drafter's state at j and the tokens before j, never from token j (DESIGN, rule 3).
        draft_prob_token_ids: ``[k, T]`` int32, the support of the law each token was sampled
            from, or ``None`` where only token ids travel (coupled, n-gram, untrusted drafter).
        draft_prob_values: ``[k, T]`` float16, its values before renormalisation, or ``None``.
    """

    draft_token_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    draft_prob_token_ids: npt.NDArray[np.int32] | None = None
    draft_prob_values: npt.NDArray[np.float16] | None = None

    @property
    def num_draft_tokens(self) -> int:
        return len(self.draft_token_ids)

    def validate(self, *, vocab_size: int, max_tokens: int) -> None:
        """Check everything that the verifier relies on.

        Args:
            vocab_size: of the target.
            max_tokens: how many tokens were asked for.

        Raises:
            MalformedProposalError: naming the first thing that is wrong.
        """
        num_tokens = self.num_draft_tokens
        if num_tokens > max_tokens:
            raise MalformedProposalError(f"{num_tokens} tokens drafted, {max_tokens} asked for")
        if len(self.confidences) != num_tokens:
            raise MalformedProposalError(
                f"{len(self.confidences)} confidences for {num_tokens} drafted tokens"
            )
        token_ids = np.asarray(self.draft_token_ids, dtype=np.int64)
        _check_token_ids("draft_token_ids", token_ids, vocab_size)
        confidences = np.asarray(self.confidences, dtype=np.float64)
        if not np.all((confidences >= 0) & (confidences <= 1)):  # false for NaN too
            raise MalformedProposalError("confidences must be numbers from 0 to 1")
        self._validate_draft_probs(token_ids, vocab_size)

    def _validate_draft_probs(self, token_ids: npt.NDArray[np.int64], vocab_size: int) -> None:
        prob_token_ids, values = self.draft_prob_token_ids, self.draft_prob_values
        if prob_token_ids is None and values is None:
            return
        if prob_token_ids is None or values is None:
            raise MalformedProposalError("draft probabilities need both token ids and values")
        if prob_token_ids.dtype != np.int32 or values.dtype != np.float16:
            raise MalformedProposalError("draft_probs must be int32 token ids and float16 values")
        if prob_token_ids.ndim != 2 or prob_token_ids.shape != values.shape:
            raise MalformedProposalError(
                f"draft_probs have shapes {prob_token_ids.shape} and {values.shape}"
            )
        if len(prob_token_ids) != len(token_ids):
            raise MalformedProposalError(
                f"{len(prob_token_ids)} rows of draft_probs for {len(token_ids)} drafted tokens"
            )
        _check_token_ids("draft_prob_token_ids", prob_token_ids, vocab_size)
        if not np.all((values >= 0) & (values <= 1)):  # false for NaN too
            raise MalformedProposalError("draft_prob_values must be numbers from 0 to 1")
        ordered = np.sort(prob_token_ids, axis=1)
        if np.any(ordered[:, 1:] == ordered[:, :-1]):
            raise MalformedProposalError("draft_prob_token_ids repeat an id in one row")
        drafted_values = np.where(prob_token_ids == token_ids[:, None], values, 0).sum(axis=1)
        if not np.all(drafted_values > 0):
            raise MalformedProposalError("a drafted token has no probability in its own law")


def quantize_draft_probs(probs: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a drafter's law to the wire's form.

    Args:
        probs: ``[..., V]`` float, the drafter's law after the request's own truncation.
        top_k: how many tokens to keep; capped at V.

    Returns:
        Columns of the kept tokens ``[..., T]`` int32 and their probabilities ``[..., T]``
        float16, neither renormalised nor without the zeros that truncation or rounding made.
    """
    values, token_ids = probs.topk(min(top_k, probs.shape[-1]), dim=-1)
    return token_ids.to(torch.int32), values.to(torch.float16)


def dequantize_draft_probs(values: torch.Tensor) -> torch.Tensor:
    """Restore the law that both sides use from the wire's values.

    float16 values are multiples of 2**-24, so their float64 sum is exact in any order and drafter
    and verifier get the same bits on any device.

    Args:
        values: ``[..., T]`` float16 in [0, 1]; a row may be all zero padding.

    Returns:
        ``[..., T]`` float32 whose rows sum to one (padding rows stay zero). A zero stays zero
        and must never be sampled.
    """
    exact = values.to(torch.float64)
    total = exact.sum(dim=-1, keepdim=True)
    return (exact / total.masked_fill(total == 0, 1.0)).to(torch.float32)


def _check_token_ids(name: str, token_ids: npt.NDArray[np.integer], vocab_size: int) -> None:
    if np.any((token_ids < 0) | (token_ids >= vocab_size)):
        raise MalformedProposalError(f"{name} has an id outside the vocabulary of {vocab_size}")
