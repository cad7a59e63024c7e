"""EAGLE-3 checkpoints: both formats there and back, and what is wrong with one named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from cluster.models import checkpoint
from cluster.models.dspark_config import check_drafter_matches_target
from cluster.models.eagle3_checkpoint import load_eagle3, save_eagle3
from cluster.models.eagle3_config import LLAMA, QWEN3, Eagle3Config
from tests.eagle3_tools import ARCHITECTURES, NUM_LAYERS, VOCAB, WIDTH, make_eagle3

WEIGHTS = "model.safetensors"


def save(folder: Path, architecture: str = QWEN3, **options: Any) -> Path:
    save_eagle3(make_eagle3(architecture), folder, torch.float32, **options)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys; ``None`` removes one."""
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_weights(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, folder / WEIGHTS)


def save_target_embedding(folder: Path, key: str, rows: int = VOCAB) -> torch.Tensor:
    folder.mkdir()
    weight = torch.randn(rows, WIDTH)
    save_file({"lm_head.weight": torch.zeros(2), key: weight}, folder / WEIGHTS)
    return weight


def refusal(folder: Path, key: str | None, file: str = "", **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_eagle3(folder, **options)
    assert caught.value.key == key
    assert file in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(tmp_path, architecture):
    drafter = make_eagle3(architecture)
    save_eagle3(drafter, tmp_path, torch.float32)
    loaded = load_eagle3(tmp_path)
    assert loaded.config == drafter.config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("architecture", "names", "absent"),
    [
        (QWEN3, {"layers.0.self_attn.q_norm.weight", "embed_tokens.weight"}, {"d2t", "t2d"}),
        (
            LLAMA,
            {"midlayer.self_attn.q_proj.weight", "midlayer.hidden_norm.weight", "d2t", "t2d"},
            {"midlayer.self_attn.q_norm.weight", "layers.0.hidden_norm.weight"},
        ),
    ],
)
def test_weights_have_the_published_names(tmp_path, architecture, names, absent):
    stored = load_file(save(tmp_path, architecture) / WEIGHTS)
    assert names <= set(stored)
    assert not absent & set(stored)
    assert stored["fc.weight"].shape == (WIDTH, 3 * WIDTH)
    if architecture == LLAMA:
        assert (stored["d2t"].dtype, stored["t2d"].dtype) == (torch.int64, torch.bool)
        ids = torch.arange(20) + stored["d2t"]
        assert torch.equal(stored["t2d"].nonzero().squeeze(1), ids)


def test_saving_as_bfloat16_keeps_the_vocabulary(tmp_path):
    drafter = make_eagle3(LLAMA)
    save_eagle3(drafter, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["fc.weight"].dtype == torch.bfloat16
    assert torch.equal(load_eagle3(tmp_path).draft_token_ids(), drafter.draft_token_ids())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loading_as_bfloat16_stays_near_float32(tmp_path, architecture):
    """Weights are cast, rotary frequencies are not: far positions would turn by radians."""
    exact = load_eagle3(save(tmp_path, architecture))
    rough = load_eagle3(tmp_path, torch.bfloat16)
    states, tokens = torch.randn(3, WIDTH), torch.tensor([1, 2, 3])
    far = torch.tensor([40001, 40002, 40003])
    keys, values = exact.context_kv(states, tokens, far)
    rough_keys, rough_values = rough.context_kv(states.bfloat16(), tokens, far)
    assert rough_keys.dtype == torch.bfloat16
    torch.testing.assert_close(rough_keys.float(), keys, atol=0.1, rtol=0.05)
    torch.testing.assert_close(rough_values.float(), values, atol=0.1, rtol=0.05)
    assert rough.logits(states.bfloat16()).dtype == torch.float32


def test_layer_may_be_named_as_sglang_names_it(tmp_path):
    save(tmp_path, LLAMA)
    stored = load_file(tmp_path / WEIGHTS)
    renamed = {key.replace("midlayer.", "layers.0."): value for key, value in stored.items()}
    save_file(renamed, tmp_path / WEIGHTS)
    expected = make_eagle3(LLAMA).state_dict()["layers.0.hidden_norm.weight"]
    assert torch.equal(load_eagle3(tmp_path).state_dict()["layers.0.hidden_norm.weight"], expected)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "embed_tokens.weight"])
def test_embedding_left_to_the_target(tmp_path, key):
    folder = save(tmp_path / "drafter", LLAMA, with_embedding=False)
    assert "embed_tokens.weight" not in load_file(folder / WEIGHTS)
    weight = save_target_embedding(tmp_path / "target", key)
    loaded = load_eagle3(folder, target=tmp_path / "target")
    assert torch.equal(loaded.embed_tokens.weight, weight)


def test_embedding_that_cannot_be_had(tmp_path):
    folder = save(tmp_path / "drafter", LLAMA, with_embedding=False)
    assert "no target" in refusal(folder, "embed_tokens.weight")
    save_target_embedding(tmp_path / "small", "model.embed_tokens.weight", rows=VOCAB - 1)
    message = refusal(folder, "model.embed_tokens.weight", target=tmp_path / "small")
    assert "[49, 16]" in message
    assert "[50, 16]" in message
    with pytest.raises(ValueError, match="carry their embedding"):
        save(tmp_path / "qwen", QWEN3, with_embedding=False)


