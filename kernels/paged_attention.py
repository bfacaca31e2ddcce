"""Attention of one new token per sequence over its paged key and value cache, on the CPU.

The cache is read in place. A sequence's history is cut into chunks at multiples of 256 positions; every (chunk,
key head) is one piece of work with its own softmax, and the pieces are merged in order (as in FlashDecoding,
https://pytorch.org/blog/flash-decoding/). So the work divides evenly over threads whatever the lengths, and a
sequence's result depends neither on the number of threads nor on its neighbours.

Legend: S sequences, H query heads, Hk key heads, G = H / Hk, D key width, Dv value width.
"""

import struct

import numpy as np
import torch
from numba import njit

from .checks import address, check_rows, check_tensor
from .compiled import Part, arguments, call, kernel, run, workers_for
from .grouped_linear import store_row
from .scalars import (
    exp,
    float32_from,
    get_float32,
    get_int32,
    get_int64,
    larger,
    put_float32,
    put_int64,
    stack_buffer,
    tanh,
)
from .tile import FLOAT32, dot_block, kind_of
from .value_tile import add_rows

_CHUNK = 256

# Limits of what is kept on the stack: values of a row, and query heads that share a key head.
_MAX_WIDTH = 4096
_MAX_GROUP = 1024
_value_row = stack_buffer(_MAX_WIDTH)
_q_rows = stack_buffer(2 * _MAX_GROUP)

_pieces_arguments, _merge_arguments = arguments(31), arguments(11)


@njit
def _first_chunk(length, window):
    return (max(length - window, 0) if window else 0) // _CHUNK


