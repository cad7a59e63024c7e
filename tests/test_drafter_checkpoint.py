"""Checkpoints of block drafters: published ones are read, written ones are read again, and what is
wrong with one is named before any of it is loaded."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from cluster.models import checkpoint
from cluster.models.drafter_config import check_drafter_files, load_drafter_config
from cluster.models.dspark import DSparkDrafter
from tests.block_drafters import (
    DEEPSEEK_V4,
    GEMMA4,
    QWEN3,
    TINY_DEEPSEEK_V4,
    TINY_GEMMA4,
    TINY_QWEN3,
    make_drafter,
    read_config,
)

TINY = {"qwen3": TINY_QWEN3, "gemma4": TINY_GEMMA4, "deepseek-v4": TINY_DEEPSEEK_V4}
# What else a published file may be: other heads, DFlash, keys and values apart.
VARIANTS = TINY | {
    "gated": {**TINY_QWEN3, "markov_head_type": "gated", "confidence_head_with_markov": False},
    "rnn": {**TINY_GEMMA4, "markov_head_type": "rnn", "enable_confidence_head": False},
    "dflash": {
        **{k: v for k, v in TINY_QWEN3.items() if "markov" not in k},
        "markov_rank": 0,
        "enable_confidence_head": False,
    },
    "gemma4-values": {**TINY_GEMMA4, "attention_k_eq_v": False, "final_logit_softcapping": None},
}
PROJECTION = {
    "qwen3": "fc.weight",
    "gemma4": "fc.weight",
    "deepseek-v4": "mtp.0.main_proj.weight",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_published(folder: Path, data: dict[str, Any]) -> DSparkDrafter:
    """A checkpoint as published: the configuration word for word, in one file."""
    drafter = make_drafter(data)
    tensors = {name: value.contiguous() for name, value in drafter.checkpoint_tensors().items()}
    (folder / "config.json").write_text(json.dumps(data))
    save_file(tensors, folder / WEIGHTS)
    return drafter


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def change_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / WEIGHTS
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def split(folder: Path) -> dict[str, str]:
    """Puts the tensors into two files under an index; returns its ``weight_map``."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def outputs(drafter: DSparkDrafter) -> list[torch.Tensor]:
    """Everything that a drafter computes, on fixed inputs in the weights' dtype."""
    generator = torch.Generator().manual_seed(5)
    dtype = drafter.fc.weight.dtype
    features = torch.randn(1, 9, 48, generator=generator).to(dtype)
    tokens = torch.randint(50, (1, 9), generator=generator)
    hidden = drafter.packed_hidden(
        tokens, drafter.project_features(features), torch.tensor([[4, 8]])
    )
    previous = torch.randint(50, (1, 2, 4), generator=generator)
    results = [hidden, drafter.block_logits(hidden, previous)]
    if drafter.confidence_head is not None:
        results.append(drafter.confidence_logit(hidden, previous))
    return results


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_drafter(folder)
    return caught.value


@pytest.fixture(params=TINY)
def kind(request) -> str:
    return str(request.param)


@pytest.fixture
def published(kind, tmp_path) -> Path:
    write_published(tmp_path, TINY[kind])
    return tmp_path


# ------------------------------------------------------------------------------ what is published


@pytest.mark.parametrize(
    ("data", "gigabytes"),
    [
        ({**GEMMA4}, 6.86),
        (
            {
                **QWEN3,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_attention_heads": 32,
                "num_target_layers": 36,
                "target_layer_ids": [1, 9, 17, 25, 33],
            },
            2.79,
        ),
        (
            {
                **QWEN3,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_attention_heads": 32,
                "num_target_layers": 36,
                "target_layer_ids": [1, 9, 17, 25, 33],
            },
            4.74,
        ),
    ],
    ids=["gemma4-12b", "qwen3-4b", "qwen3-8b"],
)
def test_sizes_are_those_of_the_published_files(data, gigabytes):
    with torch.device("meta"):
        tensors = checkpoint.build_drafter(read_config(data)).checkpoint_tensors()
    count = sum(value.numel() for value in tensors.values())
    assert round(2 * count / 1e9, 2) == gigabytes
    assert {"embed_tokens.weight", "lm_head.weight", "fc.weight"} <= set(tensors)
    assert ("layers.0.self_attn.v_proj.weight" in tensors) == ("attention_k_eq_v" not in data)


