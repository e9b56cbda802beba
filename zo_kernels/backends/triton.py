"""The Triton backend: launchers of `zo_kernels.triton_kernels`, with the names and signatures of `reference`.

`axpy_` makes one launch per (dtype, layout) of a model, usually one, from tables that live on the device;
they are built at the first call and cached on the `Blocks` object.  `scratch` makes one launch per tensor.
`block_stats` has no kernel yet: torch reductions in fp64, block by block.  Only building tables waits for the
device (so make one call before capturing a CUDA graph).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from zo_kernels.blocks import Blocks
from zo_kernels.triton_kernels.axpy import axpy_kernel
from zo_kernels.triton_kernels.noise import HARDWARE, noise_kernel, words_kernel
from zo_kernels.triton_kernels.scratch import scratch_kernel

BLOCK = 2048  # elements per tile: two 16-byte accesses of a 16-bit dtype per thread, 40 to 80 registers
CHUNK = 1 << 16  # elements per program of axpy_: 458,000 chunks for 30B parameters, a table of 5.5 MB
SPAN = 1 << 14  # elements per program of scratch: a 4096 x 4096 matrix has 1,024 programs, for 132 processors
STATS = 1 << 25  # elements per step of block_stats: 256 MB of fp64
# Contraction off: the contract's one fma is written out, and nothing else may be fused.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
IN_REGISTERS = 2  # directions held in registers; more are read again for every tile

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Group:
    """The blocks that one launch covers: same dtype, all aligned or all not, as many strided dimensions."""

    dtype: torch.dtype
    aligned: bool
    dims: int
    chunk_block: Tensor  # int32 (chunks,)
    chunk_start: Tensor  # int64 (chunks,)
    shape: Tensor | None  # int64 (blocks, dims)
    stride: Tensor | None


@dataclass
class Tables:
    """A `Blocks` as the kernel reads it: a row per block, and per group a row per chunk."""

    key: tuple[int, ...]
    address: Tensor  # int64 (blocks,), as are the next three
    numel: Tensor
    offset: Tensor
    tensor_id: Tensor
    groups: list[Group]


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on the tensors' own device.  ValueError for CPU tensors, which only the interpreter can take."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if HARDWARE.value:
        raise ValueError(
            f"the triton backend needs cuda tensors, got {device}: use_backend('reference'), or set "
            f"TRITON_INTERPRET=1 before Triton is imported"
        )
    return contextlib.nullcontext()


def words(out: Tensor, seed: Tensor, tensor_id: int, stream: int, first_group: int) -> None:
    groups = out.shape[0]
    if groups:
        tiles = (first_group + groups - 1) // BLOCK - first_group // BLOCK + 1
        with _on(out.device):
            words_kernel[(tiles,)](out, groups, seed, tensor_id, stream, first_group, GROUPS=BLOCK, **LAUNCH)


def noise(out: Tensor, seed: Tensor, tensor_id: int, start: int, dist: str) -> None:
    numel = out.numel()
    if numel:
        tiles = (start + numel - 1) // BLOCK - start // BLOCK + 1
        with _on(out.device):
            noise_kernel[(tiles,)](
                out, numel, seed, tensor_id, start, BLOCK=BLOCK, SIGNS=dist == "rademacher", **LAUNCH
            )


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
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


def _chunks(numel: int, offset: int) -> Tensor:
    """Where the chunks of a tensor begin (int64, its elements): wherever the global index is a multiple of
    CHUNK, and at its first element, rounded down to a global index that is a multiple of 128."""
    cuts = torch.arange(offset // CHUNK, (offset + numel - 1) // CHUNK + 1, dtype=torch.int64) * CHUNK
    return cuts.clamp(min=offset // 128 * 128) - offset


def _tables(blocks: Blocks) -> Tables:
    """The tables of `blocks`, from its cache.  Comparing the addresses takes 0.2 us a tensor; without it, a
    parameter with a new storage (`param.data = ...`, `module.to()`) would be written where it used to be."""
    key = (CHUNK, *map(Tensor.data_ptr, blocks.tensors))
    cached = getattr(blocks, "triton_tables", None)
    if cached is not None and cached.key == key:
        return cached

    def column(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(blocks.device)

    layouts: dict[tuple[torch.dtype, bool, int], list[int]] = {}
    dims = [_dims(tensor) for tensor in blocks.tensors]
    for b, tensor in enumerate(blocks.tensors):
        aligned = not dims[b] and tensor.data_ptr() % 16 == 0 and blocks.offsets[b] % 128 == 0
        if blocks.numels[b]:
            layouts.setdefault((tensor.dtype, aligned, len(dims[b])), []).append(b)
    groups = []
    for (dtype, aligned, rank), members in layouts.items():
        starts = [_chunks(blocks.numels[b], blocks.offsets[b]) for b in members]
        counts = torch.tensor([start.numel() for start in starts])
        owner = torch.tensor(members, dtype=torch.int32).repeat_interleave(counts).to(blocks.device)
        shape = stride = None
        if rank:
            rows = [dims[b] if len(dims[b]) == rank else [(1, 0)] * rank for b in range(len(blocks))]
            shape = column([[size for size, _ in row] for row in rows])
            stride = column([[step for _, step in row] for row in rows])
        groups.append(Group(dtype, aligned, rank, owner, torch.cat(starts).to(blocks.device), shape, stride))
    blocks.triton_tables = Tables(
        key, column(list(key[1:])), column(blocks.numels), column(blocks.offsets), column(blocks.ids), groups
    )
    return blocks.triton_tables


def axpy_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    dist: str,
) -> None:
    if not len(blocks):
        return
    tables = _tables(blocks)
    count = seeds.shape[0]
    with _on(blocks.device):
        for group in tables.groups:
            axpy_kernel[(group.chunk_block.shape[0],)](
                group.chunk_block,
                group.chunk_start,
                tables.address,
                tables.numel,
                tables.offset,
                tables.tensor_id,
                group.shape,
                group.stride,
                scale,
                seeds,
                coefs,
                count,
                decay,
                None if group.dtype == torch.float32 else rounding_seed,
                DTYPE=_DTYPES[group.dtype],
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                COUNT=count if count <= IN_REGISTERS else 0,
                SIGNS=dist == "rademacher",
                ALIGNED=group.aligned,
                DIMS=group.dims,
                **LAUNCH,
            )


def scratch(
    theta: Tensor,
    out: Tensor,
    tensor_id: int,
    seed: Tensor,
    coef: Tensor,
    scale: Tensor | None,
    nearest_above: Tensor | None,
    rows: Tensor | None,
    dist: str,
) -> None:
    if not out.numel():
        return
    aligned = theta.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
    if rows is None:
        width, count = theta.numel(), 1
        pieces = -(-width // SPAN)
    else:
        width, count = theta[0].numel(), rows.shape[0]
        aligned = aligned and width % 128 == 0
        # A row that begins inside a span reaches into one more.
        whole = SPAN % width == 0 or width % SPAN == 0
        pieces = -(-width // SPAN) + (not whole)
    with _on(theta.device):
        scratch_kernel[(count * pieces,)](
            theta,
            out,
            rows,
            width,
            pieces,
            tensor_id,
            seed,
            coef,
            scale,
            None if theta.dtype == torch.float32 else nearest_above,
            SPAN=SPAN,
            BLOCK=BLOCK,
            SIGNS=dist == "rademacher",
            ALIGNED=aligned,
            **LAUNCH,
        )


def block_stats(blocks: Blocks, mean: Tensor, var: Tensor) -> None:
    for b, tensor in enumerate(blocks.tensors):
        parts = tensor.reshape(-1).split(STATS)
        center = torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum() / blocks.numels[b]
        squares = torch.stack([(part.double() - center).square_().sum() for part in parts]).sum()
        mean[b] = center
        var[b] = squares / max(blocks.numels[b] - 1, 1)
