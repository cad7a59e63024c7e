"""Many short generations through the real engine, scheduler and sampler, and a drafter over gRPC.

For ``tests/test_engine_law.py``: a target of six tokens with its exact law from plain transformers,
an ill-fitting drafter that is served from a process of its own, and mistakes to plant in both.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import itertools
import multiprocessing
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.engine.draft_block import BlockMethod
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.engine import Engine
from cluster.engine.sampler import Sampler
from cluster.models.checkpoint import load_drafter, save_drafter
from cluster.request import Request, SamplingParams, TokenSource
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.drafter_server import DrafterServer
from cluster.speculation.cost_model import CostModel
from cluster.speculation.proposal import DraftProposal, dequantize_draft_probs
from cluster.speculation.record import VerificationRecord
from cluster.speculation.sampling import sample_from_probs
from cluster.speculation.verification import Verification, verify_rejection
from tests.drafter_rpc_tools import PatientDraftClient, wait_for
from tests.engine_tools import make_config, make_engine
from tests.law import Floats, exact_law, reference_next_token_law
from tests.models import save_tiny_drafter, save_tiny_eagle3, save_tiny_target
from tests.speculative_rounds import RetrospectiveBudget

VOCAB_SIZE = 6
HIDDEN_SIZE = 16
BLOCK_SIZE = 3
PROMPT = (1, 4, 2)
# The first token comes with the prompt, the second while the prompt's features travel to the
# drafter. The law of the next four is tested; the first round has room to guess three of them.
NUM_PLAIN_TOKENS = 2
NUM_TOKENS = 4
MAX_NUM_SEQS = 512
PATIENCE_S = 240.0
DIGESTS = {"target": "t", "tokenizer": "k", "drafter": "d", "projection": "p"}


@dataclass(frozen=True)
class Case:
    """One kind of request; ``is_coupled`` gives every request a seed of its own."""

    name: str
    params: SamplingParams
    is_coupled: bool = False


class Fault(enum.Enum):
    """Mistakes that the law test must catch; see also ``tests.law.shift_law``.

    All but ``HOSTILE``, which must change nothing where the drafter is not trusted: it drafts any
    tokens, and is surest of those that are least likely to be right.
    """

    SHARED_NOISE = enum.auto()  # one noise for drafting and accepting
    NOT_RENORMALISED = enum.auto()  # verifies with truncated q, sampled from renormalised q
    DRAFT_PROB_AS_CONFIDENCE = enum.auto()  # admission by q(x_k)
    RETROSPECTIVE = enum.auto()  # admission of x_k by c_k+1
    HOSTILE = enum.auto()


# ------------------------------------------------------------------------- the models and the law


def save_pair(folder: Path) -> tuple[str, str]:
    """A target whose law depends on the tokens before, and a drafter that knows it badly."""
    target = save_tiny_target(
        folder / "target",
        seed=2,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    weak = save_tiny_drafter(
        folder / "weak", target, block_size=BLOCK_SIZE, target_layer_ids=[-1, 0], num_anchors=4
    )
    # As initialised it hardly looks at anything: its laws and confidences would be nearly constant.
    drafter = load_drafter(weak, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        parameters = dict(drafter.named_parameters())
        for name, parameter in parameters.items():
            if parameter.ndim > 1 and not name.startswith(("embed_tokens", "lm_head")):
                parameter.normal_(0, 0.4, generator=generator)
        # A confidence that tells much of the token before it: what an illegal planner would use.
        parameters["markov_head.markov_w1.weight"].mul_(3)
        parameters["confidence_head.proj.weight"][:, HIDDEN_SIZE:].mul_(4)
    save_drafter(drafter, folder / "drafter", dtype=torch.float32)
    return target, str(folder / "drafter")


def method_settings(method: str, target: str, folder: Path) -> dict[str, Any]:
    """The ``speculative`` part for another way of drafting, its checkpoint made in ``folder``."""
    settings = {"method": method, "num_speculative_tokens": BLOCK_SIZE}
    if method == "ngram":
        return settings | {"model": None, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    if method == "eagle3":
        layers = {"target_layer_ids": [0]}
        return settings | {"model": save_tiny_eagle3(folder / "eagle3", target, **layers)}
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape |= {"num_key_value_heads": 1, "max_position_embeddings": 32}
    return settings | {
        "model": save_tiny_target(folder / "lm", seed=4, vocab_size=VOCAB_SIZE, scale=0.3, **shape)
    }


@functools.cache
def _logits_by_output(target: str) -> dict[tuple[int, ...], list[float]]:
    """Plain transformers' next-token logits after the prompt and every possible output."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    logits: dict[tuple[int, ...], list[float]] = {}
    for length in range(NUM_PLAIN_TOKENS + NUM_TOKENS):
        outputs = list(itertools.product(range(VOCAB_SIZE), repeat=length))
        with torch.inference_mode():
            rows = model(torch.tensor([PROMPT + output for output in outputs])).logits[:, -1]
        logits.update(zip(outputs, rows.tolist(), strict=True))
    return logits


