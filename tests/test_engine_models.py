"""Any Hugging Face causal LM with a plan: other architectures than the project's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from cluster.bench.judge import Judgement, judge
from cluster.engine.layout import check_split, stage_layers
from cluster.engine.sharding import cut_tensor_parallel
from cluster.errors import CheckpointError, ConfigError
from cluster.request import Request, SamplingParams
from tests.engine_tools import Completion, make_config, make_engine, run, run_sharded
from tests.target_models import OTHERS, TARGETS, save_target

CONFIGS = {**TARGETS, **OTHERS}


def make_requests() -> list[Request]:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    return [
        Request(
            request_id=f"r{n}",
            prompt_token_ids=tuple((3 * n + k) % 80 for k in range(n)),
            sampling=params,
        )
        for n in (1, 5, 17, 40)
    ]


def judge_all(model: str, done: dict[str, Completion]) -> Judgement:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total = Judgement()
    for request in make_requests():
        total += judge(
            reference,
            prompt_token_ids=list(request.prompt_token_ids),
            output_token_ids=done[request.request_id].token_ids,
            params=request.sampling,
        )
    return total


@pytest.mark.parametrize("name", OTHERS)
def test_outputs_agree_with_transformers(tmp_path: Path, name: str) -> None:
    model = save_target(CONFIGS[name], tmp_path)
    verdict = judge_all(model, run(make_engine(make_config(model)), make_requests()))
    assert verdict.num_positions == 80
    assert verdict.num_mismatches == 0


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [("llama-with-biases", 2, 1), ("mistral-sliding-window", 1, 3), ("qwen2", 2, 2)],
)
@pytest.mark.slow
def test_shards_agree_with_transformers(
    tmp_path: Path, name: str, tensor: int, pipeline: int
) -> None:
    model = save_target(CONFIGS[name], tmp_path)
    config = make_config(model, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    verdict = judge_all(model, run_sharded(config, make_requests()))
    assert verdict.num_positions == 80
    assert verdict.num_mismatches == 0


def test_models_that_cannot_be_cut_are_refused_by_name(tmp_path: Path) -> None:
    def unused(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    cut = {"tensor_rank": 0, "all_reduce": unused}
    llama = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with pytest.raises(ConfigError, match="num_attention_heads"):
        check_split(llama.config.to_dict(), tensor_parallel_size=3, pipeline_parallel_size=1)
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        check_split(llama.config.to_dict(), tensor_parallel_size=4, pipeline_parallel_size=1)
    with pytest.raises(ConfigError, match="k_proj into heads of 8"):
        cut_tensor_parallel(llama, tensor_parallel_size=4, **cut)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with pytest.raises(ConfigError, match="no tensor-parallel plan"):
        cut_tensor_parallel(gpt2, tensor_parallel_size=2, **cut)
    with pytest.raises(ConfigError, match="has 3 layers"):
        stage_layers(3, 4, 0)


def test_stages_share_the_layers_without_gap_or_overlap() -> None:
    for num_layers in range(1, 12):
        for num_stages in range(1, num_layers + 1):
            stages = [stage_layers(num_layers, num_stages, s) for s in range(num_stages)]
            assert [layer for stage in stages for layer in stage] == list(range(num_layers))
            sizes = [len(stage) for stage in stages]
            assert max(sizes) - min(sizes) <= 1


def test_broken_checkpoints_are_refused_by_file(tmp_path: Path) -> None:
    model = save_target(CONFIGS["llama"], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="model"):
        make_engine(make_config(model))
    with pytest.raises(CheckpointError, match=r"config\.json|nowhere"):
        make_engine(make_config(str(tmp_path / "nowhere")))
