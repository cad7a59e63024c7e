"""Every target architecture in the engine: with guesses and without, and what drafters are fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.bench.judge import Judgement, judge
from cluster.engine import compressed_attention
from cluster.engine.compressed_cache import CompressedCaches
from cluster.engine.engine import Engine
from cluster.engine.runner import Runner
from cluster.engine.step_input import StepInput
from cluster.engine.target import TargetShard
from cluster.models.checkpoint import Projection
from cluster.request import Request, SamplingParams
from tests.engine_tools import Completion, make_config, run
from tests.scripted_drafts import ScriptedDrafts
from tests.target_models import TARGETS, VOCAB_SIZE, save_target

PAGE_SIZE = 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
SEEDED = SamplingParams(temperature=0.8, seed=11, max_tokens=20)


def make_requests() -> list[Request]:
    """Prompts of one token and of several chunks, greedy and seeded in turn."""
    return [
        Request(
            request_id=f"r{length}",
            prompt_token_ids=tuple((3 * length + k * k) % VOCAB_SIZE for k in range(length)),
            sampling=SEEDED if index % 2 else GREEDY,
        )
        for index, length in enumerate((1, 5, 40, 17))
    ]


def make_shard(model: str, projection: Projection | None, **overrides: Any) -> TargetShard:
    values = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,
        "page_size": PAGE_SIZE,
        "num_pages": 1 + 18,  # too few for all requests' ends: some are computed twice
        **overrides,
    }
    return TargetShard(make_config(model, **values).target, None, projection)


def make_engine(shard: TargetShard, model: str, drafts: ScriptedDrafts | None) -> Engine:
    config = make_config(
        model,
        "unused" if drafts else None,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=24,
    )
    return Engine(config, Runner(shard), eos_token_ids=(), draft_client=drafts)


def judge_all(reference: PreTrainedModel, done: dict[str, Completion]) -> Judgement:
    total = Judgement()
    for request in make_requests():
        total += judge(
            reference,
            prompt_token_ids=list(request.prompt_token_ids),
            output_token_ids=done[request.request_id].token_ids,
            params=request.sampling,
        )
    return total


def make_projection(layer_ids: tuple[int, ...], hidden_size: int) -> Projection:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(hidden_size, len(layer_ids) * hidden_size, generator=generator)
    return Projection(weight, layer_ids)


def expected_features(
    reference: PreTrainedModel, projection: Projection, token_ids: list[int]
) -> torch.Tensor:
    """``[N, d]`` of transformers' own hidden states: the embedding's is the first of them."""
    with torch.inference_mode():
        states = reference(
            torch.tensor([token_ids]), use_cache=False, output_hidden_states=True
        ).hidden_states
    streams = [states[layer_id + 1][0] for layer_id in projection.target_layer_ids if layer_id >= 0]
    if -1 in projection.target_layer_ids:
        streams.insert(0, reference.get_input_embeddings()(torch.tensor(token_ids)))
    means = [s.mean(dim=1) if s.dim() == 3 else s for s in streams]
    return torch.cat(means, dim=-1) @ projection.weight.T


@pytest.mark.parametrize("name", TARGETS)
def test_guesses_change_nothing_and_features_are_the_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(compressed_attention, "_QUERIES_AT_ONCE", 10)  # a chunk takes several turns
    model = save_target(TARGETS[name], tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    projection = make_projection((-1, 0, 1), TARGETS[name].hidden_size)
    shard = make_shard(model, projection)
    requests = make_requests()

    plain = run(make_engine(shard, model, None), requests)
    texts = {r.request_id: [*r.prompt_token_ids, *plain[r.request_id].token_ids] for r in requests}
    drafts = ScriptedDrafts(texts, vocab_size=VOCAB_SIZE)
    engine = make_engine(shard, model, drafts)
    guessed = run(engine, requests)

    for done in (plain, guessed):
        verdict = judge_all(reference, done)
        assert (verdict.num_positions, verdict.num_mismatches) == (80, 0)
    assert {k: v.token_ids for k, v in plain.items()} == {
        k: v.token_ids for k, v in guessed.items()
    }
    load = engine.load()
    assert load.num_preemptions > 0
    assert 10 < load.stats.num_accepted_tokens < load.stats.num_draft_tokens - 10
    for request_id, rows in drafts.features.items():
        expected = expected_features(reference, projection, texts[request_id])
        assert set(rows) >= set(range(len(texts[request_id]) - drafts.block_size - 2))
        received = torch.stack(list(rows.values()))
        torch.testing.assert_close(received, expected[list(rows)], rtol=1e-4, atol=1e-3)
    if isinstance(shard.cache, CompressedCaches):
        assert shard.cache.num_sequences == 0


def compute(shard: TargetShard, token_ids: list[int], start: int) -> torch.Tensor:
    """Logits ``[N, V]`` of one sequence's next tokens; its pages are 1, 2, ..."""
    positions = np.arange(start, start + len(token_ids))
    num_pages = -(-(start + len(token_ids)) // PAGE_SIZE)
    step = StepInput(
        token_ids=np.asarray(token_ids),
        positions=positions,
        slots=PAGE_SIZE + positions,
        query_lens=np.asarray([len(token_ids)]),
        context_lens=np.asarray([start + len(token_ids)]),
        block_tables=np.arange(1, 1 + num_pages).reshape(1, -1),
        logit_rows=np.arange(len(token_ids)),
    )
    return shard.logits(shard.forward(step))


@pytest.mark.parametrize("name", ["deepseek-v4", "gemma4-shared-keys"])
def test_rejected_tokens_leave_nothing_wherever_windows_end(tmp_path: Path, name: str) -> None:
    model = save_target(TARGETS[name], tmp_path)
    shard = make_shard(model, None)
    text = [(k * k + 7) % VOCAB_SIZE for k in range(36)]
    whole = compute(shard, text, 0)
    for verified in range(0, 7):
        for start in (1, 8, 14, 15):
            compute(shard, text[:start], 0)
            wrong = [(token + 5) % VOCAB_SIZE for token in text[start + verified : start + 7]]
            compute(shard, text[start : start + verified] + wrong, start)
            # Rejected twice, the second time less far on than the first.
            compute(shard, [1, 2, 3, 4, 5, 6], start + verified)
            behind = compute(shard, text[start + verified :], start + verified)
            torch.testing.assert_close(behind, whole[start + verified :], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["gemma4-experts", "deepseek-v3", "deepseek-v4"])
def test_deterministic_logits_do_not_depend_on_guesses(tmp_path: Path, name: str) -> None:
    shard = make_shard(save_target(TARGETS[name], tmp_path), None, deterministic=True)
    text = [(k * k + 7) % VOCAB_SIZE for k in range(24)]
    singly = torch.cat([compute(shard, [token], start) for start, token in enumerate(text)])
    compute(shard, text[:8], 0)
    compute(shard, [*text[8:13], 1, 2, 3], 8)
    behind = compute(shard, text[13:], 13)
    assert torch.equal(behind, singly[13:])


def test_deepseek_v3_caches_latents_instead_of_heads(tmp_path: Path) -> None:
    config = TARGETS["deepseek-v3"]
    shard = make_shard(save_target(config, tmp_path), None)
    compute(shard, [1, 2, 3], 0)
    values = config.kv_lora_rank + config.qk_rope_head_dim
    assert shard.cache.bytes_per_token == 4 * config.num_hidden_layers * values


def test_a_sequence_of_v4_holds_a_bounded_state(tmp_path: Path) -> None:
    config = TARGETS["deepseek-v4"]
    shard = make_shard(save_target(config, tmp_path), None)
    caches = shard.cache
    assert isinstance(caches, CompressedCaches)
    sizes = []
    for start in range(0, 60, 6):
        compute(shard, [start % VOCAB_SIZE] * 6, start)
        compute(shard, [0], start + 6)  # a guess; the next pass begins before it
        (cache,) = caches._caches.values()
        layers = cache.layers
        assert all(layer.keys.shape[2] <= config.sliding_window - 1 + 7 for layer in layers)
        held = sum(
            stream.tokens.shape[2] for layer in layers[1:] for stream in layer._streams.values()
        )
        sizes.append(held)
    assert max(sizes) <= 5 * (5 + 7)
    for lost in (59, 70):  # forgotten, never seen
        with pytest.raises(RuntimeError, match="cannot cut"):
            compute(shard, [0], lost)
    caches.release(2)
    assert caches.num_sequences == 1
    caches.release(1)
    assert caches.num_sequences == 0
