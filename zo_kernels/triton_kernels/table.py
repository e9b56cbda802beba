"""The tables through which one launch covers the tensors of a model: a row per tensor, a row per chunk of one.

`build` makes them on the host, kernels with a program per chunk read them.  All is int64: addresses and element
indices pass 2^31.  Chunks are cut at multiples of a power of two in the global index, so that the noise's group
index does not wrap inside one and no result depends on a tensor's neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.blocks import Blocks
from zo_kernels.triton_kernels.directions import load_form

# A block's row.
ADDRESS = tl.constexpr(0)  # data_ptr
NUMEL = tl.constexpr(1)
OFFSET = tl.constexpr(2)  # global index of element 0
TENSOR_ID = tl.constexpr(3)
KIND = tl.constexpr(4)  # place of its dtype in the launch's DTYPES
FIRST_CHUNK = tl.constexpr(5)  # counted over all launches of the list
CHUNKS = tl.constexpr(6)
FIELDS = tl.constexpr(7)
# A chunk's row: its block, and its first element in it (above -128, see `open_chunk`).

KEPT = 64  # lists of states whose addresses stay on a `Blocks`
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Group:
    """The blocks that one launch covers: all aligned or none, and as many strided dimensions."""

    dtypes: tuple  # Triton's, as few as there are: a list of one dtype compiles no branch
    aligned: bool
    dims: int
    members: list[int]
    chunks: Tensor  # int64 (chunks, 2)
    first: int  # chunks in the groups before
    layouts: Tensor | None  # int64 (blocks, 2 * dims)


@dataclass
class Tables:
    """A `Blocks` as the kernels read it."""

    addresses: tuple[int, ...]  # the object that `Blocks.refresh` returns while nothing moves
    blocks: Tensor  # int64 (blocks, FIELDS)
    groups: list[Group]
    chunks: int


def dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions that remain when neighbours that lie in one run are merged; none for a
    contiguous tensor."""
    if tensor.is_contiguous():
        return []
    merged: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def chunk_starts(numel: int, offset: int, chunk: int) -> Tensor:
    """Where the chunks of a tensor begin (int64, its elements): wherever the global index is a multiple of `chunk`,
    and at its first element, rounded down to a global index that is a multiple of 128."""
    cuts = torch.arange(offset // chunk, (offset + numel - 1) // chunk + 1, dtype=torch.int64) * chunk
    return cuts.clamp(min=offset // 128 * 128) - offset


def build(blocks: Blocks, addresses: tuple[int, ...], chunk: int) -> Tables:
    dims = [dimensions(tensor) for tensor in blocks.tensors]
    members: dict[tuple[bool, int], list[int]] = {}
    for b, address in enumerate(addresses):
        aligned = not dims[b] and address % 16 == 0 and blocks.offsets[b] % 128 == 0
        if blocks.numels[b]:
            members.setdefault((aligned, len(dims[b])), []).append(b)
    kinds, firsts, counts = ([0] * len(blocks) for _ in range(3))
    groups, total = [], 0
    for (aligned, rank), some in sorted(members.items(), reverse=True):
        dtypes = sorted({blocks.tensors[b].dtype for b in some}, key=str)
        rows, first = [], total
        for b in some:
            starts = chunk_starts(blocks.numels[b], blocks.offsets[b], chunk)
            rows.append(torch.stack([torch.full_like(starts, b), starts], dim=1))
            kinds[b], firsts[b], counts[b] = dtypes.index(blocks.tensors[b].dtype), total, len(starts)
            total += len(starts)
        layouts = None
        if rank:
            pairs = [dims[b] if len(dims[b]) == rank else [(1, 0)] * rank for b in range(len(blocks))]
            layouts = torch.tensor([[*zip(*row, strict=True)] for row in pairs]).flatten(1).to(blocks.device)
        names = tuple(DTYPES[dtype] for dtype in dtypes)
        groups.append(Group(names, aligned, rank, some, torch.cat(rows).to(blocks.device), first, layouts))
    fields = (addresses, blocks.numels, blocks.offsets, blocks.ids, kinds, firsts, counts)
    rows = torch.tensor(fields, dtype=torch.int64).t().contiguous().to(blocks.device)
    return Tables(addresses, rows, groups, total)


def addresses_of(blocks: Blocks, states: Sequence[Sequence[Tensor]]) -> tuple[Tensor, bool]:
    """Addresses of tensors like the blocks, int64 (states, blocks) on the device, and whether all are multiples of 16.
    The last ones are kept on `blocks`, for the next step and for captured graphs: states are written in place."""
    key = tuple(state.data_ptr() for of_blocks in states for state in of_blocks)
    kept = blocks.__dict__.setdefault("triton_state_tables", {})
    if key not in kept:
        if len(kept) == KEPT:
            del kept[next(iter(kept))]
        table = torch.tensor(key, dtype=torch.int64).view(len(states), len(blocks)).to(blocks.device)
        kept[key] = table, all(address % 16 == 0 for address in key)
    return kept[key]


@triton.jit
def open_chunk(blocks, chunks, layouts, CHUNK: tl.constexpr, DIMS: tl.constexpr):
    """This program's chunk: its block, the block's row, the chunk's first element, and the span of `walk`.

    A tensor that begins at no multiple of 128 in the global index (a shard) has a first chunk that begins up to 127
    elements before it."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    block = tl.load(chunk)
    start = tl.load(chunk + 1)
    row = blocks + block * FIELDS
    first = tl.load(row + OFFSET) + start
    left = tl.minimum(tl.load(row + NUMEL) - start, CHUNK - (first & (CHUNK - 1))).to(tl.int32)
    skip = tl.maximum(-start, 0).to(tl.int32)
    if DIMS == 0:
        return block, row, start, (first, 0, skip, left, ())
    else:
        return block, row, start, (first, start, skip, left, layouts + block * (2 * DIMS))


@triton.jit
def open_tensor(row, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, DIMS: tl.constexpr):
    """The pointer from which the places of the chunk's span count."""
    tensor = tl.load(row + ADDRESS).to(tl.pointer_type(DTYPE))
    if DIMS > 0:
        return tensor
    elif ALIGNED:
        return tl.multiple_of(tensor + start, 16)
    else:
        return tensor + start


@triton.jit
def open_state(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to the element at lane 0 of a chunk's span, of a contiguous tensor like the block, whose address is
    at `address`."""
    state = tl.load(address).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        return tl.multiple_of(state + start, 16)
    else:
        return state + start


@triton.jit
def open_states(addresses, stride, start, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """COUNT fp32 states of a block; addresses: pointer to the first one's, `stride` before the next."""
    states = ()
    for k in tl.static_range(COUNT):
        states = states + (open_state(addresses + k * stride, start, tl.float32, ALIGNED),)
    return states


@triton.jit
def open_list_form(addresses, values, value_stride, block, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """`load_form` of a block.  addresses: int64 (blocks,) of h or mu, or None; values: fp32, a value for every block
    (value_stride 1) or one for all (0), or None."""
    if values is not None:
        values += block * value_stride
    if addresses is None:
        return load_form(None, values)
    else:
        return load_form(open_state(addresses + block, start, DTYPE, ALIGNED), values)
