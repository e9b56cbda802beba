"""The Triton backend: launchers of `zo_kernels.triton_kernels`, with the names and signatures of `reference`.

`axpy_`, `update_state_`, `dot_noise` and `block_stats` make one launch for all the tensors of a list that are
contiguous on 16-byte boundaries, whatever their dtypes, from tables that live on the device; the tables are built at
the first call and cached on the `Blocks` object.  The other tensors (`misfits`), and all where a state is not aligned,
take a slower kernel, one launch for each number of strided dimensions.  Statistics and dots end in one small launch
more.  The ops of one tensor are in `triton_tensor.py`.  Only building tables waits for the device (so make one call
before capturing a CUDA graph).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from zo_kernels.backends.triton_tensor import noise, scratch, update_scratch_, words
from zo_kernels.blocks import Blocks, BlockStats
from zo_kernels.forms import KINDS, Form
from zo_kernels.rules import RULES
from zo_kernels.triton_kernels import launch
from zo_kernels.triton_kernels.axpy import axpy_kernel
from zo_kernels.triton_kernels.dot import read_kernel, sum_kernel
from zo_kernels.triton_kernels.replay import replay_kernel
from zo_kernels.triton_kernels.states import VISITS, state_kernel
from zo_kernels.triton_kernels.table import DTYPES, Group, Tables, addresses_of, build

__all__ = [
    "axpy_",
    "block_stats",
    "dot_noise",
    "misfits",
    "noise",
    "replay_",
    "scratch",
    "update_scratch_",
    "update_state_",
    "words",
]


def _tables(blocks: Blocks) -> Tables:
    """The tables of `blocks`, from its cache.  A parameter with a new storage (`param.data = ...`, `module.to()`)
    makes new ones: it would be written where it used to be."""
    addresses = blocks.refresh()
    cached = getattr(blocks, "triton_tables", None)
    if cached is None or cached.addresses is not addresses:
        cached = blocks.triton_tables = build(blocks, addresses, launch.CHUNK)
    return cached


def misfits(blocks: Blocks) -> list[str]:
    """Names of the blocks that take the slower kernels: not contiguous, not on a 16-byte boundary, or beginning at a
    global index that is no multiple of 128."""
    slow = [b for group in _tables(blocks).groups if not group.aligned for b in group.members]
    return [blocks.names[b] for b in sorted(slow)]


def _options(group: Group, dist: str, aligned: bool = True) -> dict:
    """What kernels over tables are compiled for.  aligned: whether the states are."""
    shape = {
        "DTYPES": group.dtypes,
        "ALIGNED": group.aligned and aligned,
        "DIMS": group.dims,
        "CHUNK": launch.CHUNK,
        "BLOCK": launch.BLOCK,
    }
    return shape | {"SIGNS": dist == "rademacher"} | launch.OPTIONS


def _from(first: int, rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows[first:]


def _form_of_list(blocks: Blocks, form: Form | None) -> tuple[tuple, tl.dtype, bool]:
    """For a kernel over tables: (addresses of h or mu, values, their stride), the dtype, whether all are aligned."""
    if form is None:
        return (None, None, 0), tl.float32, True
    stride = int(KINDS[form.kind].per_block)
    if form.state is None:
        return (None, form.value, stride), tl.float32, True
    table, aligned = addresses_of(blocks, [form.state])
    return (table, form.value, stride), DTYPES[form.state[0].dtype], aligned


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
    if not len(blocks):
        return
    tables, count = _tables(blocks), seeds.shape[0]
    partial = launch.partial_sums(tables.chunks, stats, blocks.device)
    shape, dtype, aligned = _form_of_list(blocks, form)
    with launch.on(blocks.device):
        for group in tables.groups:
            axpy_kernel[(len(group.chunks),)](
                tables.blocks,
                group.chunks,
                group.layouts,
                scale,
                launch.stride(scale, 1),
                seeds,
                coefs,
                count,
                decay,
                None if group.dtypes == (tl.float32,) else rounding_seed,
                *shape,
                _from(group.first, partial),
                STATE=dtype,
                COUNT=launch.held(count),
                **_options(group, dist, aligned),
            )
        launch.finish(stats, partial, tables.blocks)


def _read(blocks: Blocks, seeds: Tensor | None, out: Tensor | None, dist: str, stats: BlockStats | None) -> None:
    if not len(blocks):
        return
    tables = _tables(blocks)
    count = 0 if seeds is None else seeds.shape[0]
    partial = launch.partial_sums(tables.chunks, stats, blocks.device)
    dots = torch.empty((count, tables.chunks), dtype=torch.float64, device=blocks.device) if count else None
    with launch.on(blocks.device):
        for group in tables.groups:
            read_kernel[(len(group.chunks),)](
                tables.blocks,
                group.chunks,
                group.layouts,
                seeds,
                count,
                None if dots is None else dots[0, group.first :],
                tables.chunks,
                _from(group.first, partial),
                **_options(group, dist),
            )
        if dots is not None:
            sum_kernel[(len(blocks), count)](
                dots, tables.chunks, tables.blocks, out, LANES=launch.LANES, **launch.OPTIONS
            )
        launch.finish(stats, partial, tables.blocks)


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
    if not len(blocks):
        return
    tables, device = _tables(blocks), blocks.device
    ends = torch.tensor(list(accumulate(passes)), dtype=torch.int64).to(device)
    at_random = torch.tensor(stochastic, dtype=torch.int32).to(device)
    with launch.on(device):
        for group in tables.groups:
            replay_kernel[(len(group.chunks),)](
                tables.blocks,
                group.chunks,
                group.layouts,
                scale,
                launch.stride(scale, 1),
                seeds,
                coefs,
                ends,
                len(ends),
                decays,
                None if group.dtypes == (tl.float32,) else rounding_seeds,
                at_random,
                **_options(group, dist),
            )


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
    if not len(blocks):
        return
    tables, count = _tables(blocks), seeds.shape[0]
    addresses, aligned = addresses_of(blocks, states)
    shape, dtype, shape_aligned = _form_of_list(blocks, form)
    with launch.on(blocks.device):
        for group in tables.groups:
            options = _options(group, dist, aligned and shape_aligned)
            options["BLOCK"] = launch.STATE_BLOCK if states else launch.BLOCK
            state_kernel[(len(group.chunks),)](
                tables.blocks,
                group.chunks,
                group.layouts,
                addresses,
                len(blocks),
                numbers,
                keep,
                scale,
                launch.stride(scale, 1),
                seeds,
                coefs,
                count,
                decay,
                None if group.dtypes == (tl.float32,) else rounding_seed,
                *shape,
                VISIT=VISITS[rule],
                WEIGHTS=RULES[rule].per_direction,
                STATES=len(states),
                NUMBERS=len(RULES[rule].numbers),
                STATE=dtype,
                COUNT=launch.held(count),
                **options,
            )


def dot_noise(blocks: Blocks, seeds: Tensor, out: Tensor, dist: str, stats: BlockStats | None) -> None:
    _read(blocks, seeds, out, dist, stats)


def block_stats(blocks: Blocks, stats: BlockStats) -> None:
    _read(blocks, None, None, "normal", stats)
