"""Checkpoints of block drafters: published ones are read, and written ones are read again."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import CheckpointError
from cluster.models import checkpoint
from cluster.models.drafter_config import load_drafter_config
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
from tests.checkpoint_tools import (
    PROJECTION,
    TINY,
    WEIGHTS,
    change_config,
    change_tensors,
    refusal,
    split,
    write_published,
)

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


def test_loading_draws_nothing_at_random(kind, published, monkeypatch):
    """Weights that are read anyway are neither initialised nor held twice."""

    def draw(weight: torch.Tensor, *_: Any, **__: Any) -> None:
        assert weight.is_meta, "a weight was initialised"

    for name in ("normal_", "uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, draw)
    checkpoint.load_drafter(published)
    with pytest.raises(AssertionError, match="initialised"):
        checkpoint.build_drafter(read_config(TINY[kind]))


def test_transformers_4_rotary_keys(tmp_path):
    write_published(tmp_path, TINY_QWEN3)
    change_config(tmp_path, rope_parameters=None, rope_theta=5000, rope_scaling=None)
    rope = load_drafter_config(tmp_path).rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 5000.0}


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
