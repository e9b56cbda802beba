"""Probing through a scratch: modules compute with perturbed copies, theta is only read.

A forward pre-hook writes theta + c * scale_b * z_b of a module's own weights into a stack of buffers and swaps the
parameters' storages; an always-called forward hook swaps them back and frees the slice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.coverage import CoverageCheck
from zo_finetuner.lookup import rows_in_use
from zo_finetuner.optim.base import Probe, Update
from zo_finetuner.optim.directions import Anchored
from zo_finetuner.stack import Frame, ScratchStack
from zo_finetuner.update import apply_update
from zo_kernels import Blocks, scratch, ulp

SHARE_SAMPLE = 1 << 20  # elements of a block that `realised_share` looks at


class ScratchProbing:
    """theta is only read.  Holds the hooks, the scratch stacks and, per block, the rounding threshold:
    16-bit scratch is rounded to nearest where |c * scale_b| is at least one ulp of the block's largest weight and
    stochastically below (a Gaussian step of one ulp survives rounding to nearest to 1e-8; of 1/8 ulp it is lost)."""

    mode = "scratch"

    def __init__(self, model: nn.Module, blocks: Blocks):
        self.model, self.blocks = model, blocks
        self._nearest_above = torch.empty(len(blocks), dtype=torch.float32, device=blocks.device)
        self.measure()
        self._parameters = {id(p): blocks.index[n] for n, p in model.named_parameters() if n in blocks.index}
        self._modules = [m for m in model.modules() if any(id(p) in self._parameters for p in m._parameters.values())]
        self._stacks: dict[torch.device, ScratchStack] = {}
        self._frames: list[Frame] = []
        self._checked = False

    @property
    def settled(self) -> bool:
        """Whether the next step will do nothing that is done once: it could be captured into a CUDA graph."""
        return self._checked

    @property
    def grown(self) -> int:
        """How often the scratch has grown, that is, moved."""
        return sum(stack.grown for stack in self._stacks.values())

    def measure(self) -> None:
        """Set the rounding thresholds from the weights as they are now (one read of them)."""
        spacing = [ulp(x, t.dtype) for x, t in zip(self._largest(), self.blocks.tensors, strict=True)]
        self._nearest_above.copy_(torch.stack(spacing))

    def _largest(self) -> Tensor:
        """(blocks,) fp32: of every block the largest weight, its absolute value."""
        zero = torch.zeros((), dtype=torch.float32, device=self.blocks.device)
        norms = (torch.linalg.vector_norm(t, float("inf")).float() if t.numel() else zero for t in self.blocks.tensors)
        return torch.stack([norm.to(zero.device) for norm in norms])

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Sequence[Probe] = ()) -> Iterator[None]:
        """Within it the model computes with the weights of `probe`.  following: the other probes yet to come that are
        known by now."""
        if probe.direction is None:
            yield
            return
        self._probe = probe
        check = contextlib.nullcontext() if self._checked else self._coverage()
        self._own_reads = contextlib.nullcontext if self._checked else check.paused
        handles = []
        try:
            for module in self._modules:
                handles.append(module.register_forward_pre_hook(self._swap_in, with_kwargs=True))
                handles.append(module.register_forward_hook(self._swap_out, always_call=True))
            with check:
                yield
            self._checked = True
        finally:
            while self._frames:  # left only by an exception between a swap and its hook
                self._frames.pop().undo()
            for handle in handles:
                handle.remove()

    def pass_by(self, probe: Probe) -> None:
        """What a probe does to the weights, without an evaluation: nothing."""

    def _coverage(self) -> CoverageCheck:
        return CoverageCheck(self.model, self.blocks)

    def _swap_in(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients are enabled while the weights are swapped for a probe: evaluate the loss under no_grad, "
                "and do not call backward() in the closure"
            )
        with self._own_reads():
            frame = Frame(module)
            self._frames.append(frame)
            rows, replaced = rows_in_use(module, args, kwargs)
            for parameter in module._parameters.values():
                block = self._parameters.get(id(parameter))
                if block is not None and not any(f.holds(parameter) for f in self._frames):
                    self._perturb(frame, parameter, block, rows)
            return replaced

    def _perturb(self, frame: Frame, parameter: nn.Parameter, block: int, rows: Tensor | None) -> None:
        out = self._take(frame, parameter, rows)
        self._write(parameter.data, out, block, rows)
        frame.swap(parameter, out)

    def _take(self, frame: Frame, parameter: nn.Parameter, rows: Tensor | None) -> Tensor:
        """Room on the stack for a parameter, or for some rows of it."""
        count = parameter.shape[:1] if rows is None else rows.shape
        stack = self._stacks.setdefault(parameter.device, ScratchStack(parameter.device))
        return frame.take(stack, (*count, *parameter.shape[1:]), parameter.dtype)

    def _write(
        self, theta: Tensor, out: Tensor, block: int, rows: Tensor | None = None, mirror: Tensor | None = None
    ) -> None:
        """out = the perturbed theta (or rows of it) of a block, mirror its other sign; theta may be its leading
        elements."""
        probe = self._probe
        if isinstance(probe.direction, Anchored):
            probe.direction.move(theta, out, block, probe.coef, rows)
            if mirror is not None:
                probe.direction.move(theta, mirror, block, -probe.coef, rows)
            return
        move = probe.stacked.on(theta.device)
        scratch(
            theta,
            out,
            self.blocks.ids[block],
            move.seeds,
            move.coefs,
            move.scale_of(block),
            mirror=mirror,
            nearest_above=self._nearest_above[block].to(theta.device),
            rows=rows,
            dist=move.dist,
            form=move.form_of(block, theta),
            offset=self.blocks.offsets[block],
        )

    def _swap_out(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._frames and self._frames[-1].module is module:
            with self._own_reads():  # under inference mode a swap of storages is an operator
                self._frames.pop().undo()

    def rehearse(self, probes: list[Probe], losses: list[Tensor], loss_fn: Callable[[], Any]) -> None:
        """Nothing to rehearse: `CoverageCheck` has watched the first probe."""

    def restore(self) -> None:
        """Nothing to undo: theta was never written."""

    def begin(self) -> None:
        """Nothing to do on the host before a step."""

    def flush(self) -> None:
        """Nothing to write: updates are in the weights."""

    def apply(self, update: Update, finite: Tensor, decay: Tensor | None, rounding_seed: Tensor) -> None:
        apply_update(self.blocks, update, finite, decay, rounding_seed)

    @torch.no_grad()
    def realised_share(self, probe: Probe, blocks: list[int] | None = None) -> Tensor:
        """Per block <d, p> / <p, p>, d the rounded perturbation that is made and p the one that is meant, over at most
        2^20 elements of it: (blocks,) fp32, of all or of those numbered.  1 is exact; a small block under stochastic
        rounding scatters around 1; NaN where nothing is meant (a mask, a scale of 0)."""
        self._probe = probe
        shares = []
        for b in range(len(self.blocks)) if blocks is None else blocks:
            theta = self.blocks.tensors[b].reshape(-1)[:SHARE_SAMPLE]
            out = torch.empty_like(theta)
            self._write(theta, out, b)
            move, place = probe.stacked.on(theta.device), (self.blocks.ids[b], b, self.blocks.offsets[b])
            meant = move.displacement(theta, *place).double()
            share = ((out.double() - theta.double()) * meant).sum() / (meant * meant).sum()
            shares.append(share.to(self.blocks.device))
        return torch.stack(shares).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {"nearest_above": self._nearest_above}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._nearest_above.copy_(state["nearest_above"])

