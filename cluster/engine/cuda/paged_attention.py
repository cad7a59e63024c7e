"""Attention over pages where they lie, in Triton; the CUDA side of ``cluster.engine.in_place``.

Few queries read long contexts: what counts is that keys and values are read once, by all
multiprocessors. Tokens of one sequence that follow each other make a tile, whose queries of all
heads that share a key head are one matrix; contexts are cut into splits, whose partial results a
second kernel weighs (flash decoding). Nothing here depends on the host once it is launched, so that
a launch can be replayed with other passes in the same buffers.

``torch.nn.attention.varlen`` has pages too; its kernel wants them 256 tokens large, which is coarse
for finding prefixes, and does not split a context that has several queries, as verification has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cluster.engine.cuda.pass_buffers import PassBuffers

_KEYS_PER_STEP = 64
_MIN_ROWS = 16  # of a matrix product's tile
_MAX_SPLITS = 16
_PROGRAMS = 264  # two for each multiprocessor of an H100


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    buffers: PassBuffers,
) -> None:
    """Writes tokens' keys and values to the slots of the pass.

    Args:
        key: ``[N, kv_heads, head_dim]``; ``value``: ``[N, kv_heads, value_dim]``.
        keys, values: of a layer, ``[num_pages, page_size, kv_heads, x]``.
    """
    num_tokens, heads, head_dim = key.shape
    _store[(num_tokens, heads)](
        key,
        value,
        keys,
        values,
        buffers.slots,
        *key.stride(),
        *value.stride(),
        HEADS=heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value.shape[2],
        HEAD_BLOCK=triton.next_power_of_2(head_dim),
        VALUE_BLOCK=triton.next_power_of_2(value.shape[2]),
        num_warps=1,
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    buffers: PassBuffers,
    *,
    scale: float,
    window: int,
    causal: bool,
) -> torch.Tensor:
    """Attends every query to its own sequence's pages, sums in fp32.

    Args:
        query: ``[N, heads, head_dim]``; rows behind the pass's tokens come out as zeros.
        keys, values: of a layer, ``[num_pages, page_size, kv_heads, x]``.
        window: tokens that a query sees; 0: all.
        causal: whether a query sees no later tokens.

    Returns:
        ``[N, heads, value_dim]``.
    """
    num_tokens, heads, head_dim = query.shape
    kv_heads, value_dim = values.shape[2], values.shape[3]
    group = heads // kv_heads
    tile = buffers.tile_tokens
    rows = max(_MIN_ROWS, triton.next_power_of_2(tile * group))
    tiles = buffers.num_tiles(num_tokens)
    full_tiles = -(-num_tokens // tile) * kv_heads
    splits = min(_MAX_SPLITS, triton.next_power_of_2(-(-_PROGRAMS // full_tiles)))
    parts = weights = output = query.new_empty(num_tokens, heads, value_dim)
    if splits == 1:
        output.zero_()
    else:
        shape = (num_tokens, heads, splits)
        parts = query.new_empty(*shape, value_dim, dtype=torch.float32)
        weights = query.new_empty(shape, dtype=torch.float32)
    blocks = {
        "VALUE_DIM": value_dim,
        "VALUE_BLOCK": triton.next_power_of_2(value_dim),
        "SPLITS": splits,
    }
    _attend[(tiles, kv_heads, splits)](
        query,
        keys,
        values,
        parts,
        weights,
        buffers.tiles,
        buffers.positions,
        buffers.context_lens,
        buffers.block_tables,
        buffers.block_tables.stride(0),
        *query.stride(),
        scale,
        window,
        TILE=tile,
        GROUP=group,
        ROWS=rows,
        STEP=_KEYS_PER_STEP,
        PAGE_SIZE=keys.shape[1],
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(head_dim),
        CAUSAL=causal,
        **blocks,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        _combine[(num_tokens, heads)](
            parts, weights, output, buffers.num_tokens, HEADS=heads, **blocks, num_warps=1
        )
    return output


@triton.jit
def _store(
    key,
    value,
    keys,
    values,
    slots,
    key_token,
    key_head,
    key_dim,
    value_token,
    value_head,
    value_dim,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(slots + token).to(tl.int64) * HEADS + head
    dims = tl.arange(0, HEAD_BLOCK)
    from_key = key + token * key_token + head * key_head + dims * key_dim
    inside = dims < HEAD_DIM
    tl.store(keys + row * HEAD_DIM + dims, tl.load(from_key, mask=inside), mask=inside)
    dims = tl.arange(0, VALUE_BLOCK)
    from_value = value + token * value_token + head * value_head + dims * value_dim
    inside = dims < VALUE_DIM
    tl.store(values + row * VALUE_DIM + dims, tl.load(from_value, mask=inside), mask=inside)


@triton.jit
def _attend(
    query,
    keys,
    values,
    parts,
    weights,
    tiles,
    positions,
    context_lens,
    block_tables,
    table_row,
    query_token,
    query_head,
    query_dim,
    scale,
    window,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    first = tl.load(tiles + tl.program_id(0) * 3)
    count = tl.load(tiles + tl.program_id(0) * 3 + 1)
    sequence = tl.load(tiles + tl.program_id(0) * 3 + 2)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if count > 0:
        rows = tl.arange(0, ROWS)
        offset = rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        is_row = offset < tl.minimum(count, TILE)
        token = first + offset
        position = tl.load(positions + token, mask=is_row, other=0)
        context = tl.load(context_lens + sequence)
        end = context
        seen = tl.zeros([ROWS], tl.int32) + context
        if CAUSAL:
            end = tl.load(positions + first + count - 1) + 1
            seen = position + 1
        begin = 0
        if window > 0:
            begin = tl.maximum(tl.load(positions + first) - window + 1, 0)
        chunk = tl.cdiv(tl.cdiv(end - begin, SPLITS), STEP) * STEP
        begin += split * chunk
        end = tl.minimum(end, begin + chunk)

        dims = tl.arange(0, HEAD_BLOCK)
        is_dim = dims < HEAD_DIM
        value_dims = tl.arange(0, VALUE_BLOCK)
        is_value_dim = value_dims < VALUE_DIM
        queries = tl.load(
            query
            + token[:, None] * query_token
            + head[:, None] * query_head
            + dims[None, :] * query_dim,
            mask=is_row[:, None] & is_dim[None, :],
            other=0.0,
        )
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
        for start in range(begin, end, STEP):
            columns = start + tl.arange(0, STEP)
            is_column = columns < end
            page = tl.load(
                block_tables + sequence * table_row + columns // PAGE_SIZE,
                mask=is_column,
                other=0,
            )
            row = (page.to(tl.int64) * PAGE_SIZE + columns % PAGE_SIZE) * KV_HEADS + kv_head
            some_keys = tl.load(
                keys + row[None, :] * HEAD_DIM + dims[:, None],
                mask=is_column[None, :] & is_dim[:, None],
                other=0.0,
            )
            scores = tl.dot(queries, some_keys, input_precision="ieee") * scale
            visible = is_column[None, :] & (columns[None, :] < seen[:, None])
            if window > 0:
                visible = visible & (columns[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1))
            # A row that has seen nothing yet has no maximum to subtract.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shares = tl.exp(scores - base[:, None])
            kept = tl.exp(best - base)
            total = total * kept + tl.sum(shares, axis=1)
            some_values = tl.load(
                values + row[:, None] * VALUE_DIM + value_dims[None, :],
                mask=is_column[:, None] & is_value_dim[None, :],
                other=0.0,
            )
            sums = sums * kept[:, None] + tl.dot(
                shares.to(some_values.dtype), some_values, input_precision="ieee"
            )
            best = higher
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (token * (KV_HEADS * GROUP) + head) * SPLITS + split
        tl.store(
            parts + place[:, None].to(tl.int64) * VALUE_DIM + value_dims[None, :],
            result.to(parts.dtype.element_ty),
            mask=is_row[:, None] & is_value_dim[None, :],
        )
        if SPLITS > 1:
            logs = tl.where(total == 0.0, float("-inf"), best + tl.log(total))
            tl.store(weights + place, logs, mask=is_row)


@triton.jit
def _combine(
    parts,
    weights,
    output,
    num_tokens,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    token = tl.program_id(0)
    place = token * HEADS + tl.program_id(1)
    dims = tl.arange(0, VALUE_BLOCK)
    is_dim = dims < VALUE_DIM
    result = tl.zeros([VALUE_BLOCK], tl.float32)
    if token < tl.load(num_tokens):
        splits = tl.arange(0, SPLITS)
        logs = tl.load(weights + place * SPLITS + splits)
        shares = tl.exp(logs - tl.max(logs, axis=0))
        shares = shares / tl.sum(shares, axis=0)
        rows = (place * SPLITS + splits).to(tl.int64)
        some = tl.load(
            parts + rows[:, None] * VALUE_DIM + dims[None, :], mask=is_dim[None, :], other=0.0
        )
        result = tl.sum(some * shares[:, None], axis=0)
    to_output = output + place.to(tl.int64) * VALUE_DIM + dims
    tl.store(to_output, result.to(output.dtype.element_ty), mask=is_dim)
