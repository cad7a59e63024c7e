"""The CPU's kernels and the compiled pass, against plain arithmetic and against themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.engine.cpu import kernels
from cluster.engine.cpu.kernels import can_pack, load_kernels
from cluster.engine.cpu.packed_linear import PackedLinear
from cluster.engine.draft_client import (
    DraftRound,
    DraftSampling,
    DraftSequence,
    SessionKey,
)
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.in_place import InPlaceLayers, attend_in_place, begin_pass, end_pass
from cluster.engine.kernels import pack_linears
from cluster.engine.step_input import StepInput
from cluster.engine.target import TargetShard
from cluster.models.checkpoint import Projection
from cluster.speculation.proposal import DraftProposal
from tests.draft_helpers import BLOCK, D, append, make_drafter
from tests.draft_helpers import make_engine as make_draft_engine
from tests.engine_tools import make_config
from tests.models import save_tiny_target

PAGE_SIZE = 16

pytestmark = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler to build kernels with")


def skip_unless_packed(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"the processor has no kernel for weights of {dtype}")


class Attention:
    """Sequences with random caches, one layer, and a pass over them."""

    def __init__(
        self,
        query_lens: list[int],
        context_lens: list[int],
        *,
        heads: int,
        kv_heads: int,
        depth: int,
        value_depth: int,
        dtype: torch.dtype,
    ) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).to(dtype)

        num_pages = [-(-length // PAGE_SIZE) for length in context_lens]
        order = 1 + torch.randperm(sum(num_pages), generator=random).numpy()
        tables = np.zeros((len(query_lens), max(num_pages)), dtype=np.int64)
        for row, pages in zip(tables, np.split(order, np.cumsum(num_pages)[:-1]), strict=True):
            row[: len(pages)] = pages
        positions = [
            np.arange(context - query, context)
            for query, context in zip(query_lens, context_lens, strict=True)
        ]
        slots = [
            table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            for table, at in zip(tables, positions, strict=True)
        ]
        self.step = StepInput(
            token_ids=np.zeros(sum(query_lens), dtype=np.int64),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            query_lens=np.asarray(query_lens),
            context_lens=np.asarray(context_lens),
            block_tables=tables,
            logit_rows=np.zeros(0, dtype=np.int64),
        )
        size = (len(order) + 1, PAGE_SIZE, kv_heads)
        self.keys, self.values = normal(*size, depth), normal(*size, value_depth)
        self.query = normal(sum(query_lens), heads, depth)
        self.key = normal(sum(query_lens), kv_heads, depth)
        self.value = normal(sum(query_lens), kv_heads, value_depth)

    def run(self, window: int | None, rows: slice = slice(None)) -> torch.Tensor:
        """The kernel, for the sequences ``rows`` of the batch."""
        step = self.step
        owner = np.repeat(np.arange(len(step.query_lens)), step.query_lens)
        mine = np.flatnonzero(np.isin(owner, np.arange(len(step.query_lens))[rows]))
        part = StepInput(
            token_ids=step.token_ids[mine],
            positions=step.positions[mine],
            slots=step.slots[mine],
            query_lens=step.query_lens[rows],
            context_lens=step.context_lens[rows],
            block_tables=step.block_tables[rows],
            logit_rows=step.logit_rows,
        )
        begin_pass(part, [self.keys.clone()], [self.values.clone()])
        layers = InPlaceLayers({3: 0}, frozenset())
        inputs = (self.query[mine], self.key[mine], self.value[mine])
        output = attend_in_place(3, *inputs, layers, None, window)
        end_pass()
        return output

    def expected(self, window: int | None) -> torch.Tensor:
        """The same in float64, token by token."""
        keys, values = (t.flatten(0, 1).double() for t in (self.keys, self.values))
        slots = torch.from_numpy(self.step.slots)
        keys[slots], values[slots] = self.key.double(), self.value.double()
        owner = np.repeat(np.arange(len(self.step.query_lens)), self.step.query_lens)
        rows = []
        for token, (sequence, position) in enumerate(zip(owner, self.step.positions, strict=True)):
            at = np.arange(max(0, position - window + 1) if window else 0, position + 1)
            where = self.step.block_tables[sequence][at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            group = self.query.shape[1] // keys.shape[1]
            seen = keys[where].repeat_interleave(group, 1)
            scores = torch.einsum("hd,thd->ht", self.query[token].double(), seen)
            weights = (scores * self.query.shape[2] ** -0.5).softmax(-1)
            taken = values[where].repeat_interleave(group, 1)
            rows.append(torch.einsum("ht,thd->hd", weights, taken))
        return torch.stack(rows)


SHAPES: list[dict[str, Any]] = [
    {"heads": 8, "kv_heads": 4, "depth": 128, "value_depth": 128},
    {"heads": 6, "kv_heads": 2, "depth": 64, "value_depth": 32},
    {"heads": 4, "kv_heads": 4, "depth": 8, "value_depth": 16},  # no vectors of 32
    {"heads": 7, "kv_heads": 1, "depth": 96, "value_depth": 96},
]
BATCHES = [
    ([1], [1]),
    ([1, 1, 1], [150, 64, 65]),
    ([8, 1, 3], [150, 200, 3]),
    ([100], [130]),
    ([1, 40, 5], [300, 40, 17]),
]


@pytest.mark.parametrize("window", [None, 7, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_attention_equals_plain_arithmetic(
    shape: dict[str, Any], window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    for query_lens, context_lens in BATCHES:
        attention = Attention(query_lens, context_lens, dtype=dtype, **shape)
        difference = attention.run(window).double() - attention.expected(window)
        assert difference.abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequence_attends_alike_alone_and_in_a_batch(
    shape: dict[str, Any], dtype: torch.dtype
) -> None:
    query_lens, context_lens = [8, 1, 3, 1, 40], [150, 200, 3, 700, 90]
    attention = Attention(query_lens, context_lens, dtype=dtype, **shape)
    together = attention.run(None).split(query_lens)
    for index, part in enumerate(together):
        assert torch.equal(part, attention.run(None, slice(index, index + 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_attends_alike_however_many_are_verified_with_it(dtype: torch.dtype) -> None:
    whole = Attention([8], [150], dtype=dtype, **SHAPES[0])
    outputs = whole.run(None)
    step = whole.step
    whole.keys.flatten(0, 1)[step.slots] = whole.key
    whole.values.flatten(0, 1)[step.slots] = whole.value
    for token in range(8):
        one = slice(token, token + 1)
        part = StepInput(
            token_ids=step.token_ids[one],
            positions=step.positions[one],
            slots=step.slots[one],
            query_lens=np.ones(1, dtype=np.int64),
            context_lens=step.positions[one] + 1,
            block_tables=step.block_tables,
            logit_rows=step.logit_rows,
        )
        begin_pass(part, [whole.keys], [whole.values])
        layers = InPlaceLayers({0: 0}, frozenset())
        inputs = (whole.query[one], whole.key[one], whole.value[one])
        assert torch.equal(attend_in_place(0, *inputs, layers, None, None)[0], outputs[token])
        end_pass()


def test_rows_behind_the_pass_come_out_as_zeros() -> None:
    attention = Attention([2], [40], dtype=torch.float32, **SHAPES[0])
    layers = InPlaceLayers({0: 0}, frozenset())
    begin_pass(attention.step, [attention.keys], [attention.values])
    padded = [
        torch.cat([t, torch.full_like(t[:1], 7.0)])
        for t in (attention.query, attention.key, attention.value)
    ]
    output = attend_in_place(0, *padded, layers, None, None)
    end_pass()
    assert (output[2:] == 0).all()
    assert (output[:2] != 0).all()


def test_a_layer_that_no_pass_has_is_refused() -> None:
    attention = Attention([1], [4], dtype=torch.float32, **SHAPES[0])
    layers = InPlaceLayers({0: 0}, frozenset())
    with pytest.raises(RuntimeError, match="no pass has layer 0"):
        attend_in_place(0, attention.query, attention.key, attention.value, layers, None, None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (2, 1), (770, 31), (768, 2560)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_packed_linear_layers(
    dtype: torch.dtype, tolerance: float, inputs: int, outputs: int, bias: bool
) -> None:
    skip_unless_packed(dtype)
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    packed = PackedLinear(linear)
    rows = torch.randn(27, inputs).to(dtype)
    expected = nn.functional.linear(
        rows.double(), linear.weight.double(), linear.bias.double() if bias else None
    )
    result = packed(rows)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(packed(rows.view(3, 9, inputs)), result.view(3, 9, outputs))
    for count in range(1, 27):  # tiles of every height
        assert torch.equal(packed(rows[:count]), result[:count])
        assert torch.equal(packed(rows[count : count + 1])[0], result[count])
    assert packed(rows[:0]).shape == (0, outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_layers_pass_on_what_is_no_number(dtype: torch.dtype) -> None:
    skip_unless_packed(dtype)
    packed = PackedLinear(nn.Linear(4, 3, bias=False, dtype=dtype))
    rows = torch.ones(3, 4, dtype=dtype)
    rows[0, 1], rows[1, 2] = float("nan"), float("inf")
    result = packed(rows)
    assert result[0].isnan().all()
    assert result[1].isinf().all()
    assert result[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_hooks_and_what_is_no_linear_layer(dtype: torch.dtype) -> None:
    skip_unless_packed(dtype)
    module = nn.Sequential(
        nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 2).double(), nn.LayerNorm(2).double()
    )
    module[0].register_forward_hook(lambda _m, _i, output: output.double() + 1)
    before = module(torch.ones(1, 4, dtype=dtype))
    pack_linears(module, torch.device("cpu"))
    assert [type(child) for child in module] == [PackedLinear, nn.Linear, nn.LayerNorm]
    torch.testing.assert_close(module(torch.ones(1, 4, dtype=dtype)), before, rtol=2e-2, atol=2e-2)


def test_packed_linear_layers_refuse_another_input() -> None:
    skip_unless_packed(torch.bfloat16)
    packed = PackedLinear(nn.Linear(4, 3, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="input has 6 columns, the weight 4"):
        packed(torch.ones(1, 6, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="the weight is BFloat16, the input"):
        packed(torch.ones(1, 4))


def test_without_a_compiler_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not kernels.load_kernels.__wrapped__()
    assert "no C++ compiler" in caplog.text
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'cannot do this' >&2; exit 1; }\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not kernels.load_kernels.__wrapped__()
    assert "cannot do this" in caplog.text
    folder = Path(os.environ["DSPARK_CACHE_DIR"]) / "kernels"
    assert not list(folder.glob("*.partial"))


# ------------------------------------------------------------------------------------ whole passes


def passes(query_lens: list[int]) -> StepInput:
    """A first pass over prompts of these lengths, each on pages of its own."""
    num_pages = -(-max(query_lens) // PAGE_SIZE)
    tables = 1 + np.arange(len(query_lens) * num_pages).reshape(len(query_lens), num_pages)
    positions = [np.arange(length) for length in query_lens]
    slots = [
        table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        for table, at in zip(tables, positions, strict=True)
    ]
    num_tokens = sum(query_lens)
    return StepInput(
        token_ids=np.random.default_rng(0).integers(1, 96, num_tokens),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots),
        query_lens=np.asarray(query_lens),
        context_lens=np.asarray(query_lens),
        block_tables=tables,
        logit_rows=np.arange(num_tokens),
    )


def make_shard(target: str, *, layers: list[int], **overrides: Any) -> TargetShard:
    torch.manual_seed(3)
    projection = Projection(torch.randn(24, 32 * len(layers)) / 8, tuple(layers))
    config = make_config(target, num_pages=64, page_size=PAGE_SIZE, **overrides)
    return TargetShard(config.target, None, projection)


def outputs(shard: TargetShard, step: StepInput) -> tuple[torch.Tensor, torch.Tensor]:
    logits = shard.logits(shard.forward(step))
    return logits, shard.gather_features(torch.from_numpy(step.slots)).float()


def distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two tensors, relative to the length of the second."""
    return float((values - expected).norm() / expected.norm())