@kernel
def _plan(sequences, key_heads, lengths, window, table, table_stride, blocks, block_size, limit, pieces):
    """Write to `pieces` (int64 [S + 1]) where each sequence's pieces of work start; return how many there are,
    or -1 - s if sequence s is longer than its row of the table, or names a block that does not exist."""
    total = 0
    for s in range(sequences):
        put_int64(pieces, s, total)
        length = np.int64(get_int32(lengths, s))
        if length < 0 or length > limit:
            return -1 - s
        begin = max(length - window, 0) if window else 0
        for b in range(begin // block_size, (length + block_size - 1) // block_size):
            block = get_int32(table, s * table_stride + b)
            if block < 0 or block >= blocks:
                return -1 - s
        total += ((length + _CHUNK - 1) // _CHUNK - begin // _CHUNK) * key_heads
    put_int64(pieces, sequences, total)
    return total


@njit
def _maximum(values, n):
    best = get_float32(values, 0)
    for i in range(1, n):
        best = larger(best, get_float32(values, i))
    return best


@njit(fastmath={"reassoc"})
def _exponentials(values, n, top):
    """values[i] = e**(values[i] - top); returns their sum."""
    for i in range(n):
        put_float32(values, i, exp(get_float32(values, i) - top))
    total = np.float32(0.0)
    for i in range(n):
        total += get_float32(values, i)
    return total


@njit
def _scale(values, n, scale, softcap):
    if softcap > 0:
        for i in range(n):
            put_float32(values, i, softcap * tanh(get_float32(values, i) * scale / softcap))
    else:
        for i in range(n):
            put_float32(values, i, get_float32(values, i) * scale)


@njit(fastmath={"contract"})
def _add_row(out, weight, values, width):
    for d in range(width):
        put_float32(out, d, get_float32(out, d) + weight * get_float32(values, d))


@Part
def _pieces_part(part, parts, args):
    """One worker's pieces. Writes for each piece and head of its group: largest score, sum of exponentials, and
    the exponentials' sum of values. Strides are in bytes; scores is room for group * _CHUNK for each worker."""
    (
        dot, add, kind, sequences, heads, key_heads, width, value_width, q, q_sequence, q_head, keys, key_block,
        key_position, key_head, values, value_block, value_position, value_head, block_size, table, table_stride,
        lengths, window, scale_bits, softcap_bits, pieces, scores, tops, sums, outs,
    ) = _pieces_arguments(args)  # fmt: skip
    scale, softcap = float32_from(scale_bits), float32_from(softcap_bits)
    group = heads // key_heads
    scores += part * group * 4 * _CHUNK
    q_rows = _q_rows()
    total = get_int64(pieces, sequences)
    s = 0
    for piece in range(total * part // parts, total * (part + 1) // parts):
        while piece >= get_int64(pieces, s + 1):
            s += 1
        local = piece - get_int64(pieces, s)
        head = local % key_heads
        length = np.int64(get_int32(lengths, s))
        chunk = _first_chunk(length, window) + local // key_heads
        begin = max(chunk * _CHUNK, length - window if window else 0)
        end = min((chunk + 1) * _CHUNK, length)
        for g in range(group):
            put_int64(q_rows, g, q + s * q_sequence + (head * group + g) * q_head)

        at = begin
        while at < end:
            n = min(block_size - at % block_size, end - at)
            block = np.int64(get_int32(table, s * table_stride + at // block_size))
            row = keys + block * key_block + at % block_size * key_position + head * key_head
            call(dot, kind, q_rows, group, row, key_position, n, width, scores + 4 * (at - begin), _CHUNK)
            at += n
        out = outs + 4 * piece * group * value_width
        for g in range(group):
            row_scores = scores + 4 * g * _CHUNK
            _scale(row_scores, end - begin, scale, softcap)
            top = _maximum(row_scores, end - begin)
            put_float32(tops, piece * group + g, top)
            put_float32(sums, piece * group + g, _exponentials(row_scores, end - begin, top))
        for i in range(group * value_width):
            put_float32(out, i, np.float32(0.0))
        at = begin
        while at < end:
            n = min(block_size - at % block_size, end - at)
            block = np.int64(get_int32(table, s * table_stride + at // block_size))
            row = values + block * value_block + at % block_size * value_position + head * value_head
            weights = scores + 4 * (at - begin)
            call(add, kind, weights, _CHUNK, group, n, row, value_position, out, value_width)
            at += n


@Part
def _merge_part(part, parts, args):
    """One worker's heads of the result, from their pieces."""
    kind, sequences, heads, key_heads, width, sinks, pieces, tops, sums, outs, out = _merge_arguments(args)
    size = 4 if kind == FLOAT32 else 2
    group = heads // key_heads
    total = _value_row()
    for row in range(sequences * heads * part // parts, sequences * heads * (part + 1) // parts):
        s, head = row // heads, row % heads
        first, last = get_int64(pieces, s) + head // group, get_int64(pieces, s + 1)
        for i in range(width):
            put_float32(total, i, np.float32(0.0))
        if first < last:
            top = get_float32(sinks, head) if sinks else get_float32(tops, first * group + head % group)
            for piece in range(first, last, key_heads):
                top = max(top, get_float32(tops, piece * group + head % group))
            below = exp(get_float32(sinks, head) - top) if sinks else np.float32(0.0)
            for piece in range(first, last, key_heads):
                place = piece * group + head % group
                factor = exp(get_float32(tops, place) - top)
                below += factor * get_float32(sums, place)
                _add_row(total, factor, outs + 4 * place * width, width)
            for i in range(width):
                put_float32(total, i, get_float32(total, i) / below)
        store_row(kind, total, width, out + row * width * size)


def paged_decode_attention(
    q_SHD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """out_SHDv: each sequence's last token (position seq_lens[s] - 1, already in the cache) attends over its history.

    key_cache [blocks, block_size, Hk, D] and value_cache [blocks, block_size, Hk, Dv], float32 or bfloat16
    like q, with contiguous last dimensions; block_table int32 [S, max_blocks] and seq_lens int32 [S]. H is a multiple
    of Hk. window > 0 keeps positions above seq_lens - 1 - window. sinks_H adds one logit per head to the softmax's
    denominator. softcap > 0 replaces a score s by softcap * tanh(s / softcap). A length of 0 gives zeros.
    """
    kind = kind_of(q_SHD.dtype)
    sequences, heads, width = q_SHD.shape
    blocks, block_size, key_heads, _ = key_cache.shape
    value_width = value_cache.shape[3]
    check_rows("q_SHD", q_SHD, (sequences, heads, width), q_SHD.dtype)
    check_rows("key_cache", key_cache, (blocks, block_size, key_heads, width), q_SHD.dtype)
    check_rows("value_cache", value_cache, (blocks, block_size, key_heads, value_width), q_SHD.dtype)
    check_tensor("seq_lens", seq_lens, (sequences,), torch.int32)
    check_tensor("block_table", block_table, (sequences, block_table.shape[-1]), torch.int32)
    group = heads // key_heads
    if group * key_heads != heads or group > _MAX_GROUP or value_width > _MAX_WIDTH:
        raise ValueError(
            f"q_SHD: {heads} query heads must be a multiple, at most {_MAX_GROUP}, of the {key_heads} key heads, and "
            f"value rows of {value_width} at most {_MAX_WIDTH} wide"
        )
    sinks = None
    if sinks_H is not None:
        sinks = sinks_H.to(torch.float32).contiguous()
        check_tensor("sinks_H", sinks, (heads,), torch.float32)

    out = q_SHD.new_empty(sequences, heads, value_width)
    pieces = torch.empty(sequences + 1, dtype=torch.int64)
    limit = block_table.shape[1] * block_size
    table, table_stride, lengths = block_table.data_ptr(), block_table.stride(0), seq_lens.data_ptr()
    total = _plan(
        sequences, key_heads, lengths, window, table, table_stride, blocks, block_size, limit, pieces.data_ptr()
    )
    if total < 0:
        s = -1 - total
        raise ValueError(
            f"block_table: sequence {s} of {int(seq_lens[s])} tokens needs more blocks of {block_size} than its row "
            f"has, or one outside 0..{blocks - 1}"
        )
    size = q_SHD.element_size()
    workers = workers_for(total * min(_CHUNK, limit) * (width + value_width) * size)
    room = torch.empty(workers * group * _CHUNK + total * group * (2 + value_width), dtype=torch.float32)
    scores = room.data_ptr()
    tops = scores + 4 * workers * group * _CHUNK
    sums = tops + 4 * total * group
    outs = sums + 4 * total * group
    q, k, v = ([step * size for step in t.stride()] for t in (q_SHD, key_cache, value_cache))
    run(
        workers, _pieces_part, dot_block.address, add_rows.address, kind, sequences, heads, key_heads, width,
        value_width, q_SHD.data_ptr(), q[0], q[1], key_cache.data_ptr(), k[0], k[1], k[2], value_cache.data_ptr(),
        v[0], v[1], v[2], block_size, table, table_stride, lengths, window, _bits(scale), _bits(softcap),
        pieces.data_ptr(), scores, tops, sums, outs,
    )  # fmt: skip
    run(
        workers, _merge_part, kind, sequences, heads, key_heads, value_width, address(sinks), pieces.data_ptr(), tops,
        sums, outs, out.data_ptr(),
    )  # fmt: skip
    return out


def _bits(value: float) -> int:
    """A float32's bits, as kernels take only integers."""
    return struct.unpack("i", struct.pack("f", value))[0]
