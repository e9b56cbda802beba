"""Probing through a scratch: modules compute with perturbed copies, theta is only read.

A forward pre-hook writes theta + c * scale_b * z_b of a module's own weights into a stack of buffers and swaps the
parameters' storages; an always-called forward hook swaps them back and frees the slice.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zo_finetuner.coverage import CoverageCheck
from zo_finetuner.lookup import rows_in_use
from zo_finetuner.optim.base import Probe, Update
from zo_finetuner.update import apply_terms
from zo_kernels import Blocks, draw_noise, scratch, seed_tensor, ulp

SHARE_SAMPLE = 1 << 20  # elements of a block that `realised_share` looks at


class ScratchProbing:
    """theta is only read.  Holds the hooks, the scratch stacks and, per block, the rounding threshold:
    16-bit scratch is rounded to nearest where |c * scale_b| is at least one ulp of the block's largest weight and
    stochastically below (a Gaussian step of one ulp survives rounding to nearest to 1e-8; of 1/8 ulp it is lost)."""

    mode = "scratch"

    def __init__(self, model: nn.Module, blocks: Blocks):
        self.model, self.blocks = model, blocks
        self.measure()
        self._parameters = {id(p): blocks.index[n] for n, p in model.named_parameters() if n in blocks.index}
        self._modules = [m for m in model.modules() if any(id(p) in self._parameters for p in m._parameters.values())]
        self._stacks: dict[torch.device, _ScratchStack] = {}
        self._frames: list[_Frame] = []
        self._checked = False

    def measure(self) -> None:
        """Set the rounding thresholds from the weights as they are now (one read of them)."""
        largest = [torch.linalg.vector_norm(t, float("inf")).float() for t in self.blocks.tensors]
        spacing = [ulp(x, t.dtype) for x, t in zip(largest, self.blocks.tensors, strict=True)]
        self._nearest_above = torch.stack(spacing)

    @contextlib.contextmanager
    def at(self, probe: Probe) -> Iterator[None]:
        seed = seed_tensor(probe.direction.seed, self.blocks.device)
        check = contextlib.nullcontext() if self._checked else CoverageCheck(self.model, self.blocks)
        own_reads = contextlib.nullcontext if self._checked else check.paused

        def swap_in(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            with own_reads():
                return self._swap_in(module, args, kwargs, probe, seed)

        def swap_out(module: nn.Module, args: tuple, output: object) -> None:
            self._swap_out(module)

        handles = []
        try:
            for module in self._modules:
                handles.append(module.register_forward_pre_hook(swap_in, with_kwargs=True))
                handles.append(module.register_forward_hook(swap_out, always_call=True))
            with check:
                yield
            self._checked = True
        finally:
            while self._frames:  # left only by an exception between a swap and its hook
                self._frames.pop().undo()
            for handle in handles:
                handle.remove()

    def _swap_in(self, module: nn.Module, args: tuple, kwargs: dict, probe: Probe, seed: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients are enabled while the weights are swapped for a probe: evaluate the loss under no_grad, "
                "and do not call backward() in the closure"
            )
        frame = _Frame(module)
        self._frames.append(frame)
        rows, replaced = rows_in_use(module, args, kwargs)
        for parameter in module._parameters.values():
            block = self._parameters.get(id(parameter))
            if block is None or any(f.holds(parameter) for f in self._frames):
                continue
            theta = parameter.data
            count = theta.shape[0] if rows is None else rows.shape[0]
            stack = self._stacks.setdefault(theta.device, _ScratchStack(theta.device))
            out = frame.take(stack, (count, *theta.shape[1:]), theta.dtype)
            self._write(theta, out, block, probe, seed, rows)
            frame.swap(parameter, out)
        return replaced

    def _write(
        self, theta: Tensor, out: Tensor, block: int, probe: Probe, seed: Tensor, rows: Tensor | None = None
    ) -> None:
        """out = the perturbed theta (or rows of it) of a block; theta may be its leading elements."""
        scale = probe.direction.scale
        scratch(
            theta,
            out,
            self.blocks.ids[block],
            seed,
            probe.coef,
            None if scale is None else scale[block],
            nearest_above=self._nearest_above[block],
            rows=rows,
            dist=probe.direction.dist,
        )

    def _swap_out(self, module: nn.Module) -> None:
        if self._frames and self._frames[-1].module is module:
            self._frames.pop().undo()

    def restore(self) -> None:
        """Nothing to undo: theta was never written."""

    def apply(self, update: Update, decay: Tensor | None, rounding_seed: Tensor) -> None:
        apply_terms(self.blocks, update.terms, decay, rounding_seed)

    @torch.no_grad()
    def realised_share(self, probe: Probe) -> Tensor:
        """Per block <d, z> / <z, z> of the rounded perturbation d actually made, over at most 2^20 elements of it:
        (blocks,) fp32.  1 is exact; a small block under stochastic rounding scatters around 1."""
        seed = seed_tensor(probe.direction.seed, self.blocks.device)
        shares = []
        for b, tensor in enumerate(self.blocks.tensors):
            theta = tensor.reshape(-1)[:SHARE_SAMPLE]
            out = torch.empty_like(theta)
            self._write(theta, out, b, probe, seed)
            z = draw_noise(theta.numel(), seed, self.blocks.ids[b], dist=probe.direction.dist).double()
            scale = probe.direction.scale
            step = probe.coef.double() * (1.0 if scale is None else scale[b].double())
            shares.append(((out.double() - theta.double()) * z).sum() / (step * (z * z).sum()))
        return torch.stack(shares).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {"nearest_above": self._nearest_above}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._nearest_above = state["nearest_above"].to(self._nearest_above)


class _Frame:
    """What one module call has swapped and taken from the stack."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._swapped: list[tuple[nn.Parameter, Tensor]] = []
        self._stack: _ScratchStack | None = None
        self._mark = None

    def holds(self, parameter: nn.Parameter) -> bool:
        return any(p is parameter for p, _ in self._swapped)

    def take(self, stack: _ScratchStack, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._stack is None:
            self._stack, self._mark = stack, stack.mark()
        return stack.take(shape, dtype)

    def swap(self, parameter: nn.Parameter, out: Tensor) -> None:
        self._swapped.append((parameter, parameter.data))
        parameter.data = out

    def undo(self) -> None:
        for parameter, own in reversed(self._swapped):
            parameter.data = own
        if self._stack is not None:
            self._stack.release(self._mark)


class _ScratchStack:
    """Byte buffers on one device used as a stack: a module that calls children keeps its slice below theirs.
    It grows on the first forward and then stays; its size is that of the deepest nesting of swapped modules."""

    ALIGN = 256

    def __init__(self, device: torch.device):
        self.device = device
        self._buffers: list[Tensor] = []
        self._top = (0, 0)  # buffer number, offset in it

    def mark(self) -> tuple[int, int]:
        return self._top

    def release(self, mark: tuple[int, int]) -> None:
        self._top = mark

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        number, offset = self._top
        if number < len(self._buffers) and offset + size > self._buffers[number].numel() and offset:
            number, offset = number + 1, 0
        if number == len(self._buffers):
            self._buffers.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        elif offset + size > self._buffers[number].numel():  # free from its start on: replace it by a larger one
            self._buffers[number] = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._top = (number, -(-(offset + size) // self.ALIGN) * self.ALIGN)
        return self._buffers[number][offset : offset + size].view(dtype).view(shape)
