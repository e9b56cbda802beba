"""Gradient energies of groups of blocks, from squared projected gradients alone.

With squared scales s_b a two-point step has E[g^2] = sum_b s_b G_b, G_b the block's gradient energy.  Observations of
g^2 under varied scales are a regression for G; with one unknown per group and one group perturbed at a time its normal
equations are diagonal, their solution cannot be negative, and an observation's error is that of its own group alone,
sqrt(2) of its size.  (Under scales that all vary at once it is sqrt(2) of the whole sum: bench/LOG.md.)

    G_g = (PRIOR level D_g + sum of g^2 / s_g) / (PRIOR + observations)       level = sum of g^2 / s_g over sum of D_g

The ridge draws a group to equal energy per element, with the weight of PRIOR observations.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIOR = 1.0


class GroupGains:
    """elements: D_g, (groups,) fp64.  memory: observations that are remembered (exponentially); None: all of them.
    All sums are fp64 on the device and written in place; nothing waits for the host."""

    def __init__(self, elements: Tensor, memory: int | None = None):
        self.elements, self.keep = elements, 1.0 if memory is None else 1 - 1 / memory
        self.seen, self.energy = torch.zeros_like(elements), torch.zeros_like(elements)

    def add(self, group: Tensor, energy: Tensor) -> None:
        """group: 0-dim int64; energy: g^2 / s_g, 0-dim fp64."""
        here = torch.arange(len(self.elements), device=self.elements.device) == group
        self.seen.mul_(self.keep).add_(here)
        self.energy.mul_(self.keep).add_(torch.where(here, energy, 0.0))

    @property
    def gains(self) -> Tensor:
        """G_g, (groups,) fp64 > 0; D_g before anything was observed."""
        observed = (self.seen * self.elements).sum()
        level = self.energy.sum().clamp(min=1e-300) / torch.where(observed > 0, observed, 1.0)
        level = torch.where(observed > 0, level, 1.0)
        return (PRIOR * level * self.elements + self.energy) / (PRIOR + self.seen)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen, "energy": self.energy}
