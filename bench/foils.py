"""Two Triton kernels to measure ours against: what a GPU reads at most, and a perturbation with `tl.randn`.

    read     sink[program] = xor of a chunk's words      4 bytes read per word
    randn    theta += coef * tl.randn                    as the language's own generator offers it: one normal per
                                                         Philox call, accurate log, cos and sin
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK, BLOCK = 1 << 15, 1 << 12  # words: 8 rounds of 8 16-byte loads a thread


@triton.jit
def _combine(a, b):
    return a ^ b


@triton.jit
def xor_kernel(source, sink, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    words = tl.zeros([BLOCK], tl.int32)
    for first in range(0, CHUNK, BLOCK):
        words ^= tl.load(source + program.to(tl.int64) * CHUNK + first + tl.arange(0, BLOCK))
    tl.store(sink + program, tl.reduce(words, 0, _combine))


@triton.jit(do_not_specialize=["seed"])
def randn_kernel(theta, numel, seed, coef, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    x = tl.load(theta + element, mask=inside).to(tl.float32) + tl.load(coef) * tl.randn(seed, element)
    tl.store(theta + element, x.to(theta.dtype.element_ty), mask=inside)


def read(source: Tensor, sink: Tensor) -> None:
    """Reads a multiple of CHUNK 4-byte words; sink: int32, one per chunk."""
    words = source.view(torch.int32)
    xor_kernel[(words.numel() // CHUNK,)](words, sink, CHUNK=CHUNK, BLOCK=BLOCK, enable_fp_fusion=False)


def randn(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """theta += coef * z in place, a launch per tensor of fewer than 2^31 elements; Triton's usual contraction."""
    for tensor in tensors:
        grid = (triton.cdiv(tensor.numel(), 1024),)
        randn_kernel[grid](tensor, tensor.numel(), 5, coef, BLOCK=1024, enable_fp_fusion=True)
