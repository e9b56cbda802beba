"""Probing along low-rank directions: a side product in the forward; theta is neither copied nor written.

    matrices                a hook adds to what a module returned what c * direction of its weight, and all that is
                            collected for it, would have made of it (`side_products.py`)
    vectors                 copies of all norms and biases, perturbed in one pass and swapped in for the probe
    what is left            perturbed as under `scratch` probing: stacked experts, and matrices that a module uses in a
                            way without a side product (OPT's positions), as theta + L^T R

All probes of a step (both signs, or a population) share a forward (`together.py`), x W^T with it, while they have few
tokens: then the members' rows go through modules with side products together, each beside its own, and one after the
other through those with copies.  16-bit copies are rounded stochastically.  Updates of matrices are collected
(`pending.py`) and merged into theta rarely, others are made at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.coverage import CoverageCheck
from zo_finetuner.members import NotMembers
from zo_finetuner.optim.base import Probe, Update
from zo_finetuner.optim.directions import Terms
from zo_finetuner.part import Part
from zo_finetuner.pending import Factors, Pending
from zo_finetuner.routes import Forward
from zo_finetuner.side_products import SideProduct, side_product
from zo_finetuner.stack import Frame
from zo_finetuner.together import TogetherProbing
from zo_finetuner.update import apply_terms
from zo_kernels import Blocks, add_product

TOKENS = 2048  # of a shared forward, of all members: with more, matrix products keep any device busy alone


class LowRankProbing(TogetherProbing):
    """tokens: of a forward that probes share; 0: each takes its own.
    copied: perturb copies of all matrices: the dense form of the same directions, for comparison (in 16 bits the
    copies are rounded, a side product is not)."""

    mode = "lowrank"

    def __init__(self, model: nn.Module, blocks: Blocks, copied: bool = False, tokens: int = TOKENS):
        super().__init__(model, blocks)
        by_name = dict(model.named_parameters())
        parameters = [by_name[name] for name in blocks.names]
        self.tokens = tokens
        self.pending = Pending(model, parameters)
        self._dense = Part(blocks, [b for b, tensor in enumerate(blocks.tensors) if tensor.dim() != 2])
        self._vectors = Part(blocks, [b for b, tensor in enumerate(blocks.tensors) if tensor.dim() < 2])
        self._swapped = [parameters[b] for b in self._vectors.numbers]
        self._place = {block: place for place, block in enumerate(self._vectors.numbers)}
        self._copies: list[Blocks] = []  # of the vectors, for each member
        self._sides = {} if copied else {m: side for m in self._modules if (side := self._side(m)) is not None}
        self._left = {m: self._left_over(m) for m in self._modules}
        self._of_vectors = [m for m in self._modules if m not in self._sides and not self._left[m]]
        self._modules = [m for m in self._modules if self._left[m]]
        biases = {id(m._parameters.get("bias")) for m in self._sides}
        self._own = [place for place, parameter in enumerate(self._swapped) if id(parameter) not in biases]
        matrices = [tensor.dtype for tensor in blocks.tensors if tensor.dim() == 2]
        self._dtype = matrices[0] if matrices else torch.float32
        self._factors: dict[int, Factors] = {}  # of the matrices' blocks, for the first member or for all
        self._prepared = 0  # members that have them
        self._member = 0  # whose weights a module that takes members one by one computes with

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

    def group_of(self, probes: Sequence[Probe]) -> list[Probe]:
        group = [*takewhile(lambda probe: probe.direction is not None, probes)] if self.tokens else []
        group = [*takewhile(lambda probe: len(probe.terms) == len(group[0].terms), group)]  # factors of one shape
        return group if len(group) > 1 else []

    def most(self, rows: int, length: int) -> int:
        return min(len(self._group), self.tokens // max(1, rows * length))

    @property
    def _routed(self) -> list[nn.Module]:
        return [*self._modules, *self._of_vectors]

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Sequence[Probe] = ()) -> Iterator[None]:
        self.pending.reading = True
        moved = contextlib.nullcontext() if self._answers(probe) else self._moved(probe)
        try:
            with moved, super().at(probe, following):
                yield
        finally:
            self.pending.reading = False

    def alone(self) -> contextlib.AbstractContextManager:
        return self._moved(self._probe)

    @contextlib.contextmanager
    def _moved(self, probe: Probe) -> Iterator[None]:
        """Within it modules have side products and vectors of a probe."""
        terms = self.pass_by(probe)
        self._prepare([terms])
        handles = []
        try:
            if terms and self._swapped:
                self._swap(self._swapped, self._copies[0].tensors)
            for module, side in self._sides.items() if self._factors else ():
                hook = functools.partial(self._beside, *side)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            self._swap(self._swapped, self._vectors.blocks.tensors)
            for handle in handles:
                handle.remove()

    def pass_by(self, probe: Probe) -> Terms:
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

    def _prepare(self, members: list[Terms]) -> None:
        """Make the factors of members, and their copies of the vectors."""
        factors = self.pending.factors(self._dtype, members)
        self._factors, self._prepared = {f.matrix.block: f for f in factors}, len(members)
        poisoned = [member for member in self.poisoned or () if member < len(members)]
        for member in poisoned:
            for own in factors:
                own.left[member].fill_(torch.nan)
        if not self._swapped or not members[0]:
            return
        while len(self._copies) < len(members):
            self._copies.append(self._vectors.copies())
        for terms, copies in zip(members, self._copies, strict=False):
            torch._foreach_copy_(copies.tensors, self._vectors.blocks.tensors)
            apply_terms(copies, self._vectors.terms(terms), None, terms[0][0].seed)
        for member in poisoned:  # a bias beside a side product is poisoned with it
            for place in self._own:
                self._copies[member].tensors[place].fill_(torch.nan)

    @staticmethod
    def _swap(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.data = tensor

    def _run(self, forward: Forward, members: Any) -> list[Any]:
        if self._prepared != members.count:
            with self._own_reads():
                self._prepare([probe.terms for probe in self._group])
        return super()._run(forward, members)

    def _beside(
        self, block: int, product: SideProduct, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Tensor | None:
        """A forward hook: the side product of a module's weight, and of other members what their bias is more."""
        x = args[0] if args else kwargs["input"]
        try:
            one = self.members is not None and self.members.is_one_row(x)
        except NotMembers as reason:
            raise NotMembers(f"{self.describe(module)} {reason}") from None
        if one:
            output = torch.cat([output] * self.members.count)
            x = x.expand(self.members.count, *x.shape[1:])
        product(module, x, output, *self._sides_of(block))
        self._add_biases(module, output)
        return self.members.over_rows(output) if one else None

    def _sides_of(self, block: int) -> tuple[Tensor, Tensor]:
        """L and R of all members, or of the one whose turn it is."""
        _, left, right = self._factors[block]
        if self.members is not None or self._prepared == 1:
            return left, right
        return left[self._member : self._member + 1], right if right.dim() == 2 else right[self._member]

    def _add_biases(self, module: nn.Module, output: Tensor) -> None:
        """The first member's own is in the module."""
        place = self._place.get(self._parameters.get(id(module._parameters.get("bias"))))
        if place is None or (self.members is None and not self._member):
            return
        rows = module.__dict__.get("_zo_rows")
        members = [self._member] if self.members is None else range(self.members.count)
        for out, member in zip(output.tensor_split(len(members)), members, strict=True):
            if member:
                more = self._copies[member].tensors[place] - self._copies[0].tensors[place]
                out += more if rows is None else more.index_select(0, rows)

    def _call_module(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        if self.members is None and not self._member:
            return forward(*args, **kwargs)
        if self._left[module]:
            return super()._call_module(module, forward, *args, **kwargs)
        own = [p for p in module._parameters.values() if self._parameters.get(id(p)) in self._place]
        places = [self._place[self._parameters[id(p)]] for p in own]

        def turn(member: int) -> None:
            self._swap(own, [self._copies[member].tensors[place] for place in places])

        first = [p.data for p in own]
        try:
            if self.members is not None:
                return self._one_by_one(module, forward, args, kwargs, turn)
            turn(self._member)
            return forward(*args, **kwargs)
        finally:
            self._swap(own, first)

    def _turn(self, member: int, turn: Any) -> None:
        super()._turn(member, turn)
        self._member = member

    def _one_by_one(self, *args: Any) -> Any:
        try:
            return super()._one_by_one(*args)
        finally:
            self._member = 0

    def _perturb(self, frame: Frame, parameter: nn.Parameter, block: int, rows: Tensor | None) -> None:
        if block not in self._left[frame.module]:
            self._perturb_vector(frame, parameter, block, rows)
        elif block not in self._factors:
            super()._perturb(frame, parameter, block, rows)
        else:
            left, right = self._sides_of(block)
            copies = [self._product(frame, parameter, block, own, right if right.dim() == 2 else right[member])
                      for member, own in enumerate(left)]  # fmt: skip
            frame.swap(parameter, *(copy if rows is None else copy.index_select(0, rows) for copy in copies))

    def _perturb_vector(self, frame: Frame, parameter: nn.Parameter, block: int, rows: Tensor | None) -> None:
        """Of a module with other weights that have copies; of a head: who takes rows of its weight takes those of its
        bias."""
        if self.members is not None:
            copies = [copies.tensors[self._place[block]] for copies in self._copies[: self.members.count]]
        elif self._member:
            copies = [self._copies[self._member].tensors[self._place[block]]]
        elif rows is not None:
            copies = [parameter.data]
        else:
            return
        frame.swap(parameter, *(copy if rows is None else copy.index_select(0, rows) for copy in copies))

    def _product(self, frame: Frame, parameter: nn.Parameter, block: int, left: Tensor, right: Tensor) -> Tensor:
        out = self._take(frame, parameter, None)
        seed = self._probe.terms[0][0].seed
        add_product(parameter.data, left.float(), right.float(), self._factors[block].matrix.tensor_id, seed, out=out)
        return out

    def apply(self, update: Update, finite: Tensor, decay: Tensor | None, rounding_seed: Tensor) -> None:
        for direction, coef in update.terms:
            self.pending.add(direction, coef)
        self.pending.rounding.copy_(rounding_seed)
        self._dense.move(update.terms, decay, rounding_seed)
        if decay is None:
            self.pending.settle()
        else:  # it shrinks every weight at every step
            self.pending.merge(decay)

    def begin(self) -> None:
        """A step that is replayed from a graph collects, and no Python of it runs."""
        self.pending.begin()

    def flush(self) -> None:
        self.pending.merge()

    def restore(self) -> None:
        """The weights are whole when an exception leaves a step."""
        super().restore()
        self._member = 0
        self.pending.merge()

    def realised_share(self, probe: Probe) -> Tensor:
        """As under `scratch`; 1 for matrices, whose side products are rounded like any activation."""
        shares = torch.ones(len(self.blocks), dtype=torch.float32, device=self.blocks.device)
        if self._dense.numbers:
            shares.index_copy_(0, self._dense.places, super().realised_share(probe, self._dense.numbers))
        return shares
