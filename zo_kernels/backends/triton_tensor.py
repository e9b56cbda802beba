"""Ops of the Triton backend on one tensor, a launch each: `words`, `noise`, `scratch`, `update_scratch_`."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.blocks import BlockStats
from zo_kernels.forms import Form
from zo_kernels.noise import DIRECTION
from zo_kernels.triton_kernels import launch
from zo_kernels.triton_kernels.noise import noise_kernel, words_kernel
from zo_kernels.triton_kernels.scratch import scratch_kernel


def words(out: Tensor, seed: Tensor, tensor_id: int, stream: int, first_group: int) -> None:
    groups = out.shape[0]
    if groups:
        tiles = (first_group + groups - 1) // launch.BLOCK - first_group // launch.BLOCK + 1
        with launch.on(out.device):
            words_kernel[(tiles,)](
                out, groups, seed, tensor_id, stream, first_group, GROUPS=launch.BLOCK, **launch.OPTIONS
            )


def noise(out: Tensor, seed: Tensor, tensor_id: int, start: int, dist: str, stream: int = DIRECTION) -> None:
    numel = out.numel()
    if numel:
        tiles = (start + numel - 1) // launch.BLOCK - start // launch.BLOCK + 1
        with launch.on(out.device):
            noise_kernel[(tiles,)](
                out,
                numel,
                seed,
                tensor_id,
                start,
                stream,
                BLOCK=launch.BLOCK,
                SIGNS=dist == "rademacher",
                **launch.OPTIONS,
            )


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
        pieces = -(-(offset + width) // launch.SPAN) - offset // launch.SPAN
    else:
        width, repeats = theta[0].numel(), rows.shape[0]
        aligned = aligned and width % 128 == 0
        # A row that begins inside a span reaches into one more.
        whole = launch.SPAN % width == 0 or width % launch.SPAN == 0
        pieces = -(-width // launch.SPAN) + (not whole)
    count, probes = 0 if seeds is None else seeds.shape[0], probe_seeds.numel()
    partial = launch.partial_sums(pieces, stats, theta.device)
    with launch.on(theta.device):
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
                launch.stride(scale, 0),
                count,
                decay,
                rounding_seed,
                probe_seeds,
                probe_coefs,
                probe_scale,
                launch.stride(probe_scale, 0),
                probes,
                nearest_above,
                state,
                value,
                partial,
                SPAN=launch.SPAN,
                BLOCK=launch.BLOCK if seeds is None else launch.UPDATE_BLOCK,
                COUNT=launch.held(count),
                PROBES=launch.held(probes),
                SIGNS=dist == "rademacher",
                ALIGNED=aligned,
                **launch.OPTIONS,
            )
        launch.finish(stats, partial, None)


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