def test_deepseek_v4_has_the_published_tensors():
    config = read_config(DEEPSEEK_V4)
    with torch.device("meta"):
        tensors = checkpoint.build_drafter(config).checkpoint_tensors()
    # The published index counts 1568, 1565 and 1572 with the scales of fp8 and fp4 weights: one
    # for each expert matrix (768), five in attention, three in the shared expert, main_proj's.
    stages = Counter(name.split(".")[1] for name in tensors if name.startswith("mtp."))
    assert stages == {"0": 1568 - 777, "1": 1565 - 776, "2": 1572 - 776}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert shapes["mtp.0.main_proj.weight"] == (4096, 12288)
    assert shapes["mtp.1.hc_attn_fn"] == (24, 16384)
    assert shapes["mtp.2.confidence_head.proj.weight"] == (1, 4352)
    assert shapes["mtp.2.ffn.experts.255.w2.weight"] == (4096, 2048)
    assert shapes["embed.weight"] == shapes["head.weight"] == (129280, 4096)
    assert (config.context_window, config.min_speculative_tokens) == (128, 5)
    assert (config.num_target_layers, config.target_layer_ids) == (43, (40, 41, 42))


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_checkpoints_load(variant, tmp_path):
    drafter = write_published(tmp_path, VARIANTS[variant])
    loaded = checkpoint.load_drafter(tmp_path)
    assert loaded.config == drafter.config
    for ours, theirs in zip(outputs(loaded), outputs(drafter), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tmp_path):
    drafter = make_drafter(VARIANTS[variant])
    checkpoint.save_drafter(drafter, tmp_path, torch.float32)
    loaded = checkpoint.load_drafter(tmp_path)
    assert loaded.config == drafter.config
    assert loaded.state_dict().keys() == drafter.state_dict().keys()
    for name, value in drafter.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0, rtol=0)
    for ours, theirs in zip(outputs(loaded), outputs(drafter), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    projection = checkpoint.load_projection(tmp_path)
    assert projection.target_layer_ids == drafter.config.target_layer_ids
    torch.testing.assert_close(projection.weight, drafter.fc.weight, atol=0, rtol=0)


def test_several_files_under_an_index(kind, published):
    whole = outputs(checkpoint.load_drafter(published))
    weight_map = split(published)
    for ours, theirs in zip(outputs(checkpoint.load_drafter(published)), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert checkpoint.load_projection(published).weight.shape == (16, 48)
    other = next(f for f in weight_map.values() if f != weight_map[PROJECTION[kind]])
    (published / other).unlink()
    assert checkpoint.load_projection(published).weight.shape == (16, 48)
    error = refusal(published)
    assert (error.file, error.key) == (str(published / other), None)
    assert "no such file" in error.message


def test_bfloat16_keeps_rotary_frequencies(kind, published):
    plain = checkpoint.load_drafter(published)
    checkpoint.save_drafter(plain, published)
    assert json.loads((published / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = checkpoint.load_drafter(published, torch.bfloat16)
    assert rounded.fc.weight.dtype == torch.bfloat16
    assert outputs(rounded)[0].dtype == torch.bfloat16
    buffers = dict(rounded.rotary_emb.named_buffers())
    for name, value in plain.rotary_emb.named_buffers():
        torch.testing.assert_close(buffers[name], value, atol=0, rtol=0)


def test_deepseek_v4_keeps_its_fp32_weights(tmp_path):
    write_published(tmp_path, TINY_DEEPSEEK_V4)
    checkpoint.save_drafter(checkpoint.load_drafter(tmp_path), tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    float32 = {name for name, value in stored.items() if value.dtype == torch.float32}
    assert {name.split(".", 2)[2] for name in float32 if name.startswith("mtp.2.")} == {
        "attn.attn_sink",
        "ffn.gate.bias",
        *(f"hc_{where}_{what}" for where in ("attn", "ffn") for what in ("fn", "base", "scale")),
        *(f"hc_head_{what}" for what in ("fn", "base", "scale")),
    }
    loaded = checkpoint.load_drafter(tmp_path, torch.bfloat16).checkpoint_tensors()
    assert {name for name, value in loaded.items() if value.dtype == torch.float32} == float32


def test_deepseek_v4_beside_its_target(tmp_path):
    """Other tensors of the target are left alone, and transformers' names for its embedding and
    its head are known."""
    drafter = write_published(tmp_path, TINY_DEEPSEEK_V4)
    tensors = load_file(tmp_path / WEIGHTS)
    change_tensors(
        tmp_path,
        {
            "embed.weight": None,
            "model.embed_tokens.weight": tensors["embed.weight"],
            "layers.0.attn.wkv.weight": torch.zeros(3, dtype=torch.int8),
        },
    )
    for ours, theirs in zip(
        outputs(checkpoint.load_drafter(tmp_path)), outputs(drafter), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_transformers_4_rotary_keys(tmp_path):
    write_published(tmp_path, TINY_QWEN3)
    change_config(tmp_path, rope_parameters=None, rope_theta=5000, rope_scaling=None)
    rope = load_drafter_config(tmp_path).rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 5000.0}


# -------------------------------------------------------------------------------- what is refused

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


# ------------------------------------------------------------------------------------- the others


def test_digests_follow_contents(kind, published):
    drafter = checkpoint.load_drafter(published)
    checkpoint.save_drafter(drafter, published, torch.float32)
    whole = checkpoint.drafter_digest(published)
    projection = checkpoint.projection_digest(published)
    drafter.norm.weight.add_(1)
    checkpoint.save_drafter(drafter, published, torch.float32)
    assert checkpoint.drafter_digest(published) != whole
    assert checkpoint.projection_digest(published) == projection
    drafter.fc.weight.add_(1)
    checkpoint.save_drafter(drafter, published, torch.float32)
    assert checkpoint.projection_digest(published) != projection


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_drafter_of_another_target_is_refused(kind, key):
    target = {"hidden_size": 16, "vocab_size": 50, "num_hidden_layers": 3}
    config = read_config(TINY[kind])
    checkpoint.check_drafter_matches_target(config, target)
    target[key] += 1
    with pytest.raises(CheckpointError, match=key.replace("num_hidden", "num_target")):
        checkpoint.check_drafter_matches_target(config, target)


def test_math_of_the_fixture_is_not_empty():
    """Outputs compared above must differ between drafters, else equality says nothing."""
    ours = outputs(make_drafter(TINY_QWEN3))
    theirs = outputs(make_drafter({**TINY_QWEN3, "rms_norm_eps": 0.1}))
    assert all(math.isfinite(float(tensor.sum())) for tensor in ours)
    assert not torch.allclose(ours[0], theirs[0])
