"""From one pass's logits to every request's next tokens: one sampling pass a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch

from cluster.engine.grammar import GrammarMasks, GrammarMatcher
from cluster.engine.logprobs import position_logprobs
from cluster.engine.token_rules import TokenRules
from cluster.request import PositionLogprobs, SamplingParams, TokenSource
from cluster.speculation.coupling import coupled_pick, gumbel_noise
from cluster.speculation.proposal import DraftProposal, dequantize_draft_probs
from cluster.speculation.sampling import (
    SamplingBatch,
    adjust_logits,
    block_token_counts,
    process_logits,
)
from cluster.speculation.verification import Verification, verify_coupled, verify_rejection

_MAX_KEPT_BATCHES = 16


@dataclass(frozen=True)
class SampleInput:
    """One sequence that samples in this pass.

    Attributes:
        params: its sampling parameters.
        token_ids: its committed tokens (prompt and output), not changed.
        num_prompt_tokens: how many of them are the prompt.
        choice_index: part of the coupled noise.
        draft_token_ids: guesses verified in this pass, k of them; it owns k+1 rows of the logits.
        proposal: where they come from, for their draft distribution.
        grammar: what the output must follow, behind ``token_ids``.
        rules: which tokens it may be made of.
    """

    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    choice_index: int
    draft_token_ids: tuple[int, ...]
    proposal: DraftProposal | None
    grammar: GrammarMatcher | None = None
    rules: TokenRules | None = None


@dataclass(frozen=True)
class SampleOutput:
    """Tokens that one sequence gained: accepted guesses, then one of the target's own.

    ``acceptance`` holds each guess's chance of acceptance, of rejection sampling only (see
    ``Verification.acceptance``).
    """

    token_ids: tuple[int, ...]
    token_sources: tuple[TokenSource, ...]
    logprobs: tuple[PositionLogprobs, ...]
    acceptance: tuple[float, ...] = ()

    @property
    def num_accepted_tokens(self) -> int:
        """Guesses among the tokens."""
        return len(self.token_ids) - 1


class Sampler:
    """Verifies and samples. Accepting and resampling use random streams of their own.

    Args:
        eos_token_ids: held back by ``min_tokens``.
        trust_drafter: believe the draft distributions; otherwise q is taken to be one-hot.
        seed: of the random streams (tests); unset: from the operating system.
    """

    def __init__(
        self,
        *,
        eos_token_ids: tuple[int, ...],
        trust_drafter: bool = True,
        device: torch.device | None = None,
        seed: int | None = None,
    ) -> None:
        self._batches = _BatchCache(eos_token_ids)
        self._eos_token_ids = eos_token_ids
        self._grammar_masks = GrammarMasks(torch.get_num_threads())
        self.trust_drafter = trust_drafter
        self._device = device or torch.device("cpu")
        seeds = np.random.SeedSequence(seed).generate_state(2, dtype=np.uint64)
        self._accept_stream = torch.Generator(self._device).manual_seed(int(seeds[0] >> 1))
        self._recovery_stream = torch.Generator(self._device).manual_seed(int(seeds[1] >> 1))

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, inputs: Seq[SampleInput]) -> list[SampleOutput]:
        """Verifies the guesses of every sequence and samples what follows them.

        Args:
            logits: ``[rows, V]`` float32, ``len(draft_token_ids) + 1`` rows of each input.
            inputs: the sequences, at least one.
        """
        num_drafts = np.asarray([len(entry.draft_token_ids) for entry in inputs])
        first_rows = np.cumsum(num_drafts + 1) - num_drafts - 1
        outputs: dict[int, SampleOutput] = {}
        is_picked = [e.params.is_greedy or e.params.seed is not None for e in inputs]
        picked = [i for i, wanted in enumerate(is_picked) if wanted]
        drawn = [i for i, wanted in enumerate(is_picked) if not wanted]
        for members, verify in ((picked, self._verify_picks), (drawn, self._verify_rejection)):
            if not members:
                continue
            entries = [inputs[i] for i in members]
            block = _Block(entries, logits)
            rows = _padded_rows(first_rows[members], num_drafts[members])
            is_all = len(rows) == len(logits) and len(members) == len(inputs)  # nothing is padded
            padded = logits if is_all else logits[_sent(torch.from_numpy(rows), logits.device)]
            verification = verify(padded, block)
            for member, output in zip(members, _to_outputs(verification, block), strict=True):
                outputs[member] = output
        for i, entry in enumerate(inputs):
            if entry.params.logprobs is not None:
                outputs[i] = _with_logprobs(
                    outputs[i], entry.params.logprobs, logits[first_rows[i] :]
                )
        return [outputs[i] for i in range(len(inputs))]

    def _verify_picks(self, logits: torch.Tensor, block: _Block) -> Verification:
        """Greedy and seeded sequences: the target's own pick at every position.

        Args:
            logits: ``[R * (K+1), V]``.
        """
        positions = block.num_columns + 1
        batch, counts = self._parameters(block, positions)
        is_seeded = torch.tensor([not e.params.is_greedy for e in block.entries])
        if not bool(is_seeded.any()):
            picks = adjust_logits(logits, batch, **counts).argmax(dim=-1)
            return block.verify_coupled(picks)
        logprobs = process_logits(logits, batch, **counts)
        picks = logprobs.argmax(dim=-1)
        device = logits.device
        rows = _sent(is_seeded.repeat_interleave(positions).nonzero().squeeze(1), device)
        seeded = [e for e in block.entries if not e.params.is_greedy]
        next_positions = torch.tensor([len(e.token_ids) for e in seeded])
        noise = gumbel_noise(
            seeds=_repeat([e.params.seed or 0 for e in seeded], positions, device),
            choice_indices=_repeat([e.choice_index for e in seeded], positions, device),
            positions=_sent(
                (next_positions.unsqueeze(1) + torch.arange(positions)).reshape(-1), device
            ),
            token_ids=torch.arange(logits.shape[1], device=device),
        )
        picks[rows] = coupled_pick(logprobs[rows], noise)
        return block.verify_coupled(picks)

    def _verify_rejection(self, logits: torch.Tensor, block: _Block) -> Verification:
        positions = block.num_columns + 1
        batch, counts = self._parameters(block, positions)
        probs = process_logits(logits, batch, **counts).exp_()
        vocab_size = probs.shape[1]
        size, device = len(block.entries), logits.device
        prob_ids, prob_values = block.draft_probs(self.trust_drafter)
        uniforms = torch.rand(
            (size, block.num_columns), generator=self._accept_stream, device=device
        )
        noise = torch.empty((size, vocab_size), device=device)
        noise.exponential_(generator=self._recovery_stream)
        return verify_rejection(
            target_probs=probs.view(size, positions, vocab_size),
            draft_token_ids=block.draft_token_ids,
            draft_prob_token_ids=prob_ids,
            draft_prob_values=prob_values,
            num_draft_tokens=block.num_draft_tokens,
            accept_uniforms=uniforms,
            recovery_noise=noise,
        )

    def _parameters(
        self, block: _Block, positions: int
    ) -> tuple[SamplingBatch, dict[str, torch.Tensor]]:
        """Parameters of the padded rows, and what penalties and ``min_tokens`` need."""
        entries, device = block.entries, block.draft_token_ids.device
        batch, expanded = self._batches.get([e.params for e in entries], positions, device)
        extra: dict[str, torch.Tensor] = {}
        if batch.stop_rows.numel():
            outputs = torch.tensor([len(e.token_ids) - e.num_prompt_tokens for e in entries])
            rows = (outputs.unsqueeze(1) + torch.arange(positions)).reshape(-1)
            extra["num_output_tokens"] = _sent(rows, device)
        if batch.penalised_rows.numel():
            rows = batch.penalised_rows
            members = [entries[row] for row in rows.tolist()]
            vocab_size = block.vocab_size
            counts = torch.stack(
                [_counts(e.token_ids[e.num_prompt_tokens :], vocab_size) for e in members]
            )
            prompts = torch.stack(
                [_counts(e.token_ids[: e.num_prompt_tokens], vocab_size) > 0 for e in members]
            )
            blocks = block_token_counts(
                counts.to(device), block.draft_token_ids[rows], block.num_draft_tokens[rows]
            )
            extra["output_counts"] = blocks.flatten(0, 1)
            extra["prompt_mask"] = prompts.to(device).repeat_interleave(positions, dim=0)
        self._constrain(block, positions, extra)
        return expanded, extra

    def _constrain(self, block: _Block, positions: int, extra: dict[str, torch.Tensor]) -> None:
        """Adds what grammars and rules allow, each position's as if the guesses before it stood.

        A guess that is forbidden is never accepted, so nothing behind it matters.
        """
        entries = block.entries
        constrained = [
            i for i, e in enumerate(entries) if e.grammar is not None or e.rules is not None
        ]
        if not constrained:
            return
        allowed = torch.ones((len(constrained), positions, block.vocab_size), dtype=torch.bool)
        grammars = [
            (index, grammar, entries[member].draft_token_ids)
            for index, member in enumerate(constrained)
            if (grammar := entries[member].grammar) is not None
        ]
        if grammars:
            masks = self._grammar_masks.of(
                [member[1:] for member in grammars],
                num_positions=positions,
                vocab_size=block.vocab_size,
            )
            allowed[[member[0] for member in grammars]] = masks.view(len(grammars), positions, -1)
        for index, member in enumerate(constrained):
            entry = entries[member]
            if entry.rules is not None:
                output = entry.token_ids[entry.num_prompt_tokens :]
                entry.rules.narrow(allowed[index], output, entry.draft_token_ids)
        allowed = allowed.flatten(0, 1)
        starts = torch.tensor(constrained) * positions
        rows = (starts.unsqueeze(1) + torch.arange(positions)).reshape(-1)
        device = block.draft_token_ids.device
        extra["allowed_mask"] = allowed.to(device)
        extra["constrained_rows"] = rows.to(device)
        if "num_output_tokens" not in extra:
            return
        # Where nothing but an end is allowed, `min_tokens` cannot hold it back.
        for index, member in enumerate(constrained):
            params = block.entries[member].params
            if params.min_tokens > 0:
                ending = sorted(params.ending_token_ids(self._eos_token_ids))
                mine = slice(index * positions, (index + 1) * positions)
                others = allowed[mine].sum(dim=1) - allowed[mine][:, ending].sum(dim=1)
                extra["num_output_tokens"][rows[mine][others == 0].to(device)] = params.min_tokens


class _BatchCache:
    """Parameters as they were on the device last: requests sample together step after step."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids
        self._kept: OrderedDict[
            tuple[tuple[int, ...], int], tuple[list[SamplingParams], SamplingBatch, SamplingBatch]
        ] = OrderedDict()

    def get(
        self, params: list[SamplingParams], positions: int, device: torch.device
    ) -> tuple[SamplingBatch, SamplingBatch]:
        """One row for each of ``params``, and one for each of its ``positions``."""
        # What is kept holds its parameters, so that an id cannot come to mean others.
        key = (tuple(id(entry) for entry in params), positions)
        if key not in self._kept:
            batch = SamplingBatch.from_params(
                params, eos_token_ids=self._eos_token_ids, device=device
            )
            self._kept[key] = (params, batch, batch.expand(positions))
            if len(self._kept) > _MAX_KEPT_BATCHES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1:]


