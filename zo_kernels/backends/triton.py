"""The Triton backend: launchers of `zo_kernels.triton_kernels`, with the names and signatures of `reference`.

`axpy_`, `update_state_`, `dot_noise` and `block_stats` make one launch for all the tensors of a list that are
contiguous on 16-byte boundaries, whatever their dtypes, from tables that live on the device; the tables are built at
the first call and cached on the `Blocks` object.  The other tensors (`misfits`), and all where a state is not aligned,
take a slower kernel, one launch for each number of strided dimensions.  `scratch` and `update_scratch_` make one launch
per tensor.  Statistics and dots end in one small launch more.  Only building tables waits for the device (so make one
call before capturing a CUDA graph).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from zo_kernels.blocks import Blocks, BlockStats
from zo_kernels.forms import KINDS, Form
from zo_kernels.noise import DIRECTION
from zo_kernels.rules import RULES
from zo_kernels.triton_kernels.axpy import axpy_kernel
from zo_kernels.triton_kernels.dot import read_kernel, sum_kernel
from zo_kernels.triton_kernels.noise import HARDWARE, noise_kernel, words_kernel
from zo_kernels.triton_kernels.replay import replay_kernel
from zo_kernels.triton_kernels.scratch import scratch_kernel
from zo_kernels.triton_kernels.states import VISITS, state_kernel
from zo_kernels.triton_kernels.statistics import statistics_kernel
from zo_kernels.triton_kernels.table import DTYPES, Group, Tables, addresses_of, build

BLOCK = 2048  # elements per tile: two 16-byte accesses of a 16-bit dtype per thread, 40 to 80 registers
UPDATE_BLOCK = 1024  # of update_scratch_: four Philox calls per 8 elements took 117 registers at 2048, take 72
STATE_BLOCK = 1024  # of update_state_: theta and three states
CHUNK = 1 << 16  # elements per program of a list: 458,000 chunks for 30B parameters, a table of 7.3 MB
SPAN = 1 << 14  # elements per program of scratch: a 4096 x 4096 matrix has 1,024 programs, for 132 processors
LANES = 256  # chunks that the second stage of a reduction reads at a time
# Contraction off: the contract's one fma is written out, and nothing else may be fused.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
IN_REGISTERS = 2  # directions held in registers; more are read again for every tile


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


def noise(out: Tensor, seed: Tensor, tensor_id: int, start: int, dist: str, stream: int = DIRECTION) -> None:
    numel = out.numel()
    if numel:
        tiles = (start + numel - 1) // BLOCK - start // BLOCK + 1
        with _on(out.device):
            noise_kernel[(tiles,)](
                out, numel, seed, tensor_id, start, stream, BLOCK=BLOCK, SIGNS=dist == "rademacher", **LAUNCH
            )


def _tables(blocks: Blocks) -> Tables:
    """The tables of `blocks`, from its cache.  A parameter with a new storage (`param.data = ...`, `module.to()`)
    makes new ones: it would be written where it used to be."""
    addresses = blocks.refresh()
    cached = getattr(blocks, "triton_tables", None)
    if cached is None or cached.addresses is not addresses:
        cached = blocks.triton_tables = build(blocks, addresses, CHUNK)
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
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
    }
    return shape | {"SIGNS": dist == "rademacher"} | LAUNCH


def _partial(chunks: int, stats: BlockStats | None, device: torch.device) -> Tensor | None:
    """For the sums of each chunk, which `_finish` reads."""
    return None if stats is None else torch.empty((chunks, 4), dtype=torch.float64, device=device)


def _from(first: int, rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows[first:]


def _finish(stats: BlockStats | None, partial: Tensor | None, blocks: Tensor | None) -> None:
    """The second stage of statistics."""
    if stats is not None:
        grid = (len(stats.mean),)
        statistics_kernel[grid](partial, blocks, len(partial), *stats, LANES=LANES, **LAUNCH)


def _held(count: int) -> int:
    """How many directions a kernel holds in registers: all, or none."""
    return count if count <= IN_REGISTERS else 0


def _form_of_list(blocks: Blocks, form: Form | None) -> tuple[tuple, tl.dtype, bool]:
    """For a kernel over tables: (addresses of h or mu, values, their stride), the dtype, whether all are aligned."""
    if form is None:
        return (None, None, 0), tl.float32, True
    stride = int(KINDS[form.kind].per_block)
    if form.state is None:
        return (None, form.value, stride), tl.float32, True
    table, aligned = addresses_of(blocks, [form.state])
    return (table, form.value, stride), DTYPES[form.state[0].dtype], aligned


def _stride(scale: Tensor | None, one: int) -> int:
    """From one direction's scales to the next's; `one` is the rank of a scale that serves them all."""
    return 0 if scale is None or scale.dim() == one else scale.stride(0)


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
    partial = _partial(tables.chunks, stats, blocks.device)
    shape, dtype, aligned = _form_of_list(blocks, form)
    with _on(blocks.device):
        for group in tables.groups:
            axpy_kernel[(len(group.chunks),)](
                tables.blocks,
                group.chunks,
                group.layouts,
                scale,
                _stride(scale, 1),
                seeds,
                coefs,
                count,
                decay,
                None if group.dtypes == (tl.float32,) else rounding_seed,
                *shape,
                _from(group.first, partial),
                STATE=dtype,
                COUNT=_held(count),
                **_options(group, dist, aligned),
            )
        _finish(stats, partial, tables.blocks)


def _scratch(
    theta: Tensor,
    out: Tensor,
    mirror: Tensor | None,
    rows: Tensor | None,
    tensor_id: int,
    update: tuple,
    probe: tuple,
    dist: str,
    stats: BlockStats | None,
    offset: int = 0,
) -> None:
    """update: seeds or None, coefs, scale, decay, rounding seed; probe: seeds, coefs, scale, nearest_above, form."""
    seeds, coefs, scale, decay, rounding_seed = update
    probe_seeds, probe_coefs, probe_scale, nearest_above, form = probe
    state, value = (None, None) if form is None else (form.state, form.value)
    if theta.dtype == torch.float32:
        rounding_seed = nearest_above = None
    tensors = (theta, out, mirror, state)
    aligned = offset % 128 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors if tensor is not None)
    if not out.numel():
        width = repeats = pieces = 0
    elif rows is None:
        width, repeats = theta.numel(), 1
        pieces = -(-(offset + width) // SPAN) - offset // SPAN
    else:
        width, repeats = theta[0].numel(), rows.shape[0]
        aligned = aligned and width % 128 == 0
        # A row that begins inside a span reaches into one more.
        whole = SPAN % width == 0 or width % SPAN == 0
        pieces = -(-width // SPAN) + (not whole)
    count, probes = 0 if seeds is None else seeds.shape[0], probe_seeds.numel()
    partial = _partial(pieces, stats, theta.device)
    with _on(theta.device):
        if repeats * pieces:
            scratch_kernel[(repeats * pieces,)](
                theta,
                out,
                mirror,
                rows,
                width,
                offset,
                pieces,
                tensor_id,
                seeds,
                coefs,
                scale,
                _stride(scale, 0),
                count,
                decay,
                rounding_seed,
                probe_seeds,
                probe_coefs,
                probe_scale,
                _stride(probe_scale, 0),
                probes,
                nearest_above,
                state,
                value,
                partial,
                SPAN=SPAN,
                BLOCK=BLOCK if seeds is None else UPDATE_BLOCK,
                COUNT=_held(count),
                PROBES=_held(probes),
                SIGNS=dist == "rademacher",
                ALIGNED=aligned,
                **LAUNCH,
            )
        _finish(stats, partial, None)


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
    probe = (seeds, coefs, scale, nearest_above, form)
    _scratch(theta, out, mirror, rows, tensor_id, (None,) * 5, probe, dist, stats, offset)


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
    update = (seeds, coefs, scale, decay, rounding_seed)
    probe = (next_seed, next_coef, next_scale, nearest_above, None)
    _scratch(theta, out, mirror, None, tensor_id, update, probe, dist, stats)


def _read(blocks: Blocks, seeds: Tensor | None, out: Tensor | None, dist: str, stats: BlockStats | None) -> None:
    if not len(blocks):
        return
    tables = _tables(blocks)
    count = 0 if seeds is None else seeds.shape[0]
    partial = _partial(tables.chunks, stats, blocks.device)
    dots = torch.empty((count, tables.chunks), dtype=torch.float64, device=blocks.device) if count else None
    with _on(blocks.device):
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
            sum_kernel[(len(blocks), count)](dots, tables.chunks, tables.blocks, out, LANES=LANES, **LAUNCH)
        _finish(stats, partial, tables.blocks)


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
    with _on(device):
        for group in tables.groups:
            replay_kernel[(len(group.chunks),)](
                tables.blocks,
                group.chunks,
                group.layouts,
                scale,
                _stride(scale, 1),
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
    with _on(blocks.device):
        for group in tables.groups:
            options = _options(group, dist, aligned and shape_aligned)
            options["BLOCK"] = STATE_BLOCK if states else BLOCK
            state_kernel[(len(group.chunks),)](
                tables.blocks,
                group.chunks,
                group.layouts,
                addresses,
                len(blocks),
                numbers,
                keep,
                scale,
                _stride(scale, 1),
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
                COUNT=_held(count),
                **options,
            )


def dot_noise(blocks: Blocks, seeds: Tensor, out: Tensor, dist: str, stats: BlockStats | None) -> None:
    _read(blocks, seeds, out, dist, stats)


def block_stats(blocks: Blocks, stats: BlockStats) -> None:
    _read(blocks, None, None, "normal", stats)
