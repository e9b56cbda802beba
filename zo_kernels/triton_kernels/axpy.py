"""theta_b = round(decay * theta_b + sum_k coef_k * scale_b * z_kb) for all tensors of a model in one launch per
(dtype, layout) group.  One program per chunk: a row of the chunk table says which tensor and where in it.

Bytes moved per element of a 16-bit tensor: 4, whatever the number of directions.  Every number that a step changes
(seeds, coefficients, scales, decay) is read from device memory, so that nothing recompiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.span import load_directions, masked_span, span

_RUNTIME = ["chunk_block", "chunk_start", "address", "numel", "offset", "tensor_id", "shape", "stride",
            "scale", "seeds", "coefs", "count", "decay", "rounding_seed"]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def axpy_kernel(
    chunk_block,  # int32 (chunks,): row of the block arrays
    chunk_start,  # int64 (chunks,): element of the tensor that the chunk's first lane stands for
    address,  # int64 (blocks,): data_ptr
    numel,  # int64 (blocks,)
    offset,  # int64 (blocks,): global index of element 0
    tensor_id,  # int64 (blocks,)
    shape,  # int64 (blocks, DIMS)
    stride,  # int64 (blocks, DIMS), elements
    scale,  # fp32 (blocks,) or None
    seeds,  # int64 (count,)
    coefs,  # fp32 (count,)
    count: tl.int32,
    decay,  # fp32 () or None
    rounding_seed,  # int64 () or None: to nearest
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,  # chunks are cut at multiples of CHUNK in the global index
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,  # directions held in registers
    MORE: tl.constexpr,  # whether count > COUNT
    RADEMACHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIMS: tl.constexpr,
):
    chunk = tl.program_id(0)
    block = tl.load(chunk_block + chunk)
    start = tl.load(chunk_start + chunk)
    first = tl.load(offset + block) + start
    left = tl.minimum(tl.load(numel + block) - start, CHUNK - (first & (CHUNK - 1))).to(tl.int32)
    theta = tl.load(address + block).to(tl.pointer_type(DTYPE))
    name = tl.load(tensor_id + block)
    sigma = 1.0 if scale is None else tl.load(scale + block)
    shrink = None if decay is None else tl.load(decay)
    rounding = None if rounding_seed is None else tl.load(rounding_seed)
    pairs = load_directions(seeds, coefs, sigma, COUNT)
    more = (seeds, coefs, count, sigma) if MORE else None
    if ALIGNED:
        theta = theta + tl.multiple_of(start, 128)
        theta = tl.multiple_of(theta, 16)
        span(theta, theta, first, left, name, pairs, more, shrink, rounding, DTYPE, BLOCK, COUNT, RADEMACHER)
    else:
        skip = tl.maximum(-start, 0).to(tl.int32)
        masked_span(theta, theta, start, first, skip, left, shape + block * DIMS, stride + block * DIMS, name, pairs,
                    more, shrink, rounding, DTYPE, BLOCK, COUNT, RADEMACHER, DIMS)  # fmt: skip
