"""The cuda backend: block statistics of all tensors of a model in two launches (csrc/cuda), for any GPU since sm_80.

The names and arguments of `reference`, of this op alone.  Tables of chunks live on the device, built at the first call
and when a tensor has moved; only that waits for the device (so make one call before capturing a CUDA graph).
Tensors are read where they lie, in the order of their memory; a strided one (a slice of columns) is copied first, into
a buffer of its own that the tables keep.  The same bits whatever else is in the list, in whatever place.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.cuda import is_current_stream_capturing

from zo_kernels import _cuda
from zo_kernels.blocks import DTYPES, Blocks, BlockStats


@dataclass
class Tables:
    """A `Blocks` as the kernels read it (csrc/cuda/statistics.h)."""

    addresses: tuple[int, ...]  # the object that `Blocks.refresh` returned: the tables are of these places
    chunks: Tensor  # int64 (chunks, 2): address; elements, and dtype << 32
    spans: Tensor  # int64 (blocks, 2): first chunk, number of chunks
    copies: list[tuple[Tensor, Tensor]]  # (strided tensor, its contiguous copy)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in any order of the dimensions."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).is_contiguous()


def _tables(blocks: Blocks) -> Tables:
    cached = getattr(blocks, "cuda_tables", None)
    if cached is not None and cached.addresses is blocks.addresses:
        return cached
    if is_current_stream_capturing():
        raise RuntimeError("block_stats of these blocks: make one call before capturing a CUDA graph, for its tables")
    _cuda.load_kernels(blocks.device.index)
    copies, rows, spans, first = [], [], [], 0
    for tensor, numel in zip(blocks.tensors, blocks.numels, strict=True):
        if not _is_dense(tensor):
            copies.append((tensor, torch.empty_like(tensor, memory_format=torch.contiguous_format)))
            tensor = copies[-1][1]
        starts = torch.arange(0, numel, _cuda.CHUNK, dtype=torch.int64)
        sizes = (numel - starts).clamp(max=_cuda.CHUNK)
        addresses = tensor.data_ptr() + starts * tensor.element_size()
        rows.append(torch.stack((addresses, sizes + (DTYPES.index(tensor.dtype) << 32)), dim=1))
        spans.append((first, len(starts)))
        first += len(starts)
    chunks, spans = torch.cat(rows).to(blocks.device), torch.tensor(spans).to(blocks.device)
    blocks.cuda_tables = Tables(blocks.addresses, chunks, spans, copies)
    return blocks.cuda_tables


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on the tensors' own device.  ValueError for CPU tensors: the kernels would read host memory."""
    if device.type != "cuda":
        raise ValueError(f"the cuda backend works on cuda tensors, got {device}")
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def block_stats(blocks: Blocks, stats: BlockStats) -> None:
    if not len(blocks):
        return
    device = blocks.device
    with _on(device):
        tables = _tables(blocks)
        for strided, copy in tables.copies:
            copy.copy_(strided)
        chunks, spans = tables.chunks, tables.spans
        moments = torch.empty(len(chunks) * _cuda.MOMENTS_BYTES, dtype=torch.uint8, device=device)
        _cuda.block_stats(
            device.index,
            _stream(device),
            chunks.data_ptr(),
            len(chunks),
            spans.data_ptr(),
            len(spans),
            moments.data_ptr(),
            *(vector.data_ptr() for vector in stats),
        )
