"""Scales that calibrate themselves while they train, from forward passes alone: one group of blocks a step.

    G_g   = gradient energy of group g, from the steps so far (`group_gains.py`)
    s_g   = (G_g / D_g)^p,  scaled so that sum c_g s_g = sum c_g, then clipped to [1/16, 16]
    pi_g  = (1 - EXPLORE) share of s_g G_g + EXPLORE / groups
    g ~ pi,  l+- = f(theta +- eps a z_g),  a = sqrt(s_g / pi_g),  k = (l+ - l-) / 2 eps,   theta_g -= lr k a z_g

A group is what is of one kind in one third of the depth (`block_kinds.block_groups`), 24 at most.  The mean step is
-lr s_g gradient_g in every group, that of constant scales sqrt(s): the draw of the group is unbiased, for a group is
moved 1 / pi times as far as seldom as it is drawn.  Its second-order cost, sum s^2 G T / pi, is least for
pi ~ s sqrt(G T), where by Cauchy and Schwarz it is no more than (sum s G)(sum s T), that of all blocks at once; and
k^2 / a^2 says something of one group only, so that tens of observations a group suffice.

State: two numbers per group.  Forwards per step: 2.  The group is drawn from word 0 of the direction's seed at a tensor
id of its own, stream "masks"; a is rounded to fp16 before it is used, as a journal holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.block_kinds import block_groups
from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update, central_difference
from zo_finetuner.optim.group_gains import GroupGains
from zo_finetuner.optim.learned import share_of
from zo_finetuner.params import trainable_blocks
from zo_kernels import seed_tensor, tensor_ids, words
from zo_kernels.noise import MASK

CLIP = 16.0  # as the closed form's
EXPLORE = 0.2
MEMORY = 1000  # steps
DRAW = "the group of a self-calibrated step"
DRAW_ID = tensor_ids([DRAW])[DRAW]


def tempered(gains: Tensor, elements: Tensor, share: Tensor, power: float) -> Tensor:
    """s_g, (groups,) fp64, from gains, elements D and budgets c, (groups,) each."""
    s = (gains / elements) ** power
    return (s * (share.sum() / (share * s).sum())).clamp(1 / CLIP, CLIP)


@dataclass
class SelfCalibrated(Method):
    """groups: the group of every block of the engine, (blocks,) int64.  elements, share: D_g and c_g, (groups,) fp64.
    power: p."""

    groups: Tensor
    elements: Tensor
    share: Tensor
    power: float = 0.5
    dist: str = "normal"

    name = "self-calibrated"
    forwards = 2

    def __post_init__(self) -> None:
        self.gains = GroupGains(self.elements, MEMORY)

    def policy(self) -> tuple[Tensor, Tensor]:
        """(s_g, pi_g), (groups,) fp64 each."""
        gains = self.gains.gains
        s = tempered(gains, self.elements, self.share, self.power)
        pays = s * gains
        return s, (1 - EXPLORE) * pays / pays.sum() + EXPLORE / len(s)

    @torch.no_grad()
    def ask(self, context: StepContext) -> list[Probe]:
        seed, device = context.seed(0), self.elements.device
        s, pi = self.policy()
        drawn = words(1, seed if isinstance(seed, Tensor) else seed_tensor(seed, device), DRAW_ID, MASK)[0, 0]
        place = ((drawn.double() % 2.0**32) + 0.5) * 2.0**-32
        self._group = (pi.cumsum(0) < place).sum().clamp(max=len(s) - 1)
        here = torch.arange(len(s), device=device) == self._group
        scale = torch.where(here, s / pi, 0.0).sqrt().half().float()
        self._energy = scale.sum().double().square()
        self.metrics = {"group": self._group, "scale": scale.sum(), "scale_min": s.min().sqrt(),
                        "scale_max": s.max().sqrt()}  # fmt: skip
        self._context, self._direction = context, Direction(seed, scale[self.groups], self.dist)
        return [Probe(self._direction, context.eps), Probe(self._direction, -context.eps)]

    @torch.no_grad()
    def tell(self, losses: Tensor) -> Update:
        update = central_difference(self._direction, self._context.lr, self._context.eps, losses)
        self.gains.add(self._group, update.projected_grad.double().square() / self._energy)
        return update

    def state_dict(self) -> dict[str, Any]:
        return self.gains.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gains.load_state_dict(state)


def make_self_calibrated(model: nn.Module, *, batch_size: int, dist: str, **_: Any) -> Method:
    """For the trainable blocks of a model."""
    blocks = trainable_blocks(model)
    number, labels = block_groups(blocks.names)
    groups = torch.tensor(number, dtype=torch.int64, device=blocks.device)

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(labels), dtype=torch.float64, device=blocks.device).index_add(0, groups, values)

    numels = torch.tensor(blocks.numels, dtype=torch.float64, device=blocks.device)
    return SelfCalibrated(groups, summed(numels), summed(share_of(model, blocks, batch_size)), dist=dist)
