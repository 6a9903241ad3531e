"""Attention of one token per row over keys and values in each row's own memory, in Triton for CUDA GPUs.

Addresses and lengths are read from the GPU's memory, so that one CUDA graph serves rows that are added, removed or
grow.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux, or a PyTorch without CUDA
    triton = None

POSITIONS, WARPS = 32, 8
"""The number of positions whose keys and values a program reads at a time, and its number of warps."""

PROGRAMS = 256
"""The approximate number of programs that the rows are split among: two for each multiprocessor of an H100."""

MOST_PARTS = 16
"""The most parts that a row's positions are split into."""


def is_available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    addresses: torch.Tensor,
    strides: torch.Tensor,
    places: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Write each row's new key and value to its place, then attend to all positions up to that one.

    Rows may share memory, for several tokens of one conversation: all are written before any is read.

    Args:
        query: [rows, heads, head_dim] of any float dtype.
        key, value: [rows, kv_heads, head_dim], in the dtype of what the addresses point to.
        addresses: int64 [2, rows], the addresses of each row's keys and values, both [kv_heads, capacity, head_dim].
            The capacity must include the row's place.
        strides: int64 [rows], elements from one head to the next: capacity * head_dim.
        places: int64 [rows], the position of each row's token, which is also the number of positions before it.
        scale: factor of the products of queries and keys.

    Returns:
        [rows, heads, head_dim] in the query's dtype.
    """
    rows, heads, head_dim = query.shape
    kv_heads, padded = key.shape[1], triton.next_power_of_2(head_dim)
    parts = min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(PROGRAMS, rows * heads)))
    sums = query.new_empty(rows * heads, parts, head_dim, dtype=torch.float32)
    largest, weights = query.new_empty(2, rows * heads, parts, dtype=torch.float32)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    where = (addresses, strides, places, rows)
    _write[rows, kv_heads](key.contiguous(), value.contiguous(), *where, head_dim, padded)
    _attend_part[rows * heads, parts](
        query.contiguous(), key, *where, sums, largest, weights, scale, heads, heads // kv_heads, head_dim, padded,
        parts, POSITIONS, num_warps=WARPS,  # ty: ignore[unknown-argument]  Triton takes it
    )  # fmt: skip
    _combine[(rows * heads,)](sums, largest, weights, output, head_dim, padded, parts)
    return output


if triton is not None:
    LEAST = tl.constexpr(-1e30)
    """Less than any score. Minus infinity would not do, as its difference with itself is NaN."""

    @triton.jit
    def _write(keys, values, addresses, strides, places, rows, head_dim: tl.constexpr, padded: tl.constexpr):
        """Write a row's key and value of one head."""
        row, head = tl.program_id(0), tl.program_id(1)
        column = tl.arange(0, padded)
        is_column = column < head_dim
        read = (row * tl.num_programs(1) + head) * head_dim + column
        written = head * tl.load(strides + row) + tl.load(places + row) * head_dim + column
        keys_of_row = tl.load(addresses + row).to(keys.dtype)
        values_of_row = tl.load(addresses + rows + row).to(keys.dtype)
        tl.store(keys_of_row + written, tl.load(keys + read, is_column), is_column)
        tl.store(values_of_row + written, tl.load(values + read, is_column), is_column)

    @triton.jit
    def _attend_part(
        queries, keys, addresses, strides, places, rows, sums, largest, weights, scale,
        heads: tl.constexpr, queries_per_key: tl.constexpr, head_dim: tl.constexpr, padded: tl.constexpr,
        parts: tl.constexpr, positions: tl.constexpr,
    ):  # fmt: skip
        """One head of a row over one part of its positions: the largest score, and the sums of weights and values."""
        index, part = tl.program_id(0), tl.program_id(1)
        row, head = index // heads, index % heads
        column = tl.arange(0, padded)
        is_column = column < head_dim
        of_head = head // queries_per_key * tl.load(strides + row)
        keys_of_row = tl.load(addresses + row).to(keys.dtype) + of_head
        values_of_row = tl.load(addresses + rows + row).to(keys.dtype) + of_head
        if head_dim % 8 == 0:  # then 16 bytes can be read at once
            keys_of_row, values_of_row = tl.multiple_of(keys_of_row, 16), tl.multiple_of(values_of_row, 16)
        length = tl.load(places + row) + 1
        per_part = tl.cdiv(tl.cdiv(length, parts), positions) * positions
        end = tl.minimum(length, (part + 1) * per_part)
        query = tl.load(queries + index * head_dim + column, is_column, 0.0).to(tl.float32) * scale
        # Each lane sums every `positions`-th position on its own, so that the loop waits only for memory.
        top = tl.full((positions,), LEAST, tl.float32)
        weight = tl.zeros((positions,), tl.float32)
        total = tl.zeros((positions, padded), tl.float32)
        for start in range(part * per_part, end, positions):
            position = start + tl.arange(0, positions)
            place = position[:, None] * head_dim + column[None, :]
            is_held = position < end
            is_read = is_held[:, None] if head_dim == padded else is_held[:, None] & is_column[None, :]
            key = tl.load(keys_of_row + place, is_read, 0.0).to(tl.float32)
            value = tl.load(values_of_row + place, is_read, 0.0).to(tl.float32)
            score = tl.where(is_held, tl.sum(key * query[None, :], 1), LEAST)
            new_top = tl.maximum(top, score)
            shrink, share = tl.exp(top - new_top), tl.where(is_held, tl.exp(score - new_top), 0.0)
            total = total * shrink[:, None] + share[:, None] * value
            weight = weight * shrink + share
            top = new_top
        highest = tl.max(top, 0)
        shrink = tl.exp(top - highest)
        at = index * parts + part
        tl.store(sums + at * head_dim + column, tl.sum(total * shrink[:, None], 0), is_column)
        tl.store(largest + at, highest)
        tl.store(weights + at, tl.sum(weight * shrink, 0))

    @triton.jit
    def _combine(
        sums, largest, weights, output, head_dim: tl.constexpr, padded: tl.constexpr, parts: tl.constexpr
    ):  # fmt: skip
        """Combine the parts of one head of a row."""
        index = tl.program_id(0)
        column, part = tl.arange(0, padded), tl.arange(0, parts)
        at = index * parts + part
        top = tl.load(largest + at)
        share = tl.exp(top - tl.max(top, 0))  # 0 for parts without positions
        of_part = tl.load(
            sums + at[:, None] * head_dim + column[None, :], (column < head_dim)[None, :] & (part >= 0)[:, None], 0.0
        )
        total = tl.sum(share[:, None] * of_part, 0) / tl.sum(share * tl.load(weights + at), 0)
        tl.store(output + index * head_dim + column, total.to(output.dtype.element_ty), column < head_dim)
