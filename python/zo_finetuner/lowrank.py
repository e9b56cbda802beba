"""Probing along low-rank directions: a side product in the forward; theta is neither copied nor written.

    matrices                a hook adds to what a module returned what c * direction of its weight, and all that is
                            collected for it, would have made of it (`side_products.py`)
    vectors                 copies of all norms and biases, perturbed in one pass and swapped in for the probe
    what is left            perturbed as under `scratch` probing: stacked experts, and matrices that a module uses in a
                            way without a side product (OPT's positions), as theta + L^T R

16-bit copies are rounded stochastically.  Updates of matrices are collected (`pending.py`) and merged into theta
rarely, others are made at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.coverage import CoverageCheck
from zo_finetuner.optim.base import Probe, Update
from zo_finetuner.optim.directions import Direction, Terms
from zo_finetuner.pending import Factors, Pending
from zo_finetuner.scratch import ScratchProbing
from zo_finetuner.side_products import SideProduct, side_product
from zo_finetuner.stack import Frame
from zo_finetuner.subspace import Held
from zo_finetuner.update import apply_terms
from zo_kernels import Blocks, add_product


class LowRankProbing(ScratchProbing):
    """copied: perturb copies of all matrices: the dense form of the same directions, for comparison (in 16 bits the
    copies are rounded, a side product is not)."""

    mode = "lowrank"

    def __init__(self, model: nn.Module, blocks: Blocks, copied: bool = False):
        super().__init__(model, blocks)
        by_name = dict(model.named_parameters())
        parameters = [by_name[name] for name in blocks.names]
        self.pending = Pending(model, parameters)
        self._dense = Part(blocks, [b for b, tensor in enumerate(blocks.tensors) if tensor.dim() != 2])
        self._vectors = Part(blocks, [b for b, tensor in enumerate(blocks.tensors) if tensor.dim() < 2])
        self._copies = self._vectors.copies()
        self._swapped = [parameters[b] for b in self._vectors.numbers]
        self._sides = {} if copied else {m: side for m in self._modules if (side := self._side(m)) is not None}
        self._modules = [m for m in self._modules if self._left_over(m)]
        matrices = [tensor.dtype for tensor in blocks.tensors if tensor.dim() == 2]
        self._dtype = matrices[0] if matrices else torch.float32
        self._factors: dict[int, Factors] = {}  # of the matrices' blocks, for the probe in progress

    def _side(self, module: nn.Module) -> tuple[int, SideProduct] | None:
        block, product = self._parameters.get(id(module._parameters.get("weight"))), side_product(module)
        matrix = block is not None and self.blocks.tensors[block].dim() == 2
        return (block, product) if matrix and product is not None else None

    def _left_over(self, module: nn.Module) -> set[int]:
        """Blocks of a module that are no vectors and have no side product."""
        owned = {self._parameters[id(p)] for p in module._parameters.values() if id(p) in self._parameters}
        return owned - set(self._vectors.numbers) - {self._sides.get(module, (None,))[0]}

    def measure(self) -> None:
        """All that goes through a scratch is rounded stochastically; no pass over the weights."""
        self._nearest_above.fill_(torch.inf)

    def _coverage(self) -> CoverageCheck:
        names = {module: name for name, module in self.model.named_modules()}
        homes: dict[str, set[str]] = {}
        for module, (block, _) in self._sides.items():
            homes.setdefault(self.blocks.names[block], set()).add(names[module])
        return CoverageCheck(self.model, self.blocks, homes)

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Probe | None = None) -> Iterator[None]:
        terms = self.pass_by(probe)
        factors = self.pending.factors(self._dtype, terms)
        self._factors = {f.matrix.block: f for f in factors}
        handles = []
        self.pending.reading = True
        try:
            self._swap_vectors(terms)
            for module, (block, product) in self._sides.items() if factors else ():
                _, left, right = self._factors[block]
                hook = functools.partial(_add_product, product, left, right)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            with super().at(probe, following):
                yield
        finally:
            self.pending.reading = False
            for parameter, own in zip(self._swapped, self._vectors.blocks.tensors, strict=True):
                parameter.data = own
            for handle in handles:
                handle.remove()

    def pass_by(self, probe: Probe, following: Probe | None = None) -> Terms:
        """What a probe does to the weights: it may need a merge.  Returns its terms."""
        terms = [] if probe.direction is None else probe.terms
        if not terms and self._modules:  # what is collected for their weights is seen in copies only
            self.pending.merge()
        self.pending.make_room(terms)
        return terms

    @property
    def merges(self) -> int:
        """How often what was collected has been merged into the weights."""
        return self.pending.merges

    def _swap_vectors(self, terms: Terms) -> None:
        if not self._swapped or not terms:
            return
        torch._foreach_copy_(self._copies.tensors, self._vectors.blocks.tensors)
        apply_terms(self._copies, self._vectors.terms(terms), None, terms[0][0].seed)
        for parameter, copy in zip(self._swapped, self._copies.tensors, strict=True):
            parameter.data = copy

    def _perturb(self, frame: Frame, parameter: nn.Parameter, block: int, rows: Tensor | None) -> None:
        if block not in self._left_over(frame.module):
            if rows is not None:  # of a head: who takes rows of its weight takes those of its bias
                frame.swap(parameter, parameter.data.index_select(0, rows))
            return
        if block not in self._factors:
            return super()._perturb(frame, parameter, block, rows)
        matrix, left, right = self._factors[block]
        out = self._take(frame, parameter, None)
        seed = self._probe.terms[0][0].seed
        add_product(parameter.data, left.float(), right.float(), matrix.tensor_id, seed, out=out)
        frame.swap(parameter, out if rows is None else out.index_select(0, rows))

    def apply(self, update: Update, finite: Tensor, decay: Tensor | None, rounding_seed: Tensor) -> None:
        for direction, coef in update.terms:
            self.pending.add(direction, coef)
        self.pending.rounding.copy_(rounding_seed)
        self._apply_dense(update.terms, decay, rounding_seed)
        if decay is None:
            self.pending.settle()
        else:  # it shrinks every weight at every step
            self.pending.merge(decay)

    def _apply_dense(self, terms: Terms, decay: Tensor | None, rounding_seed: Tensor) -> None:
        blocks = self._dense.blocks
        if not len(blocks) or not terms:
            return
        held, coef = terms[0]
        if not isinstance(held, Held):
            return apply_terms(blocks, self._dense.terms(terms), decay, rounding_seed)
        for theta, dense, tensor_id in zip(blocks.tensors, held.dense.split(blocks.numels), blocks.ids, strict=True):
            row = theta.view(1, -1)
            add_product(row, coef.view(1, 1), dense.view(1, -1), tensor_id, rounding_seed, decay=decay)

    def flush(self) -> None:
        self.pending.merge()

    def restore(self) -> None:
        """The weights are whole when an exception leaves a step."""
        self.pending.merge()

    def realised_share(self, probe: Probe) -> Tensor:
        """As under `scratch`; 1 for matrices, whose side products are rounded like any activation."""
        shares = torch.ones(len(self.blocks), dtype=torch.float32, device=self.blocks.device)
        if self._dense.numbers:
            shares.index_copy_(0, self._dense.places, super().realised_share(probe, self._dense.numbers))
        return shares


class Part:
    """Some of the blocks, by their numbers, and directions with the scales of those."""

    def __init__(self, blocks: Blocks, numbers: list[int]):
        self.numbers = numbers
        self.places = torch.tensor(numbers, dtype=torch.int64, device=blocks.device)
        self.ids = {blocks.names[b]: blocks.ids[b] for b in numbers}
        self.blocks = Blocks([(blocks.names[b], blocks.tensors[b]) for b in numbers], ids=self.ids)
        self._of: dict[Tensor, Tensor] = {}  # a scale of all blocks -> of these, the last one

    def copies(self) -> Blocks:
        return Blocks([(n, t.clone()) for n, t in zip(self.blocks.names, self.blocks.tensors, strict=True)], self.ids)

    def terms(self, terms: Terms) -> Terms:
        return [(Direction(d.seed, self._scale(d.scale), d.dist), coef) for d, coef in terms]

    def _scale(self, scale: Tensor | None) -> Tensor | None:
        if scale is None:
            return None
        if scale not in self._of:
            self._of = {scale: scale.index_select(0, self.places)}
        return self._of[scale]


def _add_product(
    product: SideProduct, left: Tensor, right: Tensor, module: nn.Module, args: tuple, kwargs: dict, output: Any
) -> None:
    """A forward hook."""
    product(module, args[0] if args else kwargs["input"], output, left, right)