def check_alone_equals_batch(shard: TargetShard) -> None:
    """Raises AssertionError where a sequence's pass depends on the sequences beside it."""
    step = passes([20, 3, 1, 7])
    hidden = shard.forward(step)
    start = 0
    for index, length in enumerate(step.query_lens.tolist()):
        mine = slice(start, start + length)
        alone = StepInput(
            token_ids=step.token_ids[mine],
            positions=step.positions[mine],
            slots=step.slots[mine],
            query_lens=step.query_lens[index : index + 1],
            context_lens=step.context_lens[index : index + 1],
            block_tables=step.block_tables[index : index + 1],
            logit_rows=np.arange(length),
        )
        torch.testing.assert_close(shard.forward(alone), hidden[mine], rtol=0, atol=0)
        start += length


@pytest.mark.parametrize(
    ("dtype", "sliding", "tolerance"),
    [
        pytest.param("float32", False, 1e-5, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, 0.04),
    ],
)
def test_every_way_to_run_computes_the_same(
    tmp_path: Path, dtype: str, sliding: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"num_hidden_layers": 2}  # each takes seconds to compile
    if sliding:
        shape |= {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    target = save_tiny_target(tmp_path, **shape)
    layers = [-1, 1]
    with monkeypatch.context() as without:
        without.setattr("cluster.engine.target.has_kernels", lambda *_: False)
        plain = make_shard(target, layers=layers, dtype=dtype)
    kernels = make_shard(target, layers=layers, dtype=dtype)
    compiled = make_shard(target, layers=layers, dtype=dtype, enforce_eager=False)
    shards = [plain, kernels, compiled]
    assert [shard.execution for shard in shards] == ["eager", "kernels", "compiled"]
    for query_lens in ([20, 3, 1], [1], [40, 2]):
        step = passes(query_lens)
        logits, features = outputs(plain, step)
        for shard in shards[1:]:
            other_logits, other_features = outputs(shard, step)
            assert distance(other_logits, logits) < tolerance
            assert distance(other_features, features) < tolerance

    if can_pack(getattr(torch, dtype)):
        check_alone_equals_batch(compiled)

    # A drafter that reads other layers is taken in while the engine runs.
    torch.manual_seed(4)
    projection = Projection(torch.randn(16, 64) / 8, (0, 1))
    step = passes([5, 2])
    results = []
    for shard in shards:
        shard.stage_features(projection)
        assert not shard.use_staged_features()
        results.append(outputs(shard, step))
    assert compiled.execution == "compiled"
    for logits, features in results[1:]:
        assert features.shape == (7, 16)
        assert distance(logits, results[0][0]) < tolerance
        assert distance(features, results[0][1]) < tolerance


def test_a_target_that_cannot_be_compiled_is_served_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch, "compile", fail)
    target = save_tiny_target(tmp_path)
    shard = make_shard(target, layers=[1], enforce_eager=False)
    assert shard.execution == "kernels"
    assert "cannot be compiled and runs layer by layer: no such thing" in caplog.text
    monkeypatch.undo()
    step = passes([5, 2])
    logits, features = outputs(shard, step)
    expected_logits, expected = outputs(make_shard(target, layers=[1]), step)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(features, expected)


