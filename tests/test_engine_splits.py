"""Targets cut by tensor rank and by stage: the same numbers, or a refusal that says why."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from cluster.engine import target as target_module
from cluster.engine.layout import check_split, key_sources
from cluster.engine.step_input import StepInput
from cluster.engine.target import TargetShard
from cluster.engine.target_model import load_model
from cluster.errors import ConfigError
from cluster.models.checkpoint import Projection
from tests.engine_tools import make_config
from tests.target_models import OTHERS, TARGETS, VOCAB_SIZE, save_target
from tests.thread_mesh import ThreadMesh, on_all_ranks

CONFIGS: dict[str, PretrainedConfig] = {**TARGETS, **OTHERS}
TEXT = [(k * k + 7) % VOCAB_SIZE for k in range(24)]


def chunk(start: int, end: int) -> StepInput:
    """A pass over positions ``start .. end-1`` of TEXT on page 1, with logits of all."""
    positions = np.arange(start, end)
    return StepInput(
        token_ids=np.asarray(TEXT[start:end]),
        positions=positions,
        slots=len(TEXT) + positions,
        query_lens=np.asarray([end - start]),
        context_lens=np.asarray([end]),
        block_tables=np.asarray([[1]]),
        logit_rows=np.arange(end - start),
    )


def compute(shard: TargetShard) -> torch.Tensor | None:
    """``[N, V]`` logits of TEXT in two chunks, on ranks that have them."""
    logits = []
    for step in (chunk(0, 17), chunk(17, len(TEXT))):
        hidden = shard.forward(step)
        if shard.mesh is not None and shard.mesh.num_stages > 1:
            if not shard.mesh.is_first_stage:
                continue
            hidden = shard.receive_rows(step)
        logits.append(shard.logits(hidden))
    return torch.cat(logits) if logits else None


@pytest.mark.parametrize(
    ("name", "tensor", "stages"),
    [
        ("llama-with-biases", 2, 1),
        ("gemma4", 2, 1),
        ("gemma4", 1, 2),
        ("gemma4-shared-keys", 2, 1),
        ("gemma4-experts", 2, 1),
        ("gemma4-with-vision", 2, 1),
        ("deepseek-v3", 2, 1),
        ("deepseek-v3", 1, 3),
        ("deepseek-v3", 2, 2),
    ],
)
def test_split_models_have_the_same_logits_and_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tensor: int, stages: int
) -> None:
    model = save_target(CONFIGS[name], tmp_path)
    config = make_config(model, page_size=len(TEXT), num_pages=2, max_model_len=len(TEXT)).target
    hidden_size = CONFIGS[name].get_text_config().hidden_size
    projection = Projection(torch.randn(hidden_size, 3 * hidden_size), (-1, 0, 2))
    lock = threading.Lock()

    def load_alone(*args: Any, **options: Any) -> Any:
        with lock:  # transformers' loading is not made for threads
            return load_model(*args, **options)

    monkeypatch.setattr(target_module, "load_model", load_alone)

    def work(mesh: ThreadMesh) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        shard = TargetShard(config, mesh, projection)
        logits = compute(shard)
        slots = torch.arange(len(TEXT), 2 * len(TEXT))
        return logits, shard.gather_features(slots) if mesh.rank == 0 else None

    results = on_all_ranks(tensor, stages, work)
    whole = TargetShard(config, None, projection)
    logits = compute(whole)
    assert logits is not None
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        expected = reference(torch.tensor([TEXT]), use_cache=False).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for rank, (found, _) in enumerate(results):
        assert (found is None) == (rank >= tensor)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    features = whole.gather_features(torch.arange(len(TEXT), 2 * len(TEXT)))
    assert features.abs().min() > 0
    torch.testing.assert_close(results[0][1], features, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "tensor", "stages", "why"),
    [
        ("deepseek-v4", 2, 1, r"tensor_parallel_size.*deepseek_v4.*one shard"),
        ("deepseek-v4", 1, 2, r"pipeline_parallel_size.*deepseek_v4.*one shard"),
        ("gemma4-shared-keys", 1, 2, r"layer 3 reads the keys of layer 1.*another stage"),
        ("deepseek-v3", 3, 1, r"3 does not divide.*num_attention_heads"),
        ("gemma4-with-vision", 4, 1, r"4 does not divide.*num_key_value_heads"),
        ("llama", 1, 4, r"the model has 3 layers"),
    ],
)
def test_splits_that_would_be_wrong_are_refused_by_name(
    name: str, tensor: int, stages: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        check_split(
            CONFIGS[name].to_dict(), tensor_parallel_size=tensor, pipeline_parallel_size=stages
        )


def test_heads_of_single_layers_count_too() -> None:
    config = {
        **TARGETS["gemma4"].to_dict(),
        "per_layer_config": {"2": {"num_key_value_heads": 1}},
    }
    with pytest.raises(ConfigError, match=r"num_key_value_heads \(1\)"):
        check_split(config, tensor_parallel_size=2, pipeline_parallel_size=1)


def test_per_layer_inputs_need_a_single_stage() -> None:
    config = {**TARGETS["gemma4"].to_dict(), "hidden_size_per_layer_input": 8}
    with pytest.raises(ConfigError, match="hidden_size_per_layer_input"):
        check_split(config, tensor_parallel_size=1, pipeline_parallel_size=3)


def test_shared_layers_read_the_last_of_their_own_type() -> None:
    assert key_sources(TARGETS["gemma4-shared-keys"].to_dict()) == {3: 1, 4: 2, 5: 1}
    assert key_sources(TARGETS["gemma4"].to_dict()) == {}
    assert key_sources({"num_hidden_layers": 4}) == {}
