"""Updates collected in low-rank coordinates and not yet in the weights:  theta + sum over subspaces of L^T R.

A merge is one pass over the weights:  theta = round(decay * theta + sum L^T R), 16-bit weights stochastically with the
rounding seed of the last collected step.  It comes when the collected rank would exceed the layout's limit (so at
every new subspace of LOZO and SubZero), and before any reader of the weights.  While something is collected the model
has hooks that merge when it is called outside a probe, saved (`state_dict`) or loaded; who reads a parameter himself
calls `Engine.flush()` first.  When a merge comes changes the weights by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from zo_finetuner.optim.directions import Direction, Terms
from zo_finetuner.rows import unwrap
from zo_finetuner.subspace import Held, Matrix, Subspace
from zo_kernels import add_product


class Factors(NamedTuple):
    """left: (N, k, m), right: (N, k, n), or (k, n) for all: for each of N members a matrix is moved by left^T right."""

    matrix: Matrix
    left: Tensor
    right: Tensor


class Pending:
    """What was collected since the last merge for the matrices among `parameters`, the model's in the order of the
    blocks.  reading: set within a probe, where the model may be called without a merge.

    It holds parameters, not their memory: a deep copy of the model copies its hooks, and so this, for its own."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]):
        self.rounding = torch.zeros((), dtype=torch.int64, device=parameters[0].device)
        self._parameters = parameters
        self.reading, self.merges = False, 0
        self._coordinates: dict[Subspace, Tensor] = {}
        self._lasting: dict[Subspace, Tensor] = {}  # where those of a lasting one are collected
        self._models = list(dict.fromkeys((model, unwrap(model))))
        self._guards: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def rank(self) -> int:
        return sum(subspace.rank for subspace in self._coordinates)

    def begin(self) -> None:
        """Before a step that adds to a lasting subspace: it may do so without Python."""
        for subspace in self._lasting:
            self._open(subspace)

    def add(self, direction: Direction | Held, coef: Tensor) -> None:
        """Collect coef * direction."""
        subspace = direction.subspace
        if subspace.lasting and subspace not in self._lasting:
            self._lasting = {subspace: torch.zeros_like(direction.coordinates)}
        if subspace.lasting or subspace in self._coordinates:
            self._open(subspace).addcmul_(direction.coordinates, coef)
        else:
            self._coordinates[subspace] = direction.coordinates * coef
            self._guard()

    def _open(self, subspace: Subspace) -> Tensor:
        if subspace not in self._coordinates:
            self._coordinates[subspace] = self._lasting[subspace]
            self._guard()
        return self._coordinates[subspace]

    def make_room(self, terms: Terms) -> None:
        """Merge if the subspaces of these directions, where they are new, would be too many."""
        new = {direction.subspace for direction, _ in terms} - self._coordinates.keys()
        if new and self._coordinates:
            if self.rank + sum(subspace.rank for subspace in new) > next(iter(new)).layout.limit:
                self.merge()

    def settle(self) -> None:
        """Merge if more is collected than may be."""
        if self._coordinates and self.rank > next(iter(self._coordinates)).layout.limit:
            self.merge()

    def factors(self, dtype: torch.dtype, members: Sequence[Terms] = ((),)) -> list[Factors]:
        """Of every matrix, in a dtype: what is collected, and on top sum coef * direction of each member, all of which
        have as many subspaces.  Empty where there are none."""
        slots = [*zip(*(self._moved(terms).items() for terms in members), strict=True)]
        if not slots:
            return []
        sides = [_sides(slot, dtype) for slot in slots]
        layout = slots[0][0][0].layout
        lefts, rights = sides[0] if len(sides) == 1 else _joined(sides, len(members))
        return [Factors(*parts) for parts in zip(layout.matrices, lefts, rights, strict=True)]

    def _moved(self, terms: Terms) -> dict[Subspace, Tensor]:
        """Coordinates of all that a member is moved by."""
        moved = dict(self._coordinates)
        for direction, coef in terms:
            here, own = moved.get(direction.subspace), direction.coordinates
            moved[direction.subspace] = own * coef if here is None else torch.addcmul(here, own, coef)
        return moved

    @torch.no_grad()
    def merge(self, decay: Tensor | None = None) -> None:
        self.merges += bool(self._coordinates)
        for number, (matrix, left, right) in enumerate(self.factors(torch.float32)):
            theta = self._parameters[matrix.block].data
            add_product(theta, left[0], right, matrix.tensor_id, self.rounding, decay=decay)
            for subspace, moved in self._coordinates.items():  # after Ctrl-C the rest is still to be merged
                subspace.layout.split(moved)[number].zero_()
        self._coordinates.clear()
        for guard in self._guards:
            guard.remove()
        self._guards.clear()

    def _guard(self) -> None:
        if self._guards:
            return
        for model in self._models:
            self._guards += [
                model.register_forward_pre_hook(self._before_forward, prepend=True),
                model.register_state_dict_pre_hook(self._before_state),
                model.register_load_state_dict_pre_hook(self._before_state),
            ]

    def _before_forward(self, model: nn.Module, args: tuple) -> None:
        if not self.reading:
            with _disable_current_modes():  # in a first probe of another optimizer, who watches reads of the weights
                self.merge()

    def _before_state(self, *_: Any) -> None:
        self.merge()


Slot = tuple[tuple[Subspace, Tensor], ...]  # of each member a subspace, and coordinates in it


def _sides(slot: Slot, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(lefts, rights) of every matrix."""
    subspace = slot[0][0]
    if all(own is subspace for own, _ in slot):
        coordinates = torch.stack([x for _, x in slot])
        if subspace.left is None:  # all matrices in one conversion
            return subspace.left_of(coordinates.to(dtype)), subspace.right_as(dtype)
        return [left.to(dtype) for left in subspace.left_of(coordinates)], subspace.right_as(dtype)
    alone = [_sides((own,), dtype) for own in slot]
    return tuple([torch.stack(parts) for parts in zip(*side, strict=True)] for side in (
        [[left[0] for left in lefts] for lefts, _ in alone], [rights for _, rights in alone]))  # fmt: skip


def _joined(sides: list[tuple[list[Tensor], list[Tensor]]], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Several subspaces as one of their ranks' sum."""
    lefts, rights = ([*zip(*parts, strict=True)] for parts in zip(*sides, strict=True))
    if any(right.dim() == 3 for right in rights[0]):
        rights = [[right.expand(count, -1, -1) for right in parts] for parts in rights]
    return [torch.cat(parts, -2) for parts in lefts], [torch.cat(parts, -2) for parts in rights]
