"""Drafting token by token: a causal language model and EAGLE-3, against each run from scratch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.config import DrafterConfig
from cluster.engine.draft_autoregressive import AutoregressiveMethod
from cluster.engine.draft_causal_lm import CausalLMNetwork, load_causal_lm
from cluster.engine.draft_client import (
    DraftOutcome,
    DraftResult,
    DraftRound,
    DraftSampling,
    DraftSequence,
    SessionKey,
)
from cluster.engine.draft_eagle3 import Eagle3Network
from cluster.engine.draft_engine import DraftEngine
from cluster.errors import ConfigError
from cluster.models.eagle3_config import LLAMA, QWEN3
from cluster.speculation.proposal import DraftProposal, dequantize_draft_probs
from tests.eagle3_tools import VOCAB as EAGLE3_VOCAB
from tests.eagle3_tools import WIDTH, make_eagle3, make_reference
from tests.models import save_tiny_target
from tests.target_models import OTHERS, TARGETS, save_target

BLOCK = 5
GREEDY = DraftSampling(temperature=0.0)
COUPLED = DraftSampling(temperature=0.9, top_k=20, seed=7)
SAMPLED = DraftSampling(temperature=0.8, send_probs=True)

MakeEngine = Callable[..., DraftEngine]


class Text:
    """A sequence that grows: its tokens, the features of each, and its session.

    ``width`` 0: without features.
    """

    def __init__(self, name: str, vocab_size: int, width: int, seed: int = 0) -> None:
        self.key = SessionKey(name, 0)
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(vocab_size, (60,), generator=generator).tolist()
        self.features = torch.randn(60, width, generator=generator)

    def feed(self, engine: DraftEngine, start: int, end: int) -> int | None:
        """Appends positions ``start .. end-1``."""
        return engine.append(
            "a", self.key, start, self.features[start:end], self.tokens[start : end + 1]
        )

    def part(self, length: int, known: int, count: int = BLOCK) -> tuple[DraftSequence, Any]:
        """This sequence of a round behind ``length`` committed tokens; ``known`` were fed."""
        sequence = DraftSequence(
            session=self.key,
            committed_length=length,
            num_features=length - 1 - known,
            new_token_ids=tuple(self.tokens[known:length]),
            num_speculative_tokens=count,
        )
        return sequence, self.features[known : length - 1]

    def draft(self, engine: DraftEngine, length: int, known: int, count: int = BLOCK) -> Any:
        """The result of a round of this sequence alone."""
        ((result,),) = draft(engine, self.part(length, known, count))
        return result


def draft(engine: DraftEngine, *parts: tuple[DraftSequence, Any]) -> list[list[DraftResult]]:
    rows = torch.cat([rows for _, rows in parts])
    return engine.draft([("a", DraftRound(tuple(part for part, _ in parts), rows))])


def make_engine(network: Any, *, seed: int = 1, block: int = BLOCK, **options: Any) -> DraftEngine:
    config = DrafterConfig(**{"kv_cache_memory_mb": 1, "page_size": 4, **options})
    generator = torch.Generator().manual_seed(seed)
    return DraftEngine(AutoregressiveMethod(network, config, block, 16, generator), config)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    return save_tiny_target(folder, num_hidden_layers=2, max_position_embeddings=64, scale=3.0)


@pytest.fixture(params=["draft_model", "eagle3"])
def network(request: pytest.FixtureRequest, language_model: str) -> Any:
    if request.param == "eagle3":
        return Eagle3Network(make_eagle3(LLAMA))
    model = load_causal_lm(language_model, torch.float32, torch.device("cpu"))
    return CausalLMNetwork(model)


def text_for(network: Any, name: str = "r", seed: int = 0) -> Text:
    return Text(name, network.vocab_size, network.feature_size, seed)


def same(ours: DraftProposal, theirs: DraftProposal) -> bool:
    close = np.allclose(ours.confidences, theirs.confidences, atol=1e-5)
    return close and ours.draft_token_ids == theirs.draft_token_ids


# ------------------------------------------------------------------- against each from scratch


@pytest.mark.parametrize(
    "architecture", ["qwen3", "llama", "gemma4-shared-keys", "mistral-sliding-window"]
)
def test_a_language_model_drafts_its_own_greedy_continuation(
    architecture: str, tmp_path: Path
) -> None:
    folder = save_target({**TARGETS, **OTHERS}[architecture], tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    network = CausalLMNetwork(load_causal_lm(folder, torch.float32, torch.device("cpu")))
    engine, text = make_engine(network), text_for(network)
    engine.open("a", text.key, GREEDY)
    assert text.feed(engine, 0, 6) == 6
    known = 6
    # The text goes its own way: every round's drafts are rejected at some place, or all committed.
    for step, length in enumerate((7, 8, 11, 17, 18)):
        proposal = text.draft(engine, length, known).proposal
        tokens = list(text.tokens[:length])
        for position, confidence in enumerate(proposal.confidences):
            with torch.inference_mode():
                logits = plain(torch.tensor([tokens])).logits[0, -1]
            assert confidence == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
            assert proposal.draft_token_ids[position] == int(logits.argmax())
            tokens.append(int(logits.argmax()))
        if step == 2:  # full acceptance: all drafts and one more are committed
            text.tokens[length : length + BLOCK] = proposal.draft_token_ids
        known = length - 1


@pytest.mark.parametrize("architecture", [QWEN3, LLAMA])
def test_eagle3_drafts_what_loops_over_all_entries_draft(architecture: str) -> None:
    drafter = make_eagle3(architecture)
    engine = make_engine(Eagle3Network(drafter))
    text = Text("r", EAGLE3_VOCAB, WIDTH)
    engine.open("a", text.key, GREEDY)
    assert text.feed(engine, 0, 6) == 6
    known = 6
    for length in (7, 8, 11, 17, 18):
        proposal = text.draft(engine, length, known).proposal
        reference = make_reference(drafter)
        for entry in range(length - 1):
            hidden = reference.add(text.features[entry], text.tokens[entry + 1])
        for token, confidence in zip(proposal.draft_token_ids, proposal.confidences, strict=True):
            law = reference.logits(hidden)
            assert token == int(law.argmax())
            assert confidence == pytest.approx(float(law.softmax(-1).max()), abs=1e-5)
            hidden = reference.add(hidden, token)
        known = length - 1


def test_tokens_outside_a_reduced_vocabulary_are_never_drafted() -> None:
    drafter = make_eagle3(LLAMA)
    known_ids = set(drafter.draft_token_ids().tolist())
    assert len(known_ids) < EAGLE3_VOCAB
    engine = make_engine(Eagle3Network(drafter))
    for seed, sampling in enumerate([GREEDY, COUPLED, SAMPLED]):
        text = Text(f"r{seed}", EAGLE3_VOCAB, WIDTH, seed)
        engine.open("a", text.key, sampling)
        proposal = text.draft(engine, 9, 0).proposal
        proposal.validate(vocab_size=EAGLE3_VOCAB, max_tokens=BLOCK)
        assert set(proposal.draft_token_ids) <= known_ids
        if sampling is SAMPLED:
            probs = dequantize_draft_probs(torch.from_numpy(proposal.draft_prob_values)).numpy()
            supports = set(proposal.draft_prob_token_ids[probs > 0].tolist())
            assert supports <= known_ids


# ------------------------------------------------------------------------------- the same anyhow


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED])
def test_feeding_in_parts_and_by_rounds_equals_feeding_at_once(
    network: Any, sampling: DraftSampling
) -> None:
    whole, parts = make_engine(network), make_engine(network)
    text = text_for(network)
    for engine in (whole, parts):
        engine.open("a", text.key, sampling)
    assert text.feed(whole, 0, 40) == 40
    assert text.feed(parts, 0, 18) == 18
    assert text.feed(parts, 18, 20) == 20
    assert text.feed(parts, 16, 23) == 23  # overlap is skipped
    text.draft(parts, 27, 23)
    text.draft(parts, 31, 24)  # again with overlap
    assert text.feed(parts, 30, 37) == 37
    at_once = text.draft(whole, 41, 40)
    by_rounds = text.draft(parts, 41, 37)
    assert same(by_rounds.proposal, at_once.proposal)
    for engine in (whole, parts):
        engine.check_integrity()


def test_a_batch_drafts_what_each_sequence_drafts_alone(network: Any) -> None:
    lengths, samplings = [2, 17, 9, 30, 13], [GREEDY, COUPLED, GREEDY, COUPLED, GREEDY]
    texts = [text_for(network, f"r{row}", row) for row in range(len(lengths))]
    batch = make_engine(network, page_size=8)
    alone = []
    for text, length, sampling in zip(texts, lengths, samplings, strict=True):
        engine = make_engine(network)
        for one in (engine, batch):
            one.open("a", text.key, sampling)
            # Some bring nothing new in their round, and most something.
            text.feed(one, 0, length - (1 if length == 13 else 2))
        known = length - (1 if length == 13 else 2)
        alone.append(text.draft(engine, length, known).proposal)
    parts = [
        text.part(length, length - (1 if length == 13 else 2))
        for text, length in zip(texts, lengths, strict=True)
    ]
    (results,) = draft(batch, *parts)
    for result, expected in zip(results, alone, strict=True):
        assert result.proposal is not None
        assert same(result.proposal, expected)
    batch.check_integrity()


def test_fewer_tokens_are_the_first_of_more(network: Any) -> None:
    proposals = []
    for count in (BLOCK, 2):
        engine, text = make_engine(network), text_for(network)
        engine.open("a", text.key, COUPLED)
        proposals.append(text.draft(engine, 12, 0, count).proposal)
    more, fewer = proposals
    assert fewer.num_draft_tokens == 2
    assert fewer.draft_token_ids == more.draft_token_ids[:2]


def test_confidences_do_not_know_the_drawn_token(network: Any) -> None:
    firsts: dict[int, float] = {}
    for seed in range(12):
        engine, text = make_engine(network, seed=seed), text_for(network)
        engine.open("a", text.key, SAMPLED)
        proposal = text.draft(engine, 12, 0).proposal
        firsts[proposal.draft_token_ids[0]] = proposal.confidences[0]
    assert len(firsts) > 1
    assert len(set(firsts.values())) == 1


# --------------------------------------------------------------------------------------- limits


def test_behind_its_context_a_model_drafts_nothing(network: Any) -> None:
    network.max_position_embeddings = 24
    engine, text = make_engine(network), text_for(network)
    engine.open("a", text.key, GREEDY)
    last = 24 - BLOCK
    assert text.draft(engine, last + 1, 0).proposal.num_draft_tokens == BLOCK
    beyond = text.draft(engine, last + 2, last)
    assert beyond.outcome is DraftOutcome.DRAFTED
    assert beyond.proposal.num_draft_tokens == 0
    assert text.feed(engine, last + 1, 50) == 50
    assert text.draft(engine, 52, 50).proposal.num_draft_tokens == 0
    engine.check_integrity()


def test_the_first_token_is_drafted_behind_by_those_that_can(network: Any) -> None:
    engine, text = make_engine(network), text_for(network)
    engine.open("a", text.key, GREEDY)
    proposal = text.draft(engine, 1, 0).proposal
    # EAGLE-3 has no entry before it has a feature.
    assert proposal.num_draft_tokens == (BLOCK if network.runs_anchor else 0)
    assert text.draft(engine, 2, 0).proposal.num_draft_tokens == BLOCK
    engine.check_integrity()


def test_an_evicted_session_is_unknown_and_comes_back_the_same(network: Any) -> None:
    engine = make_engine(network, max_sessions=2)
    texts = [text_for(network, f"r{row}", row) for row in range(3)]
    for text in texts:
        engine.open("a", text.key, GREEDY)
        text.feed(engine, 0, 20)
        first = text.draft(engine, 21, 20).proposal
    assert texts[0].draft(engine, 22, 21).outcome is DraftOutcome.UNKNOWN_SESSION
    again = texts[2]
    engine.close("a", again.key)
    engine.open("a", again.key, GREEDY)
    assert again.draft(engine, 21, 0).proposal.draft_token_ids == first.draft_token_ids
    engine.check_integrity()


def test_memory_is_bounded_and_short_memory_drops_idle_sessions(network: Any) -> None:
    engine = make_engine(network, page_size=1024)
    num_pages = engine._pages.num_pages
    assert num_pages * 1024 * network_bytes(network) <= 1 << 20
    texts = [text_for(network, f"r{row}", row) for row in range(num_pages + 1)]
    for text in texts:
        engine.open("a", text.key, GREEDY)
        assert text.draft(engine, 11, 0).proposal.num_draft_tokens == BLOCK
    assert engine.num_sessions == num_pages
    assert engine.length_of("a", texts[0].key) is None
    engine.check_integrity()
    with pytest.raises(ConfigError, match=r"drafter\.kv_cache_memory_mb"):
        make_engine(network, page_size=1 << 14)


def network_bytes(network: Any) -> int:
    """What a position takes: two tensors of two heads of eight float32, for each layer."""
    return 2 * 2 * 8 * 4 * int(network.num_layers)


def test_a_model_that_keeps_something_else_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_target(tmp_path)
    model = load_causal_lm(folder, torch.float32, torch.device("cpu"))
    network = CausalLMNetwork(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match=r"speculative\.model"):
        make_engine(network)


def test_more_tokens_than_the_model_has_positions_are_refused(network: Any) -> None:
    network.max_position_embeddings = BLOCK
    with pytest.raises(ConfigError, match=r"speculative\.num_speculative_tokens"):
        make_engine(network)
