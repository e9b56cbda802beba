"""The cpu backend: the C++ kernels of `zo_kernels._C` (csrc/cpu) on torch CPU tensors, by raw pointers.

The functions and arguments of `reference`, the same bits for words, signs and rounding; normals come from
fp32 polynomials (csrc/normal.h).  `torch.get_num_threads()` threads share the work and never change a bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate

import torch  # before _C, so that both use one OpenMP runtime
from torch import Tensor

from zo_kernels import _C
from zo_kernels.blocks import DTYPES, Blocks, BlockStats
from zo_kernels.forms import KINDS, Form
from zo_kernels.noise import DIRECTION, DISTRIBUTIONS
from zo_kernels.passes import one_by_one
from zo_kernels.rules import RULES

_DTYPE = {dtype: index for index, dtype in enumerate(DTYPES)}
_DIST = {dist: index for index, dist in enumerate(DISTRIBUTIONS)}
_KIND = {kind: index for index, kind in enumerate(KINDS, 1)}
_RULE = {rule: index for index, rule in enumerate(RULES)}


def isa() -> str:
    """The instruction set in use: generic, avx2 or avx512."""
    return _C.isa()


def _require_cpu(device: torch.device) -> None:
    if device.type != "cpu":  # a device pointer would be a segmentation fault
        raise ValueError(f"the cpu backend works on cpu tensors, got {device}")


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native(blocks: Blocks, tensors: list[Tensor]) -> _C.Table:
    return _C.Table(
        [
            _C.Block(tensor.data_ptr(), tensor.numel(), offset, tensor_id, _DTYPE[tensor.dtype])
            for tensor, offset, tensor_id in zip(tensors, blocks.offsets, blocks.ids, strict=True)
        ]
    )


def _table(blocks: Blocks) -> tuple[_C.Table, list[Tensor]]:
    """The native table of `blocks`, kept on it until a tensor moves.  With a strided tensor it is made for this call,
    of the contiguous tensors that come with it."""
    _require_cpu(blocks.device)
    made_for, table = getattr(blocks, "cpu_table", (None, None))
    if made_for is not blocks.addresses:
        table = _native(blocks, blocks.tensors) if all(map(Tensor.is_contiguous, blocks.tensors)) else None
        blocks.cpu_table = blocks.addresses, table
    if table is not None:
        return table, []
    contiguous = [tensor.contiguous() for tensor in blocks.tensors]
    return _native(blocks, contiguous), contiguous


def _write_back(blocks: Blocks, contiguous: list[Tensor]) -> None:
    """What was written to the contiguous copies of `_table`."""
    if contiguous:
        for tensor, written in zip(blocks.tensors, contiguous, strict=True):
            if written is not tensor:
                tensor.copy_(written)


def _block(theta: Tensor, tensor_id: int, offset: int = 0) -> _C.Block:
    _require_cpu(theta.device)
    return _C.Block(theta.data_ptr(), theta.numel(), offset, tensor_id, _DTYPE[theta.dtype])


def _forms(form: Form | None) -> _C.Forms | None:
    """Of a list, or of one tensor."""
    if form is None:
        return None
    states = form.state
    states = [] if states is None else [states] if isinstance(states, Tensor) else states
    dtype = _DTYPE[states[0].dtype] if states else 0
    return _C.Forms(_KIND[form.kind], dtype, [state.data_ptr() for state in states], _pointer(form.value))


def _update(
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    per_direction: bool,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    form: Form | None = None,
) -> _C.Update:
    return _C.Update(
        seeds.data_ptr(),
        coefs.data_ptr(),
        seeds.shape[0],
        _pointer(scale),
        per_direction,
        _pointer(decay),
        _pointer(rounding_seed),
        _forms(form),
    )


def _probe(
    out: Tensor,
    mirror: Tensor | None,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    nearest_above: Tensor | None,
    form: Form | None = None,
) -> _C.Probe:
    return _C.Probe(
        out.data_ptr(),
        _pointer(mirror),
        seeds.data_ptr(),
        coefs.data_ptr(),
        seeds.numel(),
        _pointer(scale),
        scale is not None and scale.dim() == 1,
        _pointer(nearest_above),
        _forms(form),
    )


def _stats(stats: BlockStats | None) -> _C.Stats | None:
    return None if stats is None else _C.Stats(*map(Tensor.data_ptr, stats))


def words(out: Tensor, seed: Tensor, tensor_id: int, stream: int, first_group: int) -> None:
    _require_cpu(seed.device)
    first_group &= 0xFFFFFFFFFFFFFFFF
    threads = torch.get_num_threads()
    _C.words(out.data_ptr(), out.shape[0], seed.data_ptr(), tensor_id, stream, first_group, threads)


def noise(out: Tensor, seed: Tensor, tensor_id: int, start: int, dist: str, stream: int = DIRECTION) -> None:
    _require_cpu(seed.device)
    threads = torch.get_num_threads()
    _C.noise(out.data_ptr(), out.numel(), seed.data_ptr(), tensor_id, start, _DIST[dist], stream, threads)


def axpy_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    dist: str,
    stats: BlockStats | None,
    form: Form | None = None,
) -> None:
    table, contiguous = _table(blocks)
    update = _update(seeds, coefs, scale, scale is not None and scale.dim() == 2, decay, rounding_seed, form)
    _C.axpy_(table, update, _DIST[dist], _stats(stats), torch.get_num_threads())
    _write_back(blocks, contiguous)


def replay_(
    blocks: Blocks,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    passes: Sequence[int],
    decays: Tensor | None,
    rounding_seeds: Tensor | None,
    stochastic: Sequence[bool],
    dist: str,
) -> None:
    if not hasattr(_C, "replay_"):
        warnings.warn("zo_kernels._C is older than this source, steps are replayed one by one: `pip install -e .` "
                      "builds it again", stacklevel=1)  # fmt: skip
        one_by_one(axpy_, blocks, seeds, coefs, scale, passes, decays, rounding_seeds, stochastic, dist)
        return
    table, contiguous = _table(blocks)
    update = _update(seeds, coefs, scale, scale is not None and scale.dim() == 2, None, None)
    sequence = _C.Sequence(list(accumulate(passes)), _pointer(decays), _pointer(rounding_seeds), list(stochastic))
    _C.replay_(table, update, sequence, _DIST[dist], torch.get_num_threads())
    _write_back(blocks, contiguous)


def update_state_(
    blocks: Blocks,
    rule: str,
    states: Sequence[Sequence[Tensor]],
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    numbers: Tensor,
    form: Form | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    keep: Tensor | None,
    dist: str,
) -> None:
    table, contiguous = _table(blocks)
    update = _update(seeds, coefs, scale, scale is not None and scale.dim() == 2, decay, rounding_seed, form)
    pointers = [[state.data_ptr() for state in of_blocks] for of_blocks in states]
    ruled = _C.Ruled(_RULE[rule], pointers, numbers.data_ptr(), _pointer(keep))
    _C.update_state_(table, ruled, update, _DIST[dist], torch.get_num_threads())
    _write_back(blocks, contiguous)


def scratch(
    theta: Tensor,
    out: Tensor,
    mirror: Tensor | None,
    tensor_id: int,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    nearest_above: Tensor | None,
    rows: Tensor | None,
    dist: str,
    stats: BlockStats | None,
    form: Form | None = None,
    offset: int = 0,
) -> None:
    block, kind, threads = _block(theta, tensor_id, offset), _DIST[dist], torch.get_num_threads()
    probe = _probe(out, mirror, seeds, coefs, scale, nearest_above, form)
    if rows is None:
        _C.scratch(block, probe, kind, _stats(stats), threads)
    else:
        of = theta.shape[0]
        index = _C.Rows(rows.data_ptr(), rows.shape[0], of, theta.numel() // max(of, 1))
        _C.scratch_rows(block, index, probe, kind, threads)


def update_scratch_(
    theta: Tensor,
    out: Tensor,
    mirror: Tensor | None,
    tensor_id: int,
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None,
    decay: Tensor | None,
    rounding_seed: Tensor | None,
    next_seed: Tensor,
    next_coef: Tensor,
    next_scale: Tensor | None,
    nearest_above: Tensor | None,
    dist: str,
    stats: BlockStats | None,
) -> None:
    block = _block(theta, tensor_id)
    update = _update(seeds, coefs, scale, scale is not None and scale.dim() == 1, decay, rounding_seed)
    probe = _probe(out, mirror, next_seed, next_coef, next_scale, nearest_above)
    _C.update_scratch_(block, update, probe, _DIST[dist], _stats(stats), torch.get_num_threads())


def dot_noise(blocks: Blocks, seeds: Tensor, out: Tensor, dist: str, stats: BlockStats | None) -> None:
    table, _contiguous = _table(blocks)
    threads = torch.get_num_threads()
    _C.dot_noise(table, seeds.data_ptr(), seeds.shape[0], out.data_ptr(), _DIST[dist], _stats(stats), threads)


def block_stats(blocks: Blocks, stats: BlockStats) -> None:
    table, _contiguous = _table(blocks)
    _C.block_stats(table, _stats(stats), torch.get_num_threads())
