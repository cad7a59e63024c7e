"""A target and a block drafter of one family in the engine: outputs are the target's own, and what
is drafted is what the drafter makes of transformers' own hidden states of the target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from cluster.engine.draft_block import BlockMethod
from cluster.models.checkpoint import build_drafter, load_drafter, save_drafter
from cluster.models.drafter_config import load_drafter_config
from cluster.models.dspark import DSparkDrafter
from cluster.models.dspark_config import DSparkConfig
from cluster.request import Request, SamplingParams
from tests.block_drafters import TINY_DEEPSEEK_V4, TINY_GEMMA4
from tests.engine_tools import make_config, make_engine, run
from tests.target_models import TARGETS, VOCAB_SIZE, save_target

DRAFTED = ("dspark_block_size", "dspark_markov_rank", "dspark_target_layer_ids")


def add_gemma4_drafter(target: Path, config: PretrainedConfig) -> Path:
    folder = target / "drafter"
    data = {
        **TINY_GEMMA4,
        "vocab_size": VOCAB_SIZE,
        # transformers gives the last layer's output only behind the final norm.
        "target_layer_ids": [-1, 0, 1],
        "hidden_size": config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    save_drafter(random_drafter(DSparkConfig.from_dict(data)), folder, torch.float32)
    return folder


def add_draft_module(target: Path, config: PretrainedConfig) -> Path:
    """As published: in the target's own folder, with its embedding and head."""
    path = target / "config.json"
    data = {**json.loads(path.read_text()), **{key: TINY_DEEPSEEK_V4[key] for key in DRAFTED}}
    path.write_text(json.dumps({**data, "dspark_noise_token_id": 7}))
    tensors = load_file(target / "model.safetensors")
    save_file({"mtp.0.norm.weight": torch.ones(1)}, target / "model.safetensors")
    shape = load_drafter_config(target)
    assert isinstance(shape, DSparkConfig)
    module = random_drafter(shape).checkpoint_tensors()
    module = {name: value.contiguous() for name, value in module.items() if "mtp." in name}
    save_file(tensors | module, target / "model.safetensors", metadata={"format": "pt"})
    return target


def random_drafter(config: DSparkConfig) -> DSparkDrafter:
    drafter = build_drafter(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for value in drafter.state_dict(keep_vars=True).values():
        value.data.normal_(std=0.3, generator=generator)
    return drafter


@pytest.mark.parametrize(
    ("family", "add"), [("gemma4", add_gemma4_drafter), ("deepseek-v4", add_draft_module)]
)
def test_pair_of_one_family(family, add, tmp_path, monkeypatch):
    target = save_target(TARGETS[family], tmp_path)
    folder = add(tmp_path, TARGETS[family])
    requests = [
        Request(
            request_id=f"r{length}",
            prompt_token_ids=tuple((5 * length + k * k) % VOCAB_SIZE for k in range(length)),
            sampling=SamplingParams(temperature=0.0, max_tokens=12),
        )
        for length in (1, 6, 21)
    ]
    limits = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 24}
    plain = run(make_engine(make_config(target, **limits)), requests)

    proposals: list[tuple[str, int, list[int]]] = []
    original = BlockMethod.run

    def record(method: BlockMethod, drafts: Any) -> Any:
        results = original(method, drafts)
        for draft, result in zip(drafts, results, strict=True):
            sequence = draft.sequence
            key = sequence.session.request_id, sequence.committed_length
            proposals.append((*key, list(result.draft_token_ids)))
        return results

    monkeypatch.setattr(BlockMethod, "run", record)
    engine = make_engine(make_config(target, str(folder), **limits))
    drafted = run(engine, requests)
    assert {k: v.token_ids for k, v in drafted.items()} == {
        k: v.token_ids for k, v in plain.items()
    }
    assert engine.load().stats.num_draft_tokens > 60

    drafter = load_drafter(folder)
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    compared = 0
    for request in requests:
        text = [*request.prompt_token_ids, *drafted[request.request_id].token_ids]
        rows = [p for p in proposals if p[0].startswith(request.request_id)]
        expected = draft_from(drafter, reference, text, [length for _, length, _ in rows])
        for (_, _, tokens), (greedy, margins) in zip(rows, expected, strict=True):
            # What follows a tie has no right answer.
            sure = next((k for k, m in enumerate(margins) if m < 1e-3), len(margins))
            sure = min(sure, len(tokens))  # near a request's end fewer are asked for
            assert tokens[:sure] == greedy[:sure]
            compared += sure
    assert compared > 60


@torch.no_grad()
def draft_from(
    drafter: DSparkDrafter, reference: Any, text: list[int], lengths: list[int]
) -> list[tuple[list[int], list[float]]]:
    """Greedy blocks after each of ``lengths`` tokens of ``text``, by the path that training takes;
    with each token's lead over the next best."""
    states = reference(
        torch.tensor([text]), use_cache=False, output_hidden_states=True
    ).hidden_states
    streams = [
        reference.get_input_embeddings()(torch.tensor([text]))
        if layer_id == -1
        else states[layer_id + 1]
        for layer_id in drafter.config.target_layer_ids
    ]
    features = torch.cat([s.mean(dim=2) if s.dim() == 4 else s for s in streams], dim=-1)
    anchors = torch.tensor([[length - 1 for length in lengths]])
    hidden = drafter.packed_hidden(
        torch.tensor([text]), drafter.project_features(features), anchors
    )[0]
    results = []
    for row, length in zip(hidden, lengths, strict=True):
        tokens, margins, state = [text[length - 1]], [], None
        for slot in row:
            logits, state = drafter.markov_step(
                drafter.base_logits(slot[None]), torch.tensor(tokens[-1:]), slot[None], state
            )
            best = logits[0].topk(2).values
            margins.append(float(best[0] - best[1]))
            tokens.append(int(logits[0].argmax()))
        results.append((tokens[1:], margins))
    return results
