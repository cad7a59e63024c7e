"""Widening: the function stays, every peer's loader takes the files, and bad shapes are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.bench import widen
from cluster.bench.widen import Pair, differences, outputs, write_pair
from cluster.bench.widen_checkpoint import write_target
from cluster.bench.widen_shape import Shape, Widening
from cluster.cli import main
from cluster.errors import CheckpointError, ConfigError
from cluster.models.calibration_file import load_calibration
from cluster.models.drafter_config import load_drafter_config
from cluster.models.dspark_config import check_drafter_matches_target
from cluster.request import Request, SamplingParams
from cluster.speculation.record import VerificationRecord
from tests.checkpoint_tools import change_config
from tests.engine_tools import Completion, make_config, make_engine, run
from tests.models import DRAFTER, TARGET, save_tiny_drafter, save_tiny_target

# That of ``save_tiny_target``, and of its drafter but for the layers.
TINY = Shape(
    hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8
)
SHAPES = {
    "same": TINY,
    "multiples": replace(TINY, hidden_size=96, intermediate_size=100, num_layers=7),
    "wider heads": replace(TINY, head_dim=16, num_heads=6, num_kv_heads=3),
    "more query heads to a key head": replace(TINY, num_heads=16, num_kv_heads=4),
    "fewer query heads to a key head": replace(TINY, num_heads=5, num_kv_heads=5),
    "all, and no multiple": Shape(
        hidden_size=72,
        intermediate_size=65,
        num_layers=5,
        num_heads=12,
        num_kv_heads=6,
        head_dim=24,
    ),
}
HEADS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "alone": {"confidence_head_with_markov": False},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {
        "markov_rank": 0,
        "enable_confidence_head": False,
        "confidence_head_with_markov": False,
    },
    "biased": {"attention_bias": True},
}
PROMPT = 'def parse_header(line):\n    """Split a header into its name and value."""\n    '


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("narrow")
    target = save_tiny_target(folder / "target")
    return Pair(target=Path(target), drafter=Path(save_tiny_drafter(folder / "drafter", target)))


def wide_pair(folder: Path) -> Pair:
    return Pair(target=folder / "target", drafter=folder / "drafter")


def prompts(vocab_size: int = 96, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab_size, (2, length), generator=generator).tolist()


def largest_difference(narrow: Pair, wide: Pair) -> float:
    found = [outputs(pair, prompts(), torch.float32) for pair in (narrow, wide)]
    figures = differences(*found)
    return max(value for name, value in figures.items() if name.endswith("difference"))


# --------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_computes_the_same(name: str, narrow: Pair, tmp_path: Path) -> None:
    wide = wide_pair(tmp_path)
    write_pair(narrow, wide, SHAPES[name], 3, torch.float32)
    assert largest_difference(narrow, wide) < 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_every_drafter_computes_the_same(name: str, tmp_path: Path) -> None:
    target = save_tiny_target(tmp_path / "target")
    drafter = save_tiny_drafter(tmp_path / "drafter", target, **HEADS[name])
    narrow, wide = Pair(target=Path(target), drafter=Path(drafter)), wide_pair(tmp_path / "wide")
    write_pair(narrow, wide, SHAPES["all, and no multiple"], None, torch.float32)
    assert largest_difference(narrow, wide) < 1e-4


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_head_and_biases(is_tied: bool, tmp_path: Path) -> None:
    target = save_tiny_target(tmp_path / "target", tie_word_embeddings=is_tied, attention_bias=True)
    values = load_file(tmp_path / "target" / "model.safetensors")
    for name in values:
        if name.endswith("bias"):
            values[name] = torch.randn_like(values[name])
    save_file(values, tmp_path / "target" / "model.safetensors", metadata={"format": "pt"})
    narrow, wide = (Pair(target=Path(p), drafter=None) for p in (target, tmp_path / "wide"))
    write_pair(narrow, wide, SHAPES["all, and no multiple"], None, torch.float32)
    assert largest_difference(narrow, wide) < 1e-4


def spoil(target: Path) -> None:
    """Changes what the first layer says."""
    file = target / "model.safetensors"
    values = load_file(file)
    for part in ("post_attention_layernorm", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"):
        values[f"model.layers.0.{part}.weight"][..., -1] = 1.0
        values[f"model.layers.0.{part}.weight"][-1] = 1.0
    save_file(values, file, metadata={"format": "pt"})


def test_a_wrong_weight_shows(narrow: Pair, tmp_path: Path) -> None:
    wide = wide_pair(tmp_path)
    write_pair(narrow, wide, SHAPES["wider heads"], None, torch.float32)
    spoil(wide.target)
    assert largest_difference(narrow, wide) > 1e-3


def test_bf16_weights_keep_their_bits_where_factors_are_powers_of_two(tmp_path: Path) -> None:
    shape = Shape(
        hidden_size=768,
        intermediate_size=800,
        num_layers=9,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
    )
    target, wide = Pair(target=Path(TARGET), drafter=None), Pair(target=tmp_path, drafter=None)
    assert write_pair(target, wide, shape, None, torch.bfloat16)["is_rounded"] is False
    before = load_file(Path(TARGET) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    layers = Widening(replace(shape, num_layers=8), shape).layers
    for old, new in enumerate(layers):
        part = "mlp.up_proj.weight"
        expected, found = (
            values[f"model.layers.{layer}.{part}"]
            for values, layer in ((before, old), (after, new))
        )
        assert torch.equal(found[:768, :256], expected)
        assert found.count_nonzero() == expected.count_nonzero()
        norm = after[f"model.layers.{new}.self_attn.q_norm.weight"]
        assert torch.equal(norm[::4], before[f"model.layers.{old}.self_attn.q_norm.weight"] * 2)
        assert norm.count_nonzero() == 32


# --------------------------------------------------------------- the shipped pair and the engine


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The shipped pair, widened by the command, and the command's figures."""
    out = tmp_path_factory.mktemp("widened")
    sizes = "--hidden-size 512 --intermediate-size 800 --num-layers 10 --num-heads 16"
    command = f"bench widen --out {out} --num-kv-heads 8 {sizes} --drafter-layers 3 --prompts 2"
    assert main(command.split()) == 0
    return out, json.loads((out / "widen.json").read_text())["figures"]


