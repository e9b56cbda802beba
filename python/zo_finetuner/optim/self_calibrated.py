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

import torch
from torch import Tensor, nn

from zo_finetuner.block_kinds import block_groups
from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import StepContext
from zo_finetuner.optim.composed import Composed
from zo_finetuner.optim.estimators import Central
from zo_finetuner.optim.group_gains import GroupGains
from zo_finetuner.optim.learned import share_of
from zo_finetuner.optim.scales import Asked, Ones
from zo_finetuner.params import trainable_blocks
from zo_kernels import MASK, tensor_ids, words

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
class Calibrated(Ones):
    """groups: the group of every block of the engine, (blocks,) int64.  elements, share: D_g and c_g, (groups,) fp64.
    power: p."""

    groups: Tensor | None = None
    elements: Tensor | None = None
    share: Tensor | None = None
    power: float = 0.5

    halves = True

    def __post_init__(self) -> None:
        self.gains = GroupGains(self.elements, MEMORY)
        self.memory = self.gains.state_dict()
        self._metrics: dict[str, Tensor] = {}

    def policy(self) -> tuple[Tensor, Tensor]:
        """(s_g, pi_g), (groups,) fp64 each."""
        gains = self.gains.gains
        s = tempered(gains, self.elements, self.share, self.power)
        pays = s * gains
        return s, (1 - EXPLORE) * pays / pays.sum() + EXPLORE / len(s)

    @torch.no_grad()
    def scale(self, context: StepContext) -> Tensor:
        s, pi = self.policy()
        drawn = words(1, context.seed(0), DRAW_ID, MASK)[0, 0]
        place = ((drawn.double() % 2.0**32) + 0.5) * 2.0**-32
        self.group = (pi.cumsum(0) < place).sum().clamp(max=len(s) - 1)
        here = torch.arange(len(s), device=s.device) == self.group
        scale = torch.where(here, s / pi, 0.0).sqrt().half().float()
        self._energy, self._eps = scale.sum().double().square(), context.eps
        self._metrics = {"group": self.group, "scale": scale.sum(), "scale_min": s.min().sqrt(),
                         "scale_max": s.max().sqrt(), "sigma": s.sqrt()[self.groups]}  # fmt: skip
        return scale[self.groups]

    @torch.no_grad()
    def remember(self, losses: Tensor) -> None:
        slope = ((losses[0] - losses[1]) / (2 * self._eps)).double()
        self.gains.add(self.group, slope.square() / self._energy)

    @property
    def metrics(self) -> dict[str, Tensor]:
        return self._metrics


@dataclass
class SelfCalibrated(Composed):
    """scales: `Calibrated`.  power: p."""

    name: str = "self-calibrated"
    power: float = 0.5

    fixed = {"scales": "it finds its scales itself"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.estimator) is not Central or self.estimator.probes != 1:
            raise InputError("self-calibrated learns from one pair of probes a step: leave estimator central, probes 1")


def calibrated_scales(model: nn.Module, asked: Asked) -> Calibrated:
    """For the trainable blocks of a model."""
    blocks = trainable_blocks(model)
    number, labels = block_groups(blocks.names)
    groups = torch.tensor(number, dtype=torch.int64, device=blocks.device)

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(labels), dtype=torch.float64, device=blocks.device).index_add(0, groups, values)

    numels = torch.tensor(blocks.whole, dtype=torch.float64, device=blocks.device)
    return Calibrated(groups, summed(numels), summed(share_of(model, blocks, asked.batch_size)), asked.method.power)