# ---------------------------------------------------------------------------- layers that it reads


def read_config(**changes: Any) -> Eagle3Config:
    data = make_eagle3(LLAMA).config.to_dict()
    data.pop("eagle_config")
    return Eagle3Config.from_dict(data | changes, num_target_layers=None)


def test_layer_numbering_of_each_publisher():
    """SpecForge and SGLang count outputs of layers inside ``eagle_config``; vLLM inputs."""
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
    assert read_config(eagle_config=ids).target_layer_ids == (1, 3, 4)
    assert read_config(**ids).target_layer_ids == (0, 2, 3)


def test_usual_layers_need_the_target_depth(tmp_path):
    folder = save(tmp_path, LLAMA)
    edit_config(folder, eagle_config=None)
    assert "n // 2 - 1" in refusal(folder, "eagle_aux_hidden_state_layer_ids", "config.json")
    assert load_eagle3(folder, num_target_layers=8).config.target_layer_ids == (1, 3, 4)
    refusal(folder, "eagle_aux_hidden_state_layer_ids", num_target_layers=6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_projection_and_digest(tmp_path, architecture):
    drafter = make_eagle3(architecture)
    folder = save(tmp_path / "one", architecture)
    projection = checkpoint.load_projection(folder)
    assert projection.target_layer_ids == drafter.config.target_layer_ids
    assert torch.equal(projection.weight, drafter.fc.weight)
    save(tmp_path / "two", architecture)
    digest = checkpoint.projection_digest(folder)
    assert checkpoint.projection_digest(tmp_path / "two") == digest
    edit_weights(tmp_path / "two", **{"fc.weight": drafter.fc.weight + 1})
    assert checkpoint.projection_digest(tmp_path / "two") != digest


# ---------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"speculators_model_type": "eagle3"}, "speculators_model_type"),
        ({"fc_norm": True}, "fc_norm"),
        ({"norm_before_residual": True}, "norm_before_residual"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"target_hidden_size": 32}, "target_hidden_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"layer_types": True}, "layer_types"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters"),
        ({"target_layer_ids": [1, 3, NUM_LAYERS]}, "target_layer_ids"),
        ({"target_layer_ids": [-1, 3]}, "target_layer_ids"),
        ({"target_layer_ids": [3, 3]}, "target_layer_ids"),
        ({"num_target_layers": None}, "num_target_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"vocab_size": "50"}, "vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_wrong_config_names_file_and_key(tmp_path, changes, key):
    folder = save(tmp_path)
    edit_config(folder, **changes)
    refusal(folder, key, "config.json")


def test_draft_vocabulary_above_the_target(tmp_path):
    folder = save(tmp_path, LLAMA)
    edit_config(folder, draft_vocab_size=51)
    refusal(folder, "draft_vocab_size", "config.json")


@pytest.mark.parametrize(
    ("d2t", "key"),
    [
        (torch.full((20,), 31), "d2t"),
        (torch.arange(20).neg(), "d2t"),
        (torch.arange(20).neg() - 1, "d2t"),
        (torch.zeros(20), "d2t"),
        (torch.zeros(19, dtype=torch.int64), "d2t"),
        (None, "d2t"),
        (torch.zeros(20, dtype=torch.int64), "t2d"),
    ],
    ids=["outside", "repeated", "negative", "floats", "length", "missing", "other than t2d"],
)
def test_wrong_vocabulary_map(tmp_path, d2t, key):
    folder = save(tmp_path, LLAMA)
    edit_weights(folder, d2t=d2t)
    refusal(folder, key)


def test_wrong_weights_name_the_tensor(tmp_path):
    folder = save(tmp_path, LLAMA)
    edit_weights(folder, **{"midlayer.self_attn.q_proj.weight": torch.zeros(32, 16)})
    assert "[32, 32]" in refusal(folder, "midlayer.self_attn.q_proj.weight", WEIGHTS)
    edit_weights(folder, **{"midlayer.self_attn.q_proj.weight": None})
    refusal(folder, "layers.0.self_attn.q_proj.weight", WEIGHTS)
    save(folder, LLAMA)
    edit_weights(folder, **{"midlayer.self_attn.q_norm.weight": torch.zeros(8)})
    assert "no weight of an EAGLE-3" in refusal(folder, "midlayer.self_attn.q_norm.weight")


def test_truncated_weights_name_the_file(tmp_path):
    folder = save(tmp_path)
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    refusal(folder, "norm.weight", WEIGHTS)
    path.unlink()
    refusal(folder, None, WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": 32}, "hidden_size"),
        ({"vocab_size": 51}, "vocab_size"),
        ({"num_hidden_layers": 4}, "target_layer_ids"),
    ],
)
def test_other_target_is_refused(changes, key):
    """Llama's format does not say how deep its target is: only the layers can be checked."""
    target = {"hidden_size": WIDTH, "vocab_size": VOCAB, "num_hidden_layers": NUM_LAYERS}
    drafter = make_eagle3(LLAMA).config
    check_drafter_matches_target(drafter, target)
    with pytest.raises(CheckpointError) as caught:
        check_drafter_matches_target(drafter, target | changes, "drafter/config.json")
    assert caught.value.key == key
