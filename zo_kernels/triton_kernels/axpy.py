"""theta_b = round(decay * theta_b + sum_k coef_k * scale_b * z_kb) for every tensor b of a model, in place.

One launch covers all tensors of a (dtype, layout): each program takes one chunk, and its row of the chunk
table says which tensor that is and where in it.  Bytes moved per element of a 16-bit tensor: 4, for any
number of directions.  What changes from step to step is read from device memory: nothing recompiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.triton_kernels.span import load_directions, masked_span, span

_RUNTIME = ["chunk_block", "chunk_start", "address", "numel", "offset", "tensor_id", "shape", "stride",
            "scale", "seeds", "coefs", "count", "decay", "rounding_seed"]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def axpy_kernel(
    chunk_block,  # int32 (chunks,): which block
    chunk_start,  # int64 (chunks,): the chunk's first element in it; above -128, see `masked_span`
    address,  # int64 (blocks,): data_ptr
    numel,  # int64 (blocks,)
    offset,  # int64 (blocks,): global index of element 0
    tensor_id,  # int64 (blocks,)
    shape,  # int64 (blocks, DIMS) or None
    stride,  # int64 (blocks, DIMS) or None: in elements
    scale,  # fp32 (blocks,) or None
    seeds,  # int64 (count,)
    coefs,  # fp32 (count,)
    count: tl.int32,
    decay,  # fp32 () or None
    rounding_seed,  # int64 () or None: to nearest
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,  # chunks are cut at multiples of CHUNK in the global index
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,  # `count` where the directions fit in registers, else 0
    SIGNS: tl.constexpr,
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
    shrink = () if decay is None else (tl.load(decay),)
    rounding = () if rounding_seed is None else (tl.load(rounding_seed),)
    directions = load_directions(seeds, coefs, sigma, count, COUNT)
    change = (name, directions, shrink, rounding)
    if ALIGNED:
        theta = tl.multiple_of(theta + start, 16)
        span(theta, theta, first, left, change, BLOCK, COUNT, SIGNS)
    else:
        if DIMS > 0:
            shape += block * DIMS
            stride += block * DIMS
        skip = tl.maximum(-start, 0).to(tl.int32)
        masked_span(theta, theta, start, first, skip, left, shape, stride, change, BLOCK, COUNT, SIGNS, DIMS)