def target_law(target: str, params: SamplingParams) -> Floats:
    """Exact joint law of the tested tokens, whatever the plain ones before them are."""
    logits = _logits_by_output(target)

    def next_token_law(output: tuple[int, ...]) -> Floats:
        return reference_next_token_law(logits[output], params, prompt=PROMPT, output=output)

    num_tokens = NUM_PLAIN_TOKENS + NUM_TOKENS
    law = exact_law(next_token_law, vocab_size=VOCAB_SIZE, num_tokens=num_tokens)
    return law.sum(axis=tuple(range(NUM_PLAIN_TOKENS)))


# ------------------------------------------------------------------------------------- generating


@dataclass
class Samples:
    """What one case's requests produced; ``tokens`` is ``[samples, NUM_TOKENS]``."""

    tokens: npt.NDArray[np.int64]
    sources: Counter[TokenSource] = field(default_factory=Counter)
    num_proposed_tokens: int = 0
    num_draft_tokens: int = 0
    num_late_proposals: int = 0


def generate(
    target: str,
    drafter: str,
    cases: Sequence[Case],
    *,
    num_samples: int,
    fault: Fault | None = None,
    token_cost: float = 0.25,
    is_changing: bool = False,
    **speculative: Any,
) -> dict[str, Samples]:
    """``num_samples`` outputs of each case, all cases side by side in every batch.

    Args:
        token_cost: of a token in a pass, in what a pass costs without any, by ``MAX_NUM_SEQS``.
            Admission chooses where what it comes to is near the chances of acceptance.
        is_changing: the load rises and falls, and so does how the engine speculates: whole blocks,
            budgets, groups that take turns, nothing for a while.
        speculative: keys of the configuration's ``speculative`` part.
    """
    config = make_config(
        target,
        drafter,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_SEQS * (BLOCK_SIZE + 1),
        page_size=4,
        max_model_len=16,
        # A late round would decode plainly, and so test nothing.
        speculative={"draft_timeout_ms": 1e3 * PATIENCE_S, **speculative},
    )
    limits = {"max_sessions": 4 * MAX_NUM_SEQS, "page_size": 4, "kv_cache_memory_mb": 4}
    config = config.model_copy(update={"drafter": config.drafter.model_copy(update=limits)})
    with _served_drafter(config, fault) as client, _faulty_engine(fault):
        engine = make_engine(config, client)
        planner = engine._speculator._planner
        planner._cost_model = _SteepCostModel(token_cost)
        if fault is Fault.RETROSPECTIVE:
            planner._budget = _Retrospective()
        samples = _run(engine, cases, num_samples, config.speculative if is_changing else None)
        engine.check()
    return samples


class _SteepCostModel(CostModel):
    """A pass's every token counts, so that admission must choose; it stays as it is."""

    def __init__(self, token_cost: float) -> None:
        sizes = (1, MAX_NUM_SEQS * (BLOCK_SIZE + 1))
        super().__init__({size: MAX_NUM_SEQS + token_cost * size for size in sizes})

    def observe_verify(
        self, num_tokens: int, seconds: float, *, num_context_tokens: int = 0
    ) -> None:
        pass


