"""Passes on a CUDA device: attention over pages, linear layers, graphs, and whole engines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.bench import parity
from cluster.engine.cuda.pass_buffers import TILE_TOKENS, PassBuffers
from cluster.engine.step_input import StepInput
from tests.models import DRAFTER, TARGET

MAX_PAGES = 64


def make_step(query_lens: list[int], cached_lens: list[int], page_size: int) -> StepInput:
    """Sequences whose pages lie anywhere."""
    queries, cached = np.array(query_lens), np.array(cached_lens)
    context = queries + cached
    pages = iter(np.random.default_rng(0).permutation(np.arange(1, 1000)).tolist())
    tables = np.zeros((len(queries), -(-int(context.max()) // page_size)), dtype=np.int64)
    for row, length in enumerate(context):
        used = -(-int(length) // page_size)
        tables[row, :used] = [next(pages) for _ in range(used)]
    owner = np.repeat(np.arange(len(queries)), queries)
    positions = np.concatenate([np.arange(c, c + q) for q, c in zip(queries, cached, strict=True)])
    slots = tables[owner, positions // page_size] * page_size + positions % page_size
    count = int(queries.sum())
    return StepInput(
        np.arange(count) % 97, positions, slots, queries, context, tables, np.arange(count)
    )


def test_tiles_cover_every_token_once() -> None:
    step = make_step([1, TILE_TOKENS, 2 * TILE_TOKENS + 3], [40, 0, 7], 16)
    buffers = PassBuffers(64, 8, MAX_PAGES, torch.device("cpu"))
    buffers.load(step, 32)
    tiles = buffers.tiles.tolist()
    covered = [(first + i, sequence) for first, count, sequence in tiles for i in range(count)]
    owner = np.repeat(np.arange(3), step.query_lens).tolist()
    assert covered == list(enumerate(owner))
    assert max(count for _, count, _ in tiles) == TILE_TOKENS
    assert len(tiles) >= buffers.num_tiles(step.num_tokens)


def test_padding_is_nobodys() -> None:
    buffers = PassBuffers(64, 8, MAX_PAGES, torch.device("cpu"))
    buffers.load(make_step([30], [100], 16))
    step = make_step([3], [20], 16)
    buffers.load(step, 8)
    assert buffers.num_tokens.tolist() == [3]
    for loaded, own in (
        (buffers.token_ids, step.token_ids),
        (buffers.positions, step.positions),
        (buffers.slots, step.slots),
    ):
        assert loaded[:8].tolist() == [*own.tolist(), 0, 0, 0, 0, 0]
    assert sum(count for _, count, _ in buffers.tiles.tolist()) == 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "causal", "queries", "cached"),
    [
        (8, 2, 32, 0, True, [1, 8, 3, 17], [40, 100, 0, 5]),
        (6, 2, 48, 30, True, [2, 9], [70, 3]),  # sizes that are no powers of two; a window
        (4, 4, 64, 0, False, [7, 7], [33, 0]),  # a drafter's blocks
        (8, 2, 128, 0, True, [8] * 20, [300] * 20),
        (8, 2, 32, 0, True, [120, 1], [500, 900]),  # a chunk of a prompt
    ],
)
def test_attention_is_the_plain_formulas(
    dtype: torch.dtype,
    tolerance: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    causal: bool,
    queries: list[int],
    cached: list[int],
) -> None:
    from cluster.engine.cuda import paged_attention

    device, page_size = torch.device("cuda"), 16
    torch.manual_seed(0)
    step = make_step(queries, cached, page_size)
    count = step.num_tokens
    padded = count + 3
    buffers = PassBuffers(256, 32, MAX_PAGES, device)
    buffers.load(step, padded)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    keys = normal(1000, page_size, kv_heads, head_dim)
    values = normal(1000, page_size, kv_heads, head_dim)
    key, value = (normal(kv_heads, padded, head_dim).transpose(0, 1) for _ in range(2))
    query = normal(heads, padded, head_dim).transpose(0, 1)
    paged_attention.store(key, value, keys, values, buffers)
    slots = torch.from_numpy(step.slots).to(device)
    assert torch.equal(keys.flatten(0, 1)[slots], key[:count])
    assert torch.equal(values.flatten(0, 1)[slots], value[:count])

    scale = head_dim**-0.5
    output = paged_attention.attend(
        query, keys, values, buffers, scale=scale, window=window, causal=causal
    )
    owner = np.repeat(np.arange(len(queries)), queries)
    expected = torch.zeros(count, heads, head_dim, dtype=torch.float64, device=device)
    for token in range(count):
        row, position = owner[token], int(step.positions[token])
        end = position + 1 if causal else int(step.context_lens[row])
        seen = np.arange(max(0, position - window + 1) if window else 0, end)
        pages = torch.from_numpy(step.block_tables[row][seen // page_size]).to(device)
        offsets = torch.from_numpy(seen % page_size).to(device)
        own_keys, own_values = (
            cache[pages, offsets].double().repeat_interleave(heads // kv_heads, dim=1)
            for cache in (keys, values)
        )
        scores = torch.einsum("hd,shd->hs", query[token].double(), own_keys) * scale
        expected[token] = torch.einsum("hs,shd->hd", scores.softmax(1), own_values)
    error = (output[:count].double() - expected).norm() / expected.norm()
    assert error < tolerance
    assert not output[count:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 40, 64])
@pytest.mark.parametrize("sizes", [[4096], [4096, 1024, 1000], [12288, 12288]])
def test_streamed_products_are_the_plain_ones(num_rows: int, sizes: list[int]) -> None:
    from cluster.engine.cuda import stream_rows

    torch.manual_seed(0)
    rows = torch.randn(num_rows, 1024, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, 1024, device="cuda", dtype=torch.bfloat16) for n in sizes]
    for product, weight in zip(stream_rows.products(rows, weights), weights, strict=True):
        expected = rows.double() @ weight.double().T
        assert (product.double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_outputs_with_graphs_agree_with_transformers() -> None:
    report = parity.run(
        target=TARGET, drafter=DRAFTER, num_prompts=24, max_tokens=32, device="cuda"
    )
    print(report.to_text())
    assert report.figures["mismatches"] == 0
    assert report.figures["prompts"] == 24
    assert report.figures["positions"] > 1.5 * 24 * 32
