"""What is wrong with a block drafter's checkpoint is named before any of it is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from cluster.models import checkpoint
from cluster.models.drafter_config import check_drafter_files, load_drafter_config
from tests.block_drafters import TINY_DEEPSEEK_V4, TINY_QWEN3
from tests.checkpoint_tools import (
    INDEX,
    PROJECTION,
    TINY,
    WEIGHTS,
    change_config,
    change_tensors,
    refusal,
    split,
    write_published,
)


@pytest.fixture(params=TINY)
def kind(request) -> str:
    return str(request.param)


@pytest.fixture
def published(kind, tmp_path) -> Path:
    write_published(tmp_path, TINY[kind])
    return tmp_path


SPECULATORS = {"speculators_model_type": "dflash"}
DEEPSPEC_ERRORS: list[tuple[dict[str, Any], str]] = [
    (SPECULATORS, "speculators_model_type"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "architectures"),
    ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"block_size": None}, "block_size"),
    ({"block_size": True}, "block_size"),
    ({"block_size": 0}, "block_size"),
    ({"target_layer_ids": [0, 3]}, "target_layer_ids"),
    ({"target_layer_ids": [1, 1]}, "target_layer_ids"),
    ({"target_layer_ids": [-2, 1]}, "target_layer_ids"),
    ({"target_layer_ids": []}, "target_layer_ids"),
    ({"mask_token_id": 50}, "mask_token_id"),
    ({"markov_head_type": "lstm"}, "markov_head_type"),
    ({"markov_rank": 0}, "confidence_head_with_markov"),
    ({"enable_confidence_head": "yes"}, "enable_confidence_head"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
]
ERRORS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "qwen3": [
        *DEEPSPEC_ERRORS,
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"layer_types": 2}, "layer_types"),
    ],
    "gemma4": [
        *DEEPSPEC_ERRORS,
        ({"num_global_key_value_heads": None}, "num_global_key_value_heads"),
        ({"global_head_dim": None}, "global_head_dim"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"rope_parameters": {"sliding_attention": {}}}, "rope_parameters"),
        ({"final_logit_softcapping": -1}, "final_logit_softcapping"),
        ({"enable_moe_block": True}, "enable_moe_block"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
    ],
    "deepseek-v4": [
        (SPECULATORS, "speculators_model_type"),
        ({"model_type": "deepseek_v41"}, "model_type"),
        ({"dspark_block_size": None}, "dspark_block_size"),
        ({"dspark_block_size": 0}, "dspark_block_size"),
        ({"dspark_noise_token_id": 50}, "dspark_noise_token_id"),
        ({"dspark_target_layer_ids": [1, 3]}, "dspark_target_layer_ids"),
        ({"dspark_markov_rank": None}, "dspark_markov_rank"),
        ({"hc_mult": None}, "hc_mult"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"swiglu_limit": None}, "swiglu_limit"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"o_groups": 3}, "o_groups"),
        ({"qk_rope_head_dim": 16}, "qk_rope_head_dim"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [(kind, changes, key) for kind, errors in ERRORS.items() for changes, key in errors],
)
def test_config_errors_name_file_and_key(kind, changes, key, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY[kind]))
    (tmp_path / WEIGHTS).write_bytes(b"")
    if kind == "deepseek-v4":
        save_file(
            {f"mtp.{stage}.norm.weight": torch.ones(1) for stage in range(3)}, tmp_path / WEIGHTS
        )
    change_config(tmp_path, **changes)
    error = refusal(tmp_path)
    assert (error.file, error.key) == (str(tmp_path / "config.json"), key)


def test_tensor_errors_name_file_and_key(kind, published):
    key = PROJECTION[kind]
    unknown = key.replace("weight", "wait")
    float8 = torch.zeros(16, 48).to(torch.float8_e4m3fn)
    for changes, wrong, message in (
        ({key: torch.ones(16, 16)}, key, "[16, 16], not [16, 48]"),
        ({unknown: torch.ones(16)}, unknown, "no weight of a DSpark drafter"),
        ({key: float8}, key, "quantised (F8_E4M3)"),
        ({key: torch.ones(16, 24, dtype=torch.int8)}, key, "quantised (I8)"),
        ({key: None}, key, "is missing"),
    ):
        original = (published / WEIGHTS).read_bytes()
        change_tensors(published, changes)
        error = refusal(published)
        assert (error.file, error.key) == (str(published / WEIGHTS), wrong)
        assert message in error.message
        (published / WEIGHTS).write_bytes(original)


def test_missing_tensor_of_an_index(kind, published):
    weight_map = split(published)
    key = PROJECTION[kind]
    file = published / weight_map.pop(key)
    save_file({k: v for k, v in load_file(file).items() if k != key}, file)
    (published / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    error = refusal(published)
    assert (error.file, error.key) == (str(published / INDEX), key)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"fc.weight": "../x"}}])
def test_broken_index(index, tmp_path):
    write_published(tmp_path, TINY_QWEN3)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(json.dumps(index))
    error = refusal(tmp_path)
    assert error.file == str(tmp_path / INDEX)
    assert error.key in ("weight_map", "fc.weight")


def test_files_that_are_cut_off(kind, published):
    config = load_drafter_config(published)
    path = published / WEIGHTS
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    names = json.loads(whole[8:header])
    last = max((v["data_offsets"][1], k) for k, v in names.items() if k != "__metadata__")[1]
    for length, key, message in (
        (len(whole) - 5, last, "cut off"),
        (header, next(iter(names)), "cut off"),
        (header - 5, None, "do not hold its header"),
        (3, None, "do not hold its header"),
        (0, None, "do not hold its header"),
    ):
        path.write_bytes(whole[:length])
        for check in (
            lambda: checkpoint.load_drafter(published),
            lambda: check_drafter_files(published, config),
        ):
            with pytest.raises(CheckpointError, match=message) as caught:
                check()
            assert caught.value.file == str(path)
            assert caught.value.key in (key, last)
    path.write_bytes(whole[:8] + b"?" + whole[9:])
    assert "broken safetensors header" in refusal(published).message
    path.unlink()
    assert "no such file" in refusal(published).message
    with pytest.raises(CheckpointError):
        checkpoint.drafter_digest(published)


def test_unreadable_configuration(published):
    path = published / "config.json"
    for content in ('{"architectures": [', "[]", ""):
        path.write_text(content)
        error = refusal(published)
        assert (error.file, error.key) == (str(path), None)
        assert "JSON" in error.message


def test_check_before_start_reads_no_tensor(kind, published):
    config = load_drafter_config(published)
    check_drafter_files(published, config)
    change_tensors(published, {PROJECTION[kind]: torch.ones(16, 47)})
    with pytest.raises(CheckpointError, match=r"\[16, 47\], not \[16, 48\]"):
        check_drafter_files(published, config)


def test_deepseek_v4_without_draft_module(tmp_path):
    write_published(tmp_path, TINY_DEEPSEEK_V4)
    tensors = load_file(tmp_path / WEIGHTS)
    change_tensors(tmp_path, {name: None for name in tensors if name.startswith("mtp.1.")})
    error = refusal(tmp_path)
    assert (error.file, error.key) == (str(tmp_path), "mtp.1")
    change_tensors(tmp_path, {name: None for name in tensors if name.startswith("mtp.")})
    assert refusal(tmp_path).key == "mtp.0"


def test_quantised_module_names_a_tensor(tmp_path):
    """As published: packed experts and scales beside every matrix."""
    write_published(tmp_path, TINY_DEEPSEEK_V4)
    change_tensors(
        tmp_path,
        {
            "mtp.0.ffn.experts.0.w1.weight": torch.zeros(12, 8, dtype=torch.int8),
            "mtp.0.ffn.experts.0.w1.scale": torch.zeros(12, 1).to(torch.float8_e8m0fnu),
        },
    )
    error = refusal(tmp_path)
    assert error.key in ("mtp.0.ffn.experts.0.w1.weight", "mtp.0.ffn.experts.0.w1.scale")
    assert "quantised" in error.message