class _Block:
    """The drafted blocks of R sequences, padded to K columns."""

    def __init__(self, entries: list[SampleInput], logits: torch.Tensor) -> None:
        self.entries = entries
        self.vocab_size = logits.shape[1]
        lengths = [len(e.draft_token_ids) for e in entries]
        self.num_columns = max(lengths)
        drafted = np.zeros((len(entries), self.num_columns), dtype=np.int64)
        for row, entry in enumerate(entries):
            drafted[row, : lengths[row]] = entry.draft_token_ids
        self.draft_token_ids = _sent(torch.from_numpy(drafted), logits.device)
        self.num_draft_tokens = _sent(torch.tensor(lengths), logits.device)

    def verify_coupled(self, picks: torch.Tensor) -> Verification:
        """Coupled verification; ``picks`` is ``[R * (K+1)]``."""
        return verify_coupled(
            target_picks=picks.view(len(self.entries), -1),
            draft_token_ids=self.draft_token_ids,
            num_draft_tokens=self.num_draft_tokens,
        )

    def draft_probs(self, trust_drafter: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Sparse draft distributions ``[R, K, T]``; one-hot where there is none to believe."""
        proposals = [e.proposal if trust_drafter else None for e in self.entries]
        widths = [
            p.draft_prob_token_ids.shape[1]
            for p in proposals
            if p is not None and p.draft_prob_token_ids is not None
        ]
        if not widths or self.num_columns == 0:
            return None, None
        shape = (len(self.entries), self.num_columns, max(widths))
        token_ids = np.zeros(shape, dtype=np.int64)
        values = np.zeros(shape, dtype=np.float16)
        for row, (entry, proposal) in enumerate(zip(self.entries, proposals, strict=True)):
            length = len(entry.draft_token_ids)
            if (
                proposal is None
                or proposal.draft_prob_token_ids is None
                or proposal.draft_prob_values is None
            ):
                token_ids[row, :length, 0] = entry.draft_token_ids
                values[row, :length, 0] = 1.0
                continue
            width = proposal.draft_prob_token_ids.shape[1]
            token_ids[row, :length, :width] = proposal.draft_prob_token_ids[:length]
            values[row, :length, :width] = proposal.draft_prob_values[:length]
        device = self.draft_token_ids.device
        wire_values = _sent(torch.from_numpy(values), device)
        return _sent(torch.from_numpy(token_ids), device), dequantize_draft_probs(wire_values)


def _padded_rows(first_rows: np.ndarray, num_drafts: np.ndarray) -> np.ndarray:
    """``[R * (K+1)]`` rows of the flat logits; columns behind a block repeat its last row."""
    columns = np.arange(num_drafts.max() + 1)
    padded = first_rows[:, None] + np.minimum(columns[None, :], num_drafts[:, None])
    return padded.reshape(-1)


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it has to do before."""
    return values.to(device, non_blocking=True)


def _repeat(values: list[int], times: int, device: torch.device) -> torch.Tensor:
    return _sent(torch.tensor(values, dtype=torch.int64), device).repeat_interleave(times)


def _counts(token_ids: list[int], vocab_size: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(token_ids, dtype=torch.int64), minlength=vocab_size)


def _to_outputs(verification: Verification, block: _Block) -> list[SampleOutput]:
    outputs = []
    # All in one: each of them would be a copy of its own from the device.
    integers = (
        verification.num_accepted_tokens.unsqueeze(1),
        verification.is_bonus.to(torch.int64).unsqueeze(1),
        verification.output_token_ids,
    )
    rows = torch.cat(integers, dim=1).tolist()
    chances = (
        [[]] * len(rows) if verification.acceptance is None else verification.acceptance.tolist()
    )
    for (num_accepted, is_bonus, *row), chance, entry in zip(
        rows, chances, block.entries, strict=True
    ):
        last = TokenSource.BONUS if is_bonus else TokenSource.RECOVERED
        if not entry.draft_token_ids:
            last = TokenSource.TARGET
        sources = (TokenSource.ACCEPTED,) * num_accepted + (last,)
        acceptance = tuple(chance[: len(entry.draft_token_ids)])
        outputs.append(SampleOutput(tuple(row[: num_accepted + 1]), sources, (), acceptance))
    return outputs


def _with_logprobs(output: SampleOutput, num_top: int, logits: torch.Tensor) -> SampleOutput:
    """Adds the target's own log-probabilities, of its unprocessed logits ``[rows, V]``."""
    positions = position_logprobs(logits, output.token_ids, num_top)
    return replace(output, logprobs=tuple(positions))
