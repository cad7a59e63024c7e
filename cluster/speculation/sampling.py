"""From logits to the law that a request asks for.

Target, drafter and the tests' reference all mean the same law, processed in this order:

1. logit bias, added;
2. penalties: *repetition* (tokens of prompt and output; positive logits divided, others
   multiplied), then *frequency* and *presence* (tokens of the output; subtracted);
3. tokens not allowed (grammar), and stop tokens while fewer than ``min_tokens`` are out: removed;
4. temperature 0: the best token alone, the lowest id on a tie; else logits are divided by it;
5. top-k; 6. top-p of what top-k left; 7. min-p: tokens below min_p times the best's probability.

A tie at a boundary of top-k, top-p or min-p keeps every tied token. So the law does not depend on
how a sort orders equal logits.

Rows are what is sampled, one for each position of each request. Position k of a drafted block is
processed as if the drafted tokens before it were committed: :meth:`SamplingBatch.expand` repeats
a request's parameters over its block and :func:`block_token_counts` counts its drafted tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from cluster.request import SamplingParams

# Best tokens of a row among which top-p looks first: they nearly always hold the mass, and finding
# them costs a fraction of sorting a whole vocabulary.
_NUM_BEST = 256
# Lower ones would round to 0, which is greedy, in float32.
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """Sampling parameters of N rows, ready for the device.

    Built on the host, which so knows without asking the device which rows need which work.
    """

    temperature: torch.Tensor  # [N] float32, 0 is greedy
    top_k: torch.Tensor  # [N] int64, 0 is off
    top_p: torch.Tensor  # [N] float32, 1 is off
    min_p: torch.Tensor  # [N] float32, 0 is off
    repetition_penalty: torch.Tensor  # [N] float32, 1 is off
    presence_penalty: torch.Tensor  # [N] float32, 0 is off
    frequency_penalty: torch.Tensor  # [N] float32, 0 is off
    min_tokens: torch.Tensor  # [N] int64, 0 is off
    bias_rows: torch.Tensor  # [B] int64, with the next two: logit bias in coordinate form
    bias_token_ids: torch.Tensor  # [B] int64
    bias_values: torch.Tensor  # [B] float32
    stop_rows: torch.Tensor  # [S] int64, with the next: what min_tokens holds back
    stop_token_ids: torch.Tensor  # [S] int64
    penalised_rows: torch.Tensor  # [M] int64, ascending: rows that need token counts
    truncated_rows: torch.Tensor  # [T] int64, ascending: rows with top-k or top-p
    greedy_rows: torch.Tensor  # [G] int64, ascending: rows of temperature 0
    max_top_k: int
    has_top_p: bool
    has_min_p: bool

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        *,
        eos_token_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> SamplingBatch:
        """Build the parameters of R requests, one row each, from validated ``SamplingParams``.

        Args:
            eos_token_ids: held back by ``min_tokens`` together with a request's stop tokens,
                unless it ignores EOS.
        """
        bias_rows, bias_token_ids, bias_values = [], [], []
        stop_rows, stop_token_ids = [], []
        for row, request in enumerate(params):
            for token_id, value in request.logit_bias.items():
                bias_rows.append(row)
                bias_token_ids.append(token_id)
                bias_values.append(value)
            if request.min_tokens > 0:
                eos = () if request.ignore_eos else eos_token_ids
                for token_id in {*request.stop_token_ids, *eos}:
                    stop_rows.append(row)
                    stop_token_ids.append(token_id)

        # Nothing here waits for the device, which may be computing the logits still.
        def floats(values: Iterable[float]) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.float32).to(device, non_blocking=True)

        def integers(values: Iterable[int]) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int64).to(device, non_blocking=True)

        return cls(
            temperature=floats(
                0.0 if p.is_greedy else max(p.temperature, _LEAST_TEMPERATURE) for p in params
            ),
            top_k=integers(p.top_k for p in params),
            top_p=floats(p.top_p for p in params),
            min_p=floats(p.min_p for p in params),
            repetition_penalty=floats(p.repetition_penalty for p in params),
            presence_penalty=floats(p.presence_penalty for p in params),
            frequency_penalty=floats(p.frequency_penalty for p in params),
            min_tokens=integers(p.min_tokens for p in params),
            bias_rows=integers(bias_rows),
            bias_token_ids=integers(bias_token_ids),
            bias_values=floats(bias_values),
            stop_rows=integers(stop_rows),
            stop_token_ids=integers(stop_token_ids),
            penalised_rows=integers(row for row, p in enumerate(params) if p.has_penalties),
            truncated_rows=integers(
                row
                for row, p in enumerate(params)
                if not p.is_greedy and (p.top_k > 0 or p.top_p < 1)
            ),
            greedy_rows=integers(row for row, p in enumerate(params) if p.is_greedy),
            max_top_k=max((p.top_k for p in params), default=0),
            has_top_p=any(p.top_p < 1 for p in params),
            has_min_p=any(p.min_p > 0 for p in params),
        )

    def expand(self, num_positions: int) -> SamplingBatch:
        """Repeat each row for ``num_positions`` consecutive rows, a block's positions."""
        if num_positions == 1:
            return self
        offsets = torch.arange(num_positions, device=self.temperature.device)

        def repeated(values: torch.Tensor) -> torch.Tensor:
            return values.repeat_interleave(num_positions)

        def rows(indices: torch.Tensor) -> torch.Tensor:
            return (indices.unsqueeze(1) * num_positions + offsets).flatten()

        return replace(
            self,
            temperature=repeated(self.temperature),
            top_k=repeated(self.top_k),
            top_p=repeated(self.top_p),
            min_p=repeated(self.min_p),
            repetition_penalty=repeated(self.repetition_penalty),
            presence_penalty=repeated(self.presence_penalty),
            frequency_penalty=repeated(self.frequency_penalty),
            min_tokens=repeated(self.min_tokens),
            bias_rows=rows(self.bias_rows),
            bias_token_ids=repeated(self.bias_token_ids),
            bias_values=repeated(self.bias_values),
            stop_rows=rows(self.stop_rows),
            stop_token_ids=repeated(self.stop_token_ids),
            penalised_rows=rows(self.penalised_rows),
            truncated_rows=rows(self.truncated_rows),
            greedy_rows=rows(self.greedy_rows),
        )


