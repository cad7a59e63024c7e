"""The DSpark drafter against a plain loop written here from the paper's description."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cluster.errors import CheckpointError
from cluster.models import checkpoint
from cluster.models.dspark import DSparkConfig, DSparkDrafter

LENGTH = 9


def make_config(**changes: object) -> DSparkConfig:
    values: dict = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "block_size": 4,
        "target_layer_ids": (-1, 1, 2),
        "num_target_layers": 3,
        "mask_token_id": 7,
        "num_anchors": 3,
        "markov_rank": 5,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    return DSparkConfig(**{**values, **changes})


def make_drafter(**changes: object) -> DSparkDrafter:
    torch.manual_seed(0)
    drafter = checkpoint.build_drafter(make_config(**changes)).eval().requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.normal_(std=0.3)
    return drafter


@pytest.fixture
def drafter() -> DSparkDrafter:
    return make_drafter()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(LENGTH, 48, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ the same, written as loops


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-6) * weight


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def loop_block(
    drafter: DSparkDrafter, features: torch.Tensor, anchor_token: int, anchor_position: int
) -> list[torch.Tensor]:
    """Hidden states of one block, token by token and head by head."""
    weights, config = drafter.state_dict(), drafter.config
    context = [
        rms_norm(weights["fc.weight"] @ row, weights["hidden_norm.weight"])
        for row in features[:anchor_position]
    ]
    tokens = [anchor_token] + [config.mask_token_id] * (config.block_size - 1)
    hidden = [weights["embed_tokens.weight"][token] for token in tokens]
    group = config.num_attention_heads // config.num_key_value_heads
    size = config.head_dim
    for layer in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        normed = [rms_norm(row, own["input_layernorm.weight"]) for row in hidden]
        sources = list(enumerate(context)) + [
            (anchor_position + i, row) for i, row in enumerate(normed)
        ]
        mixed = []
        for slot, row in enumerate(normed):
            heads = []
            for head in range(config.num_attention_heads):
                mine = slice(head * size, (head + 1) * size)
                shared = slice(head // group * size, (head // group + 1) * size)
                query = rms_norm(
                    (own["self_attn.q_proj.weight"] @ row)[mine], own["self_attn.q_norm.weight"]
                )
                query = rotate(query, anchor_position + slot)
                scores, values = [], []
                for position, source in sources:
                    key = (own["self_attn.k_proj.weight"] @ source)[shared]
                    key = rotate(rms_norm(key, own["self_attn.k_norm.weight"]), position)
                    scores.append(query @ key / math.sqrt(size))
                    values.append((own["self_attn.v_proj.weight"] @ source)[shared])
                attention = torch.stack(scores).softmax(0)
                heads.append(sum(a * v for a, v in zip(attention, values, strict=True)))
            mixed.append(own["self_attn.o_proj.weight"] @ torch.cat(heads))
        hidden = [row + extra for row, extra in zip(hidden, mixed, strict=True)]
        for slot, row in enumerate(hidden):
            x = rms_norm(row, own["post_attention_layernorm.weight"])
            gate = F.silu(own["mlp.gate_proj.weight"] @ x)
            hidden[slot] = row + own["mlp.down_proj.weight"] @ (
                gate * (own["mlp.up_proj.weight"] @ x)
            )
    return [rms_norm(row, weights["norm.weight"]) for row in hidden]


# ------------------------------------------------------------------------------------ backbone


def run_block(drafter: DSparkDrafter, features: torch.Tensor, anchor: int, token: int):
    keys, values = drafter.context_kv(
        drafter.project_features(features[:anchor]), torch.arange(anchor)
    )
    return drafter.block_hidden(
        torch.tensor([token]),
        torch.tensor([anchor]),
        keys[:, None],
        values[:, None],
        torch.tensor([anchor]),
    )[0]


@pytest.mark.parametrize("anchor", [0, 1, 6])
def test_block_agrees_with_loops(drafter, features, anchor):
    ours = run_block(drafter, features, anchor, token=11)
    loops = torch.stack(loop_block(drafter, features, 11, anchor))
    torch.testing.assert_close(ours, loops, atol=1e-5, rtol=1e-5)


def test_context_in_parts_equals_context_at_once(drafter, features):
    projected = drafter.project_features(features)
    positions = torch.arange(LENGTH)
    at_once = drafter.context_kv(projected, positions)
    parts = [drafter.context_kv(projected[i : i + 2], positions[i : i + 2]) for i in range(0, 9, 2)]
    for whole, pieces in zip(at_once, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(pieces, dim=1))


def test_batch_equals_alone_and_padding_does_not_leak(drafter, features):
    keys, values = drafter.context_kv(drafter.project_features(features), torch.arange(LENGTH))
    anchors, tokens = torch.tensor([5, 0, 9]), torch.tensor([3, 4, 5])
    # Whatever lies behind a session's length may be rubbish.
    batch_keys, batch_values = (
        keys[:, None].repeat(1, 3, 1, 1, 1),
        values[:, None].repeat(1, 3, 1, 1, 1),
    )
    for row, length in enumerate(anchors.tolist()):
        batch_keys[:, row, length:] = 1e4
        batch_values[:, row, length:] = 1e4
    together = drafter.block_hidden(tokens, anchors, batch_keys, batch_values, anchors)
    for row in range(3):
        alone = run_block(drafter, features, int(anchors[row]), int(tokens[row]))
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_fewer_slots_are_the_first_slots(drafter, features):
    keys, values = drafter.context_kv(drafter.project_features(features), torch.arange(LENGTH))
    arguments = torch.tensor([3]), torch.tensor([LENGTH]), keys[:, None], values[:, None]
    whole = drafter.block_hidden(*arguments, torch.tensor([LENGTH]))
    part = drafter.block_hidden(*arguments, torch.tensor([LENGTH]), num_slots=2)
    torch.testing.assert_close(part, whole[:, :2])
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="num_slots"):
            drafter.block_hidden(*arguments, torch.tensor([LENGTH]), num_slots=wrong)


def test_packed_anchors_equal_single_blocks(drafter):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, LENGTH, 48, generator=generator)
    tokens = torch.randint(50, (2, LENGTH), generator=generator)
    anchors = torch.tensor([[0, 2, 5], [1, 4, 8]])
    packed = drafter.packed_hidden(tokens, drafter.project_features(features), anchors)
    for row in range(2):
        for column, anchor in enumerate(anchors[row].tolist()):
            single = run_block(drafter, features[row], anchor, int(tokens[row, anchor]))
            torch.testing.assert_close(packed[row, column], single, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_steps_equal_block_and_formula(head):
    drafter = make_drafter(markov_head_type=head)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 4, 16, generator=generator)
    previous = torch.randint(50, (2, 4), generator=generator)
    block = drafter.block_logits(hidden, previous)
    weights = {k.removeprefix("markov_head."): v for k, v in drafter.state_dict().items()}
    base, state = drafter.base_logits(hidden), None
    memory = torch.zeros(2, 5)
    for k in range(4):
        logits, state = drafter.markov_step(base[:, k], previous[:, k], hidden[:, k], state)
        torch.testing.assert_close(logits, block[:, k])
        embedded = weights["markov_w1.weight"][previous[:, k]]
        if head == "gated":
            inputs = torch.cat([hidden[:, k], embedded], dim=1)
            gate = inputs @ weights["gate_proj.weight"].T + weights["gate_proj.bias"]
            embedded = gate.sigmoid() * embedded
        if head == "rnn":
            inputs = torch.cat([memory, embedded, hidden[:, k]], dim=1)
            joint = inputs @ weights["joint_proj.weight"].T + weights["joint_proj.bias"]
            gate = joint[:, :5].sigmoid()
            memory = gate * memory + (1 - gate) * joint[:, 5:10].tanh()
            embedded = joint[:, 10:].tanh()
        expected = base[:, k] + embedded @ weights["markov_w2.weight"].T
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_rank_zero_has_no_markov_head():
    drafter = make_drafter(markov_rank=0, confidence_head_with_markov=False)
    hidden, previous = torch.randn(2, 16), torch.tensor([1, 2])
    base = drafter.base_logits(hidden)
    logits, state = drafter.markov_step(base, previous, hidden, None)
    assert state is None
    torch.testing.assert_close(logits, base)
    assert drafter.confidence_logit(hidden, previous).shape == (2,)


def test_confidence_reads_state_and_previous_token(drafter):
    hidden, previous = torch.randn(2, 16), torch.tensor([1, 2])
    weights = drafter.state_dict()
    inputs = torch.cat([hidden, weights["markov_head.markov_w1.weight"][previous]], dim=1)
    expected = inputs @ weights["confidence_head.proj.weight"][0]
    expected = expected + weights["confidence_head.proj.bias"]
    torch.testing.assert_close(drafter.confidence_logit(hidden, previous), expected)
    without = make_drafter(enable_confidence_head=False, confidence_head_with_markov=False)
    with pytest.raises(ValueError, match="confidence"):
        without.confidence_logit(hidden, previous)


# ---------------------------------------------------------------------------------- checkpoint


@pytest.fixture
def saved(drafter, tmp_path) -> Path:
    checkpoint.save_drafter(drafter, tmp_path, torch.float32)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **{k.replace("__", "."): v for k, v in changes.items()}}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def test_round_trip(drafter, saved):
    loaded = checkpoint.load_drafter(saved)
    assert loaded.config == drafter.config
    for name, value in drafter.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0, rtol=0)
    assert not any(name.startswith("model.") for name in loaded.state_dict())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    projection = checkpoint.load_projection(saved)
    assert projection.target_layer_ids == (-1, 1, 2)
    torch.testing.assert_close(projection.weight, drafter.fc.weight)


def test_transformers_4_rotary_keys(saved):
    change_config(saved, rope_parameters=None, rope_theta=5000, rope_scaling=None)
    rope = checkpoint.load_drafter_config(saved).rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 5000.0}


def test_bfloat16_checkpoint_loads_in_either_dtype(drafter, tmp_path):
    checkpoint.save_drafter(drafter, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for dtype in (torch.bfloat16, torch.float32):
        loaded = checkpoint.load_drafter(tmp_path, dtype)
        assert loaded.fc.weight.dtype == dtype
        assert run_block(loaded, torch.randn(3, 48, dtype=dtype), 2, 1).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"speculators_model_type": "dflash"}, "speculators_model_type"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
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
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"enable_confidence_head": "yes"}, "enable_confidence_head"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    ],
)
def test_config_errors_name_file_and_key(saved, changes, key):
    change_config(saved, **changes)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_drafter(saved)
    assert caught.value.key == key
    assert caught.value.file == str(saved / "config.json")


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"norm__weight": None}, "norm.weight", "missing"),
        ({"model__norm__weight": torch.ones(16)}, "model.norm.weight", "no weight"),
        ({"fc__weight": torch.ones(16, 16)}, "fc.weight", r"\[16, 16\], not \[16, 48\]"),
    ],
)
def test_tensor_errors_name_file_and_key(saved, changes, key, message):
    change_tensors(saved, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load_drafter(saved)
    assert caught.value.key == key
    assert caught.value.file == str(saved / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_truncated_files(saved, name):
    path = saved / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"JSON|cut off") as caught:
        checkpoint.load_drafter(saved)
    assert caught.value.file == str(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load_drafter(saved)
    with pytest.raises(CheckpointError):
        checkpoint.drafter_digest(saved)


def test_digests_follow_contents(drafter, saved):
    whole, projection = checkpoint.drafter_digest(saved), checkpoint.projection_digest(saved)
    with torch.no_grad():
        drafter.norm.weight.add_(1)
    checkpoint.save_drafter(drafter, saved, torch.float32)
    assert checkpoint.drafter_digest(saved) != whole
    assert checkpoint.projection_digest(saved) == projection
    with torch.no_grad():
        drafter.fc.weight.add_(1)
    checkpoint.save_drafter(drafter, saved, torch.float32)
    assert checkpoint.projection_digest(saved) != projection


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_target_layers"])
def test_drafter_of_another_target_is_refused(key):
    target = {"hidden_size": 16, "vocab_size": 50, "num_hidden_layers": 3}
    checkpoint.check_drafter_matches_target(make_config(), target)
    target["num_hidden_layers" if key == "num_target_layers" else key] += 1
    with pytest.raises(CheckpointError, match=key):
        checkpoint.check_drafter_matches_target(make_config(), target)