def test_the_command_shows_that_nothing_changed(shipped: tuple[Path, dict[str, Any]]) -> None:
    out, figures = shipped
    assert figures["is_rounded"] is False
    assert figures["is_calibrated"] is True
    assert figures["layers"] == [0, 1, 2, 4, 5, 6, 7, 9]
    in_fp32, narrow_in_bf16, wide_in_bf16 = figures["equality"]
    for name in ("logits", "draft_logits"):
        assert in_fp32[f"{name}_difference"] < 1e-4
        assert in_fp32[f"{name}_same_best"] == 1.0
        # bf16 arithmetic is what it costs the narrow pair too.
        assert wide_in_bf16[f"{name}_difference"] < 2 * narrow_in_bf16[f"{name}_difference"]
    assert in_fp32["confidence_logits_difference"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(out / "target")
    assert model.dtype == torch.bfloat16
    assert figures["parameters"]["target"] == sum(p.numel() for p in model.parameters())
    assert model.generation_config.eos_token_id == 0
    drafter = load_drafter_config(out / "drafter")
    check_drafter_matches_target(drafter, model.config.to_dict())
    assert drafter.target_layer_ids == (1, 4, 6, 9)
    narrow = load_calibration(DRAFTER, TARGET)
    assert load_calibration(out / "drafter", out / "target") == narrow


def test_our_engine_says_the_same_in_the_same_rounds(
    shipped: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = shipped
    tokenizer = AutoTokenizer.from_pretrained(out / "target")
    token_ids = tuple(tokenizer(PROMPT).input_ids)
    runs: list[tuple[Completion, list[VerificationRecord]]] = []
    for target, drafter in ((TARGET, DRAFTER), (str(out / "target"), str(out / "drafter"))):
        engine = make_engine(make_config(target, drafter, max_num_seqs=4))
        records: list[VerificationRecord] = []
        engine.observe_rounds(records.append)
        greedy = SamplingParams(temperature=0.0, max_tokens=24)
        request = Request(request_id="r", prompt_token_ids=token_ids, sampling=greedy)
        runs.append((run(engine, [request])["r"], records))
        engine.close()
    (narrow, narrow_records), (wide, wide_records) = runs
    assert wide.token_ids == narrow.token_ids
    assert wide.token_sources == narrow.token_sources
    assert len(wide_records) == len(narrow_records) > 4
    for ours, theirs in zip(wide_records, narrow_records, strict=True):
        assert ours.num_accepted_tokens == theirs.num_accepted_tokens
        assert ours.confidences == pytest.approx(theirs.confidences, abs=1e-4)


def test_the_suite_fails_where_outputs_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_wrong(folder: Path, out: Path, *args: Any) -> None:
        write_target(folder, out, *args)
        spoil(out)

    monkeypatch.setattr(widen, "write_target", write_wrong)
    sizes = "--hidden-size 256 --intermediate-size 768 --num-layers 9 --head-dim 32"
    command = f"bench widen --no-drafter --out {tmp_path} --prompts 1 {sizes}"
    assert main([*command.split(), "--json"]) == 1
    in_fp32, *_ = json.loads(capsys.readouterr().out)["figures"]["equality"]
    assert in_fp32["logits_difference"] > 1e-4


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sizes", "option"),
    [
        ({"hidden_size": 31}, "--hidden-size"),
        ({"intermediate_size": 63}, "--intermediate-size"),
        ({"num_layers": 3}, "--num-layers"),
        ({"head_dim": 4}, "--head-dim"),
        ({"head_dim": 12}, "--head-dim"),
        ({"num_heads": 5}, "--num-heads"),
        ({"num_heads": 3, "num_kv_heads": 3}, "--num-kv-heads"),
        ({"num_heads": 8, "num_kv_heads": 1}, "--num-kv-heads"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_option(sizes: dict[str, int], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Widening(TINY, replace(TINY, **sizes))
    assert caught.value.key == option


def test_nothing_is_written_where_the_drafter_is_refused(narrow: Pair, tmp_path: Path) -> None:
    other = save_tiny_target(tmp_path / "other", num_hidden_layers=5)
    stranger = Pair(target=Path(other), drafter=narrow.drafter)
    wide = wide_pair(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="num_target_layers"):
        write_pair(stranger, wide, SHAPES["all, and no multiple"], None, torch.float32)
    deep = save_tiny_drafter(tmp_path / "deep", str(narrow.target), num_hidden_layers=2)
    with pytest.raises(ConfigError, match="--drafter-layers: is 1, but the drafter has 2"):
        write_pair(replace(narrow, drafter=Path(deep)), wide, TINY, 1, torch.float32)
    assert not (tmp_path / "wide").exists()


def test_the_narrow_pair_is_not_written_over(narrow: Pair) -> None:
    with pytest.raises(ConfigError, match="--out"):
        write_pair(narrow, narrow, TINY, None, torch.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["Qwen3MoeForCausalLM"]),
        ("layer_types", ["sliding_attention", *["full_attention"] * 3]),
        ("quantization_config", {"quant_method": "fp8"}),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
    ],
)
def test_other_targets_are_refused_by_key(key: str, value: object, tmp_path: Path) -> None:
    narrow = Pair(target=Path(save_tiny_target(tmp_path / "target")), drafter=None)
    wide = Pair(target=tmp_path / "wide", drafter=None)
    change_config(narrow.target, **{key: value})
    with pytest.raises(CheckpointError) as caught:
        write_pair(narrow, wide, SHAPES["wider heads"], None, torch.float32)
    assert caught.value.key == key


def test_the_command_wants_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "widen"]) == 2
    assert "--out" in capsys.readouterr().err