def adjust_logits(
    logits: torch.Tensor,
    batch: SamplingBatch,
    *,
    num_output_tokens: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    allowed_mask: torch.Tensor | None = None,
    constrained_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Steps 1 to 3: bias, penalties, tokens that are not allowed.

    The argmax of the result is the greedy token; a batch of only greedy rows needs no more.

    Args:
        logits: ``[N, V]`` float, not changed.
        batch: parameters of the N rows.
        num_output_tokens: ``[N]`` int64, tokens put out before each row's position; needed where
            ``batch.stop_rows`` is not empty.
        output_counts: ``[M, V]`` integer, how often each token was put out before the position,
            for the M rows of ``batch.penalised_rows``; needed where there are any.
        prompt_mask: ``[M, V]`` bool, which tokens the prompt contains, for the same rows.
        allowed_mask: ``[C, V]`` bool of grammars; at least one token of a row must be allowed.
        constrained_rows: ``[C]`` int64, ascending: the rows of ``allowed_mask``; unset: all N.

    Returns:
        ``[N, V]`` float32, ``-inf`` where removed; where no row asks for anything, ``logits``.

    Raises:
        ValueError: an argument that some row needs is missing.
    """
    is_changed = (
        batch.bias_rows.numel()
        or batch.penalised_rows.numel()
        or batch.stop_rows.numel()
        or allowed_mask is not None
    )
    logits = logits.to(torch.float32, copy=bool(is_changed))
    if batch.bias_rows.numel() > 0:
        bias_index = (batch.bias_rows, batch.bias_token_ids)
        logits.index_put_(bias_index, batch.bias_values, accumulate=True)
    if batch.penalised_rows.numel() > 0:
        if output_counts is None or prompt_mask is None:
            raise ValueError("rows with penalties need output_counts and prompt_mask")
        _apply_penalties(logits, batch, output_counts, prompt_mask)
    if allowed_mask is not None and constrained_rows is None:
        logits.masked_fill_(~allowed_mask, -torch.inf)
    elif allowed_mask is not None:
        constrained = logits[constrained_rows].masked_fill_(~allowed_mask, -torch.inf)
        logits[constrained_rows] = constrained
    if batch.stop_rows.numel() > 0:
        if num_output_tokens is None:
            raise ValueError("rows with min_tokens need num_output_tokens")
        is_early = num_output_tokens[batch.stop_rows] < batch.min_tokens[batch.stop_rows]
        held_back = torch.where(is_early, -torch.inf, 0.0)
        logits.index_put_((batch.stop_rows, batch.stop_token_ids), held_back, accumulate=True)
    return logits


def process_logits(
    logits: torch.Tensor,
    batch: SamplingBatch,
    *,
    num_output_tokens: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    allowed_mask: torch.Tensor | None = None,
    constrained_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """All steps: log-probabilities of the law that each row's request asks for.

    Args: as of :func:`adjust_logits`.

    Returns:
        ``[N, V]`` float32 normalised log-probabilities, ``-inf`` where removed; a greedy row has
        0 at its best token and ``-inf`` elsewhere.

    Raises:
        ValueError: an argument that some row needs is missing.
    """
    logits = adjust_logits(
        logits,
        batch,
        num_output_tokens=num_output_tokens,
        output_counts=output_counts,
        prompt_mask=prompt_mask,
        allowed_mask=allowed_mask,
        constrained_rows=constrained_rows,
    )
    best_token_ids = logits.argmax(dim=-1, keepdim=True)
    # The best is 0, so no temperature can overflow it.
    logits = logits - logits.gather(1, best_token_ids)
    logits /= torch.where(batch.temperature == 0, 1.0, batch.temperature).unsqueeze(1)
    if batch.truncated_rows.numel() > 0:
        _truncate(logits, batch)
    if batch.has_min_p:
        logits.masked_fill_(logits < batch.min_p.log().unsqueeze(1), -torch.inf)
    if batch.greedy_rows.numel() > 0:
        one_hot = torch.full_like(logits[batch.greedy_rows], -torch.inf)
        logits[batch.greedy_rows] = one_hot.scatter_(1, best_token_ids[batch.greedy_rows], 0.0)
    return logits.log_softmax(dim=-1)


def block_token_counts(
    output_counts: torch.Tensor, draft_token_ids: torch.Tensor, num_draft_tokens: torch.Tensor
) -> torch.Tensor:
    """Token counts at every position of a block, as if the drafted tokens before it stood.

    Only for requests with penalties: the result is large.

    Args:
        output_counts: ``[M, V]`` integer, counts of the committed output of M requests.
        draft_token_ids: ``[M, K]`` int64; entries behind ``num_draft_tokens`` are not counted.
        num_draft_tokens: ``[M]`` int64.

    Returns:
        ``[M, K+1, V]`` of ``output_counts``' dtype; ``.flatten(0, 1)`` fits an expanded batch.
    """
    num_requests, num_columns = draft_token_ids.shape
    columns = torch.arange(num_columns, device=draft_token_ids.device)
    is_drafted = columns < num_draft_tokens.unsqueeze(1)
    counts = output_counts.unsqueeze(1).repeat(1, num_columns + 1, 1)
    for column in range(num_columns):
        token_ids = draft_token_ids[:, column].clamp(min=0).view(num_requests, 1, 1)
        increments = is_drafted[:, column].to(counts.dtype).view(num_requests, 1, 1)
        later = counts[:, column + 1 :]
        rows_of_later = (num_requests, num_columns - column, 1)
        later.scatter_add_(2, token_ids.expand(rows_of_later), increments.expand(rows_of_later))
    return counts


def sample_from_probs(probs: torch.Tensor, exponential_noise: torch.Tensor) -> torch.Tensor:
    """Sample one column a row: argmax of probability over standard exponential noise.

    Args:
        probs: ``[..., V]`` float, need not be normalised; a zero is never sampled.
        exponential_noise: ``[..., V]`` float of the same dtype, from ``Tensor.exponential_``.

    Returns:
        ``[...]`` int64.
    """
    smallest = torch.finfo(exponential_noise.dtype).tiny  # a zero would sample a zero
    return (probs / exponential_noise.clamp(min=smallest)).argmax(dim=-1)


def _apply_penalties(
    logits: torch.Tensor,
    batch: SamplingBatch,
    output_counts: torch.Tensor,
    prompt_mask: torch.Tensor,
) -> None:
    rows = batch.penalised_rows
    penalised = logits[rows]
    is_output = output_counts > 0
    repetition = batch.repetition_penalty[rows].unsqueeze(1)
    repeated = torch.where(penalised > 0, penalised / repetition, penalised * repetition)
    penalised = torch.where(is_output | prompt_mask, repeated, penalised)
    penalised -= batch.frequency_penalty[rows].unsqueeze(1) * output_counts
    penalised -= batch.presence_penalty[rows].unsqueeze(1) * is_output
    logits[rows] = penalised


def _truncate(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Top-k, then top-p of what is left, by a threshold on the logit so that ties stay."""
    rows = batch.truncated_rows
    truncated = logits[rows]
    vocab_size = truncated.shape[1]
    top_k = batch.top_k[rows].unsqueeze(1)
    num_best = min(vocab_size, max(batch.max_top_k, _NUM_BEST))
    best = truncated.topk(num_best, dim=-1).values
    kth_best = best.gather(1, top_k.clamp(min=1, max=num_best) - 1)
    kth_best.masked_fill_(top_k == 0, -torch.inf)
    truncated.masked_fill_(truncated < kth_best, -torch.inf)
    if batch.has_top_p:
        top_p = batch.top_p[rows].unsqueeze(1)
        log_mass = truncated.logsumexp(dim=-1, keepdim=True)
        threshold, is_reached = _nucleus(best, log_mass, top_p)
        if num_best < vocab_size and not is_reached.all():
            everything = truncated.sort(dim=-1, descending=True).values
            threshold, _ = _nucleus(everything, log_mass, top_p)
        truncated.masked_fill_(truncated < threshold, -torch.inf)
    logits[rows] = truncated


def _nucleus(
    descending: torch.Tensor, log_mass: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least logit of the fewest best tokens that hold ``top_p`` of the mass.

    Args:
        descending: ``[N, B]`` each row's best logits in falling order.
        log_mass: ``[N, 1]`` log-sum-exp of the whole row.
        top_p: ``[N, 1]``; 1 is off, with the threshold ``-inf``.

    Returns:
        ``[N, 1]`` thresholds, and ``[N, 1]`` bool whether the B tokens were enough.
    """
    mass = (descending - log_mass).exp_().cumsum(dim=-1, dtype=torch.float64)
    is_off = top_p >= 1
    last_needed = (mass < top_p).sum(dim=-1, keepdim=True).clamp_(max=descending.shape[1] - 1)
    threshold = descending.gather(1, last_needed).masked_fill_(is_off, -torch.inf)
    return threshold, is_off | (mass[:, -1:] >= top_p)
