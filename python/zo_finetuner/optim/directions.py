"""Where a loss is evaluated and which way an update goes: descriptions of directions, and as kernels take them.

    Direction     scale_b * z'_b, z' the noise of a seed or, with a form (`zo_kernels.forms`), what is made of it
    Combination   sum of weight * Direction
    Anchored      away from theta_0, along theta - theta_0, by a factor for every block

All are compared by identity: two probes of one direction hold the same object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from zo_finetuner.subspace import Held, Subspace
from zo_kernels import Form, scratch


@dataclass(frozen=True, eq=False)
class Direction:
    """scale_b * z_b, z from `zo_kernels.noise` at `seed` (0-dim int64: the bits of an unsigned one).  scale: (blocks,)
    fp32, None for ones.  form: of z, its tensors in a list, one per block.  A mean (`shifted`) adds mu_b; its c is that
    of the term it stands in, so it is left None here.

    subspace: of a low-rank direction (`zo_finetuner.subspace`), in which z_b of a matrix has few coordinates."""

    seed: Tensor
    scale: Tensor | None = None
    dist: str = "normal"
    form: Form | None = None
    subspace: Subspace | None = None

    @cached_property
    def coordinates(self) -> Tensor:
        """Of a low-rank direction, scales included: flat fp32, drawn once for its probes and its update."""
        return self.subspace.layout.draw(self.seed, self.scale, self.dist)

    def of_seed(self, seed: Tensor) -> Direction:
        """The direction that another seed has: in the same subspace if that lasts, else in one of its own too."""
        own = self.subspace is not None and not self.subspace.lasting
        return replace(self, seed=seed, subspace=Subspace(self.subspace.layout, seed) if own else self.subspace)


@dataclass(frozen=True, eq=False)
class Combination:
    """sum of weight * direction; weights: 0-dim fp32.  Its directions share distribution and form."""

    terms: tuple[tuple[Direction, Tensor], ...]


@dataclass(frozen=True, eq=False)
class Anchored:
    """theta -> anchor_b + (ratio_b + coef * step_b) * (theta - anchor_b) at a coefficient.  anchors: one per block, in
    theta's dtype, None where a block stays as it is.  ratio, step: (blocks,) fp32."""

    anchors: list[Tensor | None]
    ratio: Tensor
    step: Tensor

    def move(self, theta: Tensor, out: Tensor, block: int, coef: Tensor | None, rows: Tensor | None = None) -> None:
        """out = theta (or rows of it) moved, rounded to nearest; out may be theta."""
        anchor = self.anchors[block]
        if rows is not None:
            theta, anchor = theta[rows], None if anchor is None else anchor[rows]
        ratio = self.ratio[block] if coef is None else self.ratio[block] + coef * self.step[block]
        out.copy_(theta if anchor is None else torch.lerp(anchor.float(), theta.float(), ratio.to(theta.device)))


Terms = list[tuple[Direction | Held, Tensor]]  # Held: low-rank updates only


@dataclass(frozen=True, eq=False)
class Stacked:
    """sum_k coefs[k] * scale_kb * z'_kb as an op takes it: seeds (K,) int64, coefs (K,) fp32, scale None, (blocks,) or
    (K, blocks) fp32."""

    seeds: Tensor
    coefs: Tensor
    scale: Tensor | None
    dist: str
    form: Form | None

    @classmethod
    def of(cls, terms: Terms) -> Stacked:
        """ValueError for terms of two distributions or forms: they take two passes (`together`)."""
        first = terms[0][0]
        if not together(terms):
            raise ValueError("all terms of an update share one distribution and one form")
        if len(terms) == 1:
            seeds, coefs, scale = first.seed.reshape(1), terms[0][1].reshape(1), first.scale
        else:
            seeds = torch.stack([direction.seed for direction, _ in terms])
            coefs = torch.stack([coef for _, coef in terms])
            scale = _joint_scale([direction.scale for direction, _ in terms])
        form = first.form
        if form is not None and form.kind == "shifted":
            form = form._replace(value=coefs.sum())
        return cls(seeds, coefs, scale, first.dist, form)

    def on(self, device: torch.device) -> Stacked:
        """The same with its scalars on a device where a part of the model lies; sent once."""
        if device == self.seeds.device:
            return self
        copies = self.__dict__.setdefault("_copies", {})
        if device not in copies:
            form = self.form
            if form is not None and form.value is not None:
                form = form._replace(value=form.value.to(device))
            scale = None if self.scale is None else self.scale.to(device)
            copies[device] = Stacked(self.seeds.to(device), self.coefs.to(device), scale, self.dist, form)
        return copies[device]

    @cached_property
    def _columns(self) -> Tensor | None:
        return self.scale if self.scale is None or self.scale.dim() == 1 else self.scale.t().contiguous()

    def scale_of(self, block: int) -> Tensor | None:
        return None if self._columns is None else self._columns[block]

    def form_of(self, block: int, theta: Tensor) -> Form | None:
        """Of a block, or of its leading elements in the shape of `theta`."""
        if self.form is None or self.form.state is None:
            return None if self.form is None else self.form.of(block)
        own = self.form.of(block)
        return own._replace(state=own.state.view(-1)[: theta.numel()].view(theta.shape))

    def displacement(self, theta: Tensor, tensor_id: int, block: int, offset: int = 0) -> Tensor:
        """What it adds to theta (a block, or its leading elements; offset: global index of the first): fp32, to the
        rounding of an fp32 theta."""
        theta = theta.float()
        out = torch.empty_like(theta)
        scratch(theta, out, tensor_id, self.seeds, self.coefs, self.scale_of(block), dist=self.dist,
                form=self.form_of(block, theta), offset=offset)  # fmt: skip
        return out - theta


def together(terms: Terms) -> bool:
    """Whether one pass can make all of them."""
    first = terms[0][0]
    return all(direction.dist == first.dist and direction.form is first.form for direction, _ in terms)


def chosen(directions: Sequence[Direction], index: Tensor) -> Direction:
    """directions[index] for a 0-dim index, of directions that differ in nothing but their seeds."""
    return directions[0].of_seed(pick(torch.stack([direction.seed for direction in directions]), index))


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[index] for a 0-dim index, without the wait for the host that indexing takes."""
    return values.index_select(0, index.reshape(1)).squeeze(0)


def _joint_scale(scales: list[Tensor | None]) -> Tensor | None:
    known = next((scale for scale in scales if scale is not None), None)
    if all(scale is known for scale in scales):
        return known
    return torch.stack([torch.ones_like(known) if scale is None else scale for scale in scales])