def _run(
    engine: Engine,
    cases: Sequence[Case],
    num_samples: int,
    changed: SpeculativeConfig | None,
) -> dict[str, Samples]:
    length = NUM_PLAIN_TOKENS + NUM_TOKENS
    results = {case.name: Samples(np.full((num_samples, length), -1)) for case in cases}
    waiting = itertools.product(range(num_samples), cases)
    places: dict[str, tuple[Samples, int]] = {}

    def count_proposed(record: VerificationRecord) -> None:
        samples, _ = places[record.request_id]
        samples.num_proposed_tokens += record.block_size

    engine.observe_rounds(count_proposed)
    max_active = 2 * MAX_NUM_SEQS
    changes = itertools.cycle(itertools.product(_LOADS, _POLICIES))
    for step in itertools.count():
        if changed is not None and step % _CHANGED_EVERY == 0:
            max_active, policy = next(changes)
            engine.use_speculation_policy(changed.model_copy(update=policy))
        for number, case in itertools.islice(waiting, max(max_active - len(places), 0)):
            request = _request(case, number, length)
            places[request.request_id] = results[case.name], number
            engine.add_request(request)
        if not places:
            break
        for output in engine.step():
            assert output.error is None
            samples, number = places[output.request_id]
            end = output.token_offset + len(output.token_ids)
            samples.tokens[number, output.token_offset : end] = output.token_ids
            samples.sources.update(output.token_sources)
            if output.usage is not None:
                del places[output.request_id]
                stats = output.usage.speculation
                samples.num_draft_tokens += stats.num_draft_tokens
                samples.num_late_proposals += stats.num_late_proposals
    for samples in results.values():
        samples.tokens = samples.tokens[:, NUM_PLAIN_TOKENS:]
    return results


# What a test of changing load goes through, in an order that brings every pair together.
_LOADS = (2 * MAX_NUM_SEQS, 40, MAX_NUM_SEQS, 3)
_POLICIES: tuple[dict[str, Any], ...] = (
    {"scheduler": "search", "grouping": "off"},
    {"scheduler": "search", "grouping": "always"},
    {"scheduler": "search", "switching": "auto"},
    {"scheduler": "prefix", "grouping": "always"},
    {"scheduler": "full", "grouping": "off"},
)
_CHANGED_EVERY = 6


def _request(case: Case, number: int, length: int) -> Request:
    seed = number if case.is_coupled else None
    return Request(
        request_id=f"{case.name}-{number}",
        prompt_token_ids=PROMPT,
        sampling=replace(case.params, seed=seed, max_tokens=length, ignore_eos=True),
    )


@contextmanager
def _served_drafter(config: ClusterConfig, fault: Fault | None) -> Iterator[GrpcDraftClient]:
    """A client of a ``DrafterServer`` in a process of its own."""
    assert config.speculative is not None
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_drafter, args=(config, fault, theirs), daemon=True)
    process.start()
    client = PatientDraftClient(
        replica_id="replica", digests=DIGESTS, vocab_size=VOCAB_SIZE, config=config.speculative
    )
    try:
        assert ours.poll(PATIENCE_S), "the drafter did not start"
        client.set_drafters([("d0", f"127.0.0.1:{ours.recv()}")])
        assert wait_for(client.is_ready, PATIENCE_S)
        yield client
        assert (client.stats.num_late, client.stats.num_lost, client.stats.num_dropped) == (0, 0, 0)
    finally:
        client.close()
        ours.close()
        process.join(PATIENCE_S)
        process.kill()


def _serve_drafter(config: ClusterConfig, fault: Fault | None, connection: Connection) -> None:
    assert config.speculative is not None
    torch.set_num_threads(1)
    _plant_in_drafter(fault)
    asyncio.run(_serve(build_draft_engine(config), config, connection))


async def _serve(engine: DraftEngine, config: ClusterConfig, connection: Connection) -> None:
    server = DrafterServer(engine, drafter_id="d0", digests=DIGESTS, config=config.drafter)
    connection.send(await server.start("127.0.0.1"))
    try:
        await asyncio.to_thread(connection.recv)
    except EOFError:  # the test is done
        await server.drain(0.1)


# ----------------------------------------------------------------------------------------- faults


