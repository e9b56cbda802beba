"""What ops refuse, before any weight is touched: each message names the argument or the tensor, and what it must be."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.blocks import DTYPES, Blocks, require_apart
from zo_kernels.forms import KINDS, Form
from zo_kernels.noise import DISTRIBUTIONS

_FLOAT32 = (torch.float32,)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require(
    tensor: Tensor, name: str, dtypes: torch.dtype | tuple[torch.dtype, ...], shape: tuple, device: torch.device
) -> None:
    """A contiguous tensor of one of these dtypes, of this shape, on this device."""
    if isinstance(dtypes, torch.dtype):
        dtypes = (dtypes,)
    if tensor.dtype not in dtypes or tensor.shape != shape or tensor.device != device:
        raise ValueError(
            f"{name} must be {' or '.join(map(short, dtypes))} of shape {tuple(shape)} on {device}, got "
            f"{short(tensor.dtype)} {tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def require_dist(dist: str) -> None:
    if dist not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {dist!r}; there are: {', '.join(DISTRIBUTIONS)}")


def require_optional(values: dict[str, Tensor | None], dtype: torch.dtype, device: torch.device) -> None:
    for name, value in values.items():
        if value is not None:
            require(value, name, dtype, (), device)


def require_directions(
    seeds: Tensor, coefs: Tensor | None, scale: Tensor | None, one: tuple[int, ...], device: torch.device, dist: str
) -> None:
    """K seeds, K coefs, and a scale of shape `one` (for all directions) or (K, *one)."""
    require_dist(dist)
    count = seeds.shape[0] if seeds.dim() == 1 else -1
    require(seeds, "seeds", torch.int64, (max(count, 1),), device)
    if coefs is not None:
        require(coefs, "coefs", torch.float32, (count,), device)
    if scale is not None:
        require(scale, "scale", torch.float32, one if scale.dim() == len(one) else (count, *one), device)


def require_form(form: Form | None, theta: Tensor | Blocks) -> None:
    """The state of a form is shaped like theta (a list of such tensors for blocks), its value like the form says."""
    if form is None:
        return
    if form.kind not in KINDS:
        raise ValueError(f"unknown form {form.kind!r}; there are: {', '.join(KINDS)}")
    kind, several = KINDS[form.kind], isinstance(theta, Blocks)
    if kind.state:
        dtypes = (torch.float32, torch.bfloat16) if form.kind == "shifted" else _FLOAT32
        if not several:
            require(form.state, kind.state, dtypes, theta.shape, theta.device)
        else:
            require_states(theta, kind.state, form.state, dtypes)
    if kind.value:
        shape = (len(theta),) if several and kind.per_block else ()
        require(form.value, kind.value, torch.float32, shape, theta.device)


def require_states(blocks: Blocks, name: str, states: list[Tensor], dtypes: tuple[torch.dtype, ...] = _FLOAT32) -> None:
    """A state tensor for every block, all of one dtype, contiguous, shaped like the block."""
    if isinstance(states, Tensor) or len(states) != len(blocks):
        got = "one tensor" if isinstance(states, Tensor) else f"{len(states)}"
        raise ValueError(f"{name} must be a list of {len(blocks)} tensors, one per block, got {got}")
    for block, tensor, state in zip(blocks.names, blocks.tensors, states, strict=True):
        if state.dtype not in dtypes or state.shape != tensor.shape or not state.is_contiguous():
            require(state, f"{name} of {block}", dtypes, tensor.shape, tensor.device)
        if state.device != tensor.device or state.dtype != states[0].dtype:
            require(state, f"{name} of {block}", states[0].dtype, tensor.shape, tensor.device)


def require_states_apart(blocks: Blocks, states: dict[str, list[Tensor]]) -> None:
    """State tensors, which are written, share no memory with each other or with contiguous blocks.  Asked again when
    an address has changed."""
    addresses = tuple(state.data_ptr() for tensors in states.values() for state in tensors)
    of_blocks, known = blocks.states_apart
    if (of_blocks is blocks.addresses and addresses == known) or blocks.device.type == "meta":
        return
    named = {name: t for name, t in zip(blocks.names, blocks.tensors, strict=True) if t.is_contiguous()}
    for name, tensors in states.items():
        named |= {f"{name} of {block}": state for block, state in zip(blocks.names, tensors, strict=True)}
    require_tensors_apart(named)
    blocks.states_apart = blocks.addresses, addresses


def require_tensors_apart(tensors: dict[str, Tensor | None]) -> None:
    """Every one of these contiguous tensors has its storage, and no two overlap."""
    spans = []
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and not tensor.is_meta:
            start = tensor.data_ptr()
            if start == 0:
                raise ValueError(f"{name} has lost its storage (freed or resized): gather or reload it first")
            spans.append((start, start + tensor.nbytes, name))
    require_apart(spans)


def require_scratch(theta: Tensor, out: Tensor, mirror: Tensor | None, rows: Tensor | None) -> None:
    if theta.dtype not in DTYPES or not theta.is_contiguous():
        raise ValueError(f"theta must be a contiguous float32, bfloat16 or float16 tensor, got {theta.dtype}")
    shape = theta.shape if rows is None else (rows.shape[0], *theta.shape[1:])
    require(out, "out", theta.dtype, shape, theta.device)
    if mirror is not None:
        require(mirror, "mirror", theta.dtype, shape, theta.device)
    require_tensors_apart({"theta": theta, "out": out, "mirror": mirror})