# ---------------------------------------------------------------------------------------- drafters


def drafted(engine: DraftEngine) -> list[DraftProposal]:
    """Proposals for two sessions of unequal length, twice, with what was accepted in between."""
    rows = torch.randn(60, D, generator=torch.Generator().manual_seed(0))
    keys = [SessionKey("long", 0), SessionKey("short", 0)]
    lengths = [50, 9]
    for key, length in zip(keys, lengths, strict=True):
        engine.open("a", key, DraftSampling(temperature=0.0))
        append(engine, "a", key, 0, rows[:length])
    proposals = []
    for accepted in (0, 3):
        lengths = [length + accepted for length in lengths]
        sequences = tuple(
            DraftSequence(
                session=key,
                committed_length=length + 1,
                num_features=accepted,
                new_token_ids=(5,) * (accepted + 1),
                num_speculative_tokens=BLOCK,
            )
            for key, length in zip(keys, lengths, strict=True)
        )
        new = [rows[length - accepted : length] for length in lengths]
        (results,) = engine.draft([("a", DraftRound(sequences, torch.cat(new)))])
        proposals += [result.proposal for result in results]
    engine.check_integrity()
    return [proposal for proposal in proposals if proposal is not None]


@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_a_drafter_drafts_the_same_however_it_runs(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr("cluster.engine.draft_block.has_kernels", lambda *_: False)
        expected = drafted(make_draft_engine(make_drafter(head=head)))
    assert len(expected) == 4
    for enforce_eager in (True, False):
        drafter = make_drafter(head=head)
        engine = make_draft_engine(drafter, enforce_eager=enforce_eager)
        for proposal, other in zip(drafted(engine), expected, strict=True):
            assert proposal.draft_token_ids == other.draft_token_ids
            assert proposal.confidences == pytest.approx(other.confidences, abs=1e-5)


def test_processors_without_packed_weights_compile_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.engine.cpu.packed_linear.can_pack", lambda _dtype: False)
    target = save_tiny_target(tmp_path, num_hidden_layers=1)
    shard = make_shard(target, layers=[0], enforce_eager=False)
    assert shard.execution == "compiled"
    step = passes([5, 2])
    expected, _ = outputs(make_shard(target, layers=[0]), step)
    torch.testing.assert_close(outputs(shard, step)[0], expected, rtol=1e-4, atol=1e-4)