def _plant_in_drafter(fault: Fault | None) -> None:
    """Lets the drafter send something else for confidences; rows must all be sampled ones."""
    patch = pytest.MonkeyPatch()  # never undone: the process has no other work
    original_run, original_sample = BlockMethod.run, sample_from_probs
    uniforms: list[torch.Tensor] = []

    def sample(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        chosen = original_sample(probs, noise)
        uniforms.append(1 - torch.exp(-noise.gather(1, chosen.unsqueeze(1)).squeeze(1)))
        return chosen

    def run(self: BlockMethod, drafts: Any) -> list[DraftProposal]:
        uniforms.clear()
        proposals = original_run(self, drafts)
        if fault is Fault.SHARED_NOISE:
            rows = torch.stack(uniforms, dim=1).tolist()
        else:
            rows = [_draft_probs(proposal) for proposal in proposals]
        return [
            replace(proposal, confidences=tuple(values[: proposal.num_draft_tokens]))
            for proposal, values in zip(proposals, rows, strict=True)
        ]

    generator = random.Random(1)

    def lie(self: BlockMethod, drafts: Any) -> list[DraftProposal]:
        proposals = []
        for proposal in original_run(self, drafts):
            tokens = [generator.randrange(VOCAB_SIZE) for _ in proposal.draft_token_ids]
            confidences = [
                generator.uniform(0.0, 0.5) if lied == drafted else generator.uniform(0.5, 1.0)
                for lied, drafted in zip(tokens, proposal.draft_token_ids, strict=True)
            ]
            proposals.append(
                replace(proposal, draft_token_ids=tuple(tokens), confidences=tuple(confidences))
            )
        return proposals

    if fault is Fault.HOSTILE:
        patch.setattr(BlockMethod, "run", lie)
    if fault is Fault.SHARED_NOISE:
        patch.setattr("cluster.engine.draft_sampling.sample_from_probs", sample)
    if fault in (Fault.SHARED_NOISE, Fault.DRAFT_PROB_AS_CONFIDENCE):
        patch.setattr(BlockMethod, "run", run)


def _draft_probs(proposal: DraftProposal) -> list[float]:
    """q(x_k) of each drafted token."""
    assert proposal.draft_prob_token_ids is not None
    probs = dequantize_draft_probs(torch.from_numpy(proposal.draft_prob_values))
    is_drafted = proposal.draft_prob_token_ids == np.array(proposal.draft_token_ids)[:, None]
    return [float(value) for value in (probs.numpy() * is_drafted).sum(axis=1).clip(max=1)]


class _Retrospective(RetrospectiveBudget):
    """For blocks that are shorter than ``BLOCK_SIZE`` too."""

    def plan(
        self,
        confidences: Floats,
        num_candidates: npt.NDArray[np.int64],
        *,
        cost_model: CostModel,
        num_requests: int,
        num_base_tokens: int,
        num_context_tokens: int = 0,
    ) -> npt.NDArray[np.int64]:
        whole = np.zeros((len(confidences), BLOCK_SIZE))
        whole[:, : confidences.shape[1]] = confidences
        whole[np.arange(BLOCK_SIZE) >= num_candidates[:, None]] = 0.0
        return super().plan(
            whole,
            num_candidates,
            cost_model=cost_model,
            num_requests=num_requests,
            num_base_tokens=num_base_tokens,
        )


@contextmanager
def _faulty_engine(fault: Fault | None) -> Iterator[None]:
    """Plants the fault's part on the target's side."""
    original_verify = Sampler._verify_rejection
    blocks: list[Any] = []

    def remember_block(self: Sampler, logits: torch.Tensor, block: Any) -> Verification:
        blocks[:] = [block]
        return original_verify(self, logits, block)

    def verify(*, accept_uniforms: torch.Tensor, **arguments: Any) -> Verification:
        for row, entry in enumerate(blocks[0].entries):
            if entry.proposal is not None:
                noise = entry.proposal.confidences[: len(entry.draft_token_ids)]
                accept_uniforms[row, : len(noise)] = torch.tensor(noise)
        return verify_rejection(accept_uniforms=accept_uniforms, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        if fault is Fault.SHARED_NOISE:
            patch.setattr(Sampler, "_verify_rejection", remember_block)
            patch.setattr("cluster.engine.sampler.verify_rejection", verify)
        if fault is Fault.NOT_RENORMALISED:
            patch.setattr(
                "cluster.engine.sampler.dequantize_draft_probs", lambda values: values.float()
            )
        yield
