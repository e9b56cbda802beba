"""Probing along low-rank directions: a side product in the forward; theta is neither copied nor written.

A hook adds to what a module returned what c * direction of its weight, and all that is collected for it, would have
made of it (`side_products.py`).  Updates are collected (`pending.py`) and merged into theta rarely.  Tensors that are
not matrices are perturbed and updated as under `scratch` probing: they are small.  So are matrices that a module uses
in another way than a side product knows (OPT's positions): they are copied, theta + L R^T rounded stochastically.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.coverage import CoverageCheck
from zo_finetuner.optim.base import Direction, Probe, Update
from zo_finetuner.pending import Factors, Pending
from zo_finetuner.scratch import ScratchProbing
from zo_finetuner.side_products import SideProduct, side_product
from zo_finetuner.stack import Frame
from zo_finetuner.subspace import Held
from zo_finetuner.update import apply_terms
from zo_kernels import Blocks, add_product, ulp


class LowRankProbing(ScratchProbing):
    """copied: perturb copies of all matrices: the dense form of the same directions, for comparison (in 16 bits the
    copies are rounded, a side product is not)."""

    mode = "lowrank"

    def __init__(self, model: nn.Module, blocks: Blocks, copied: bool = False):
        self._others = [b for b, tensor in enumerate(blocks.tensors) if tensor.dim() != 2]
        self._places = torch.tensor(self._others, dtype=torch.int64, device=blocks.device)
        super().__init__(model, blocks)
        self._small = Blocks(
            [(blocks.names[b], blocks.tensors[b]) for b in self._others],
            ids={blocks.names[b]: blocks.ids[b] for b in self._others},
        )
        self.pending = Pending(model, blocks)
        self._factors: dict[int, Factors] = {}  # of the matrices' blocks, for the probe in progress
        self._sides = {} if copied else {m: side for m in self._modules if (side := self._side(m)) is not None}
        self._modules = [m for m in self._modules if self._blocks_of(m) - {self._beside(m)}]
        matrices = [tensor.dtype for tensor in blocks.tensors if tensor.dim() == 2]
        self._dtype = matrices[0] if matrices else torch.float32

    def _blocks_of(self, module: nn.Module) -> set[int]:
        return {self._parameters[id(p)] for p in module._parameters.values() if id(p) in self._parameters}

    def _side(self, module: nn.Module) -> tuple[int, SideProduct] | None:
        block, product = self._parameters.get(id(module._parameters.get("weight"))), side_product(module)
        return None if block is None or product is None or block in self._others else (block, product)

    def _beside(self, module: nn.Module) -> int | None:
        """The block whose weight this module uses with a side product."""
        return self._sides[module][0] if module in self._sides else None

    def measure(self) -> None:
        """Of the weights that go through a scratch, which is no pass over the matrices."""
        largest = [torch.linalg.vector_norm(self.blocks.tensors[b], float("inf")).float() for b in self._others]
        spacing = [ulp(x, self.blocks.tensors[b].dtype) for x, b in zip(largest, self._others, strict=True)]
        if spacing:
            self._nearest_above.index_copy_(0, self._places, torch.stack(spacing))

    def _coverage(self) -> CoverageCheck:
        names = {module: name for name, module in self.model.named_modules()}
        homes: dict[str, set[str]] = {}
        for module, (block, _) in self._sides.items():
            homes.setdefault(self.blocks.names[block], set()).add(names[module])
        return CoverageCheck(self.model, self.blocks, homes)

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Probe | None = None) -> Iterator[None]:
        direction = probe.direction
        self.pending.make_room(direction.subspace)
        factors = self.pending.factors(self._dtype, direction, probe.coef)
        self._factors = {f.matrix.block: f for f in factors}
        handles = []
        self.pending.reading = True
        try:
            for module, (block, product) in self._sides.items():
                _, left, right = self._factors[block]
                hook = functools.partial(_add_product, product, left, right)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            with super().at(probe, following):
                yield
        finally:
            self.pending.reading = False
            for handle in handles:
                handle.remove()

    def _perturb(self, frame: Frame, parameter: nn.Parameter, block: int, rows: Tensor | None) -> None:
        if block in self._others:
            super()._perturb(frame, parameter, block, rows)
        elif block != self._beside(frame.module):
            out = self._take(frame, parameter, None)
            self._copy(parameter.data, out, block)
            frame.swap(parameter, out if rows is None else out.index_select(0, rows))
        elif rows is not None:  # a head's candidates: who perturbs some of a module's parameters takes the rows of all
            frame.swap(parameter, parameter.data.index_select(0, rows))

    def _copy(self, theta: Tensor, out: Tensor, block: int) -> None:
        matrix, left, right = self._factors[block]
        seed = self._probe.direction.seed
        add_product(theta, left.float(), right.float(), matrix.tensor_id, seed, out=out)

    def apply(self, update: Update, decay: Tensor | None, rounding_seed: Tensor) -> None:
        for direction, coef in update.terms:
            self.pending.add(direction, coef)
        self.pending.rounding.copy_(rounding_seed)
        self._apply_small(update.terms, decay, rounding_seed)
        if decay is None:
            self.pending.settle()
        else:  # it shrinks every weight at every step
            self.pending.merge(decay)

    def _apply_small(
        self, terms: list[tuple[Direction | Held, Tensor]], decay: Tensor | None, rounding_seed: Tensor
    ) -> None:
        """Of the tensors that are not matrices."""
        if not self._others or not terms:
            return
        direction, coef = terms[0]
        if isinstance(direction, Held):
            parts = direction.dense.split(self._small.numels)
            for theta, dense, tensor_id in zip(self._small.tensors, parts, self._small.ids, strict=True):
                column = theta.view(-1, 1)
                add_product(column, dense.view(-1, 1), coef.view(1, 1), tensor_id, rounding_seed, decay=decay)
            return
        scales = {id(d.scale): d.scale for d, _ in terms if d.scale is not None}
        scales = {key: scale.index_select(0, self._places) for key, scale in scales.items()}
        small = [(Direction(d.seed, scales.get(id(d.scale)), d.dist), coef) for d, coef in terms]
        apply_terms(self._small, small, decay, rounding_seed)

    def flush(self) -> None:
        self.pending.merge()

    def restore(self) -> None:
        """The weights are whole when an exception leaves a step."""
        self.pending.merge()

    def realised_share(self, probe: Probe) -> Tensor:
        """As under `scratch`; 1 for matrices, whose side products are rounded like any activation."""
        shares = torch.ones(len(self.blocks), dtype=torch.float32, device=self.blocks.device)
        if self._others:
            shares.index_copy_(0, self._places, super().realised_share(probe, self._others))
        return shares


def _add_product(
    product: SideProduct, left: Tensor, right: Tensor, module: nn.Module, args: tuple, kwargs: dict, output: Any
) -> None:
    """A forward hook."""
    product(module, args[0] if args else kwargs["input"], output, left, right)
