"""Architectures that would be served wrongly are refused at load, by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV32Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from cluster.engine.target import TargetShard
from cluster.engine.target_config import load_text_config
from cluster.engine.target_model import check_servable
from cluster.errors import CheckpointError, ConfigError
from tests.engine_tools import make_config
from tests.target_models import SMALL, TARGETS, save_target

REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "no decoder layers": (
        GPT2Config(n_layer=1, n_embd=8, n_head=2),
        "GPT2LMHeadModel.*has no 'embed_tokens'",
    ),
    "sinks": (
        GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, head_dim=8),
        "GptOssAttention.*needs attention sinks",
    ),
    "soft cap on scores": (Gemma2Config(**SMALL, head_dim=8), "Gemma2Attention.*soft cap"),
    "scaled logits": (GraniteConfig(**SMALL, logits_scaling=4.0), "scales logits"),
    "chosen keys": (
        DeepseekV32Config(
            **{**SMALL, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 16},
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
        ),
        "DeepseekV32ForCausalLM cannot be served",
    ),
    "linear attention": (
        Qwen3NextConfig(**SMALL, num_experts=2, head_dim=8, linear_num_value_heads=4),
        "Qwen3NextForCausalLM.*state besides keys",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_paged_attention_lacks_is_refused(tmp_path: Path, what: str) -> None:
    config, why = REFUSED[what]
    model = save_target(config, tmp_path)
    with pytest.raises(ConfigError, match=why):
        TargetShard(make_config(model).target, None, None)


def test_layers_that_attend_on_their_own_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_target(TARGETS["llama"], tmp_path)
    attend = LlamaAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if self.layer_idx == 1:
            return hidden_states, None
        return attend(self, hidden_states, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*\[1\].*AttentionInterface"):
        TargetShard(make_config(model).target, None, None)


def test_quantised_latent_attention_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(TARGETS["deepseek-v3"]))
    check_servable(model, is_compressed=False)
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ConfigError, match="DeepseekV3ForCausalLM cannot be served quantised"):
        check_servable(model, is_compressed=False)


def test_a_configuration_that_contradicts_itself_names_its_file(tmp_path: Path) -> None:
    model = save_target(TARGETS["llama"], tmp_path)
    path = Path(model) / "config.json"
    config = json.loads(path.read_text())
    config["num_attention_heads"] = 7  # does not divide the hidden size
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json.*7"):
        load_text_config(model)
