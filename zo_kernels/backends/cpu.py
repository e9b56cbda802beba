"""The cpu backend: the C++ kernels of `zo_kernels._C` (csrc/cpu) on torch CPU tensors, by raw pointers.

The functions and arguments of `reference`, the same bits for words, signs and rounding; normals come from
fp32 polynomials (csrc/normal.h).  `torch.get_num_threads()` threads share the work and never change a bit.
"""

from __future__ import annotations

import torch  # before _C, so that both use one OpenMP runtime
from torch import Tensor

from zo_kernels import _C
from zo_kernels.blocks import DTYPES, Blocks
from zo_kernels.noise import DISTRIBUTIONS


def isa() -> str:
    """The instruction set in use: generic, avx2 or avx512."""
    return _C.isa()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _require_cpu(device: torch.device) -> None:
    if device.type != "cpu":  # a device pointer would be a segmentation fault
        raise ValueError(f"the cpu backend works on cpu tensors, got {device}")


def _table(blocks: Blocks, tensors: list[Tensor]) -> list[tuple[int, int, int, int, int]]:
    _require_cpu(blocks.device)
    return [
        (tensor.data_ptr(), tensor.numel(), offset, tensor_id, DTYPES.index(tensor.dtype))
        for tensor, offset, tensor_id in zip(tensors, blocks.offsets, blocks.ids, strict=True)
    ]


def words(out: Tensor, seed: Tensor, tensor_id: int, stream: int, first_group: int) -> None:
    _require_cpu(seed.device)
    first_group &= 0xFFFFFFFFFFFFFFFF
    threads = torch.get_num_threads()
    _C.words(out.data_ptr(), out.shape[0], seed.data_ptr(), tensor_id, stream, first_group, threads)


def noise(out: Tensor, seed: Tensor, tensor_id: int, start: int, dist: str) -> None:
    _require_cpu(seed.device)
    kind, threads = DISTRIBUTIONS.index(dist), torch.get_num_threads()
    _C.noise(out.data_ptr(), out.numel(), seed.data_ptr(), tensor_id, start, kind, threads)


def axpy_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    dist: str,
) -> None:
    contiguous = [tensor.contiguous() for tensor in blocks.tensors]
    _C.axpy_(
        _table(blocks, contiguous),
        seeds.data_ptr(),
        coefs.data_ptr(),
        seeds.shape[0],
        _pointer(scale),
        _pointer(decay),
        _pointer(rounding_seed),
        DISTRIBUTIONS.index(dist),
        torch.get_num_threads(),
    )
    for tensor, written in zip(blocks.tensors, contiguous, strict=True):
        if written is not tensor and written.data_ptr() != tensor.data_ptr():
            tensor.copy_(written)


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
    _require_cpu(theta.device)
    if out.numel() == 0:
        return  # an empty tensor's data_ptr is 0, which would mean None
    theta_rows = theta.shape[0] if theta.dim() else 1
    _C.scratch(
        theta.data_ptr(),
        out.data_ptr(),
        theta_rows,
        0 if rows is None else rows.shape[0],
        theta.numel() // max(theta_rows, 1),
        _pointer(rows),
        tensor_id,
        DTYPES.index(theta.dtype),
        seed.data_ptr(),
        coef.data_ptr(),
        _pointer(scale),
        _pointer(nearest_above),
        DISTRIBUTIONS.index(dist),
        torch.get_num_threads(),
    )


def block_stats(blocks: Blocks, mean: Tensor, var: Tensor) -> None:
    contiguous = [tensor.contiguous() for tensor in blocks.tensors]
    _C.block_stats(_table(blocks, contiguous), mean.data_ptr(), var.data_ptr(), torch.get_num_threads())
