"""Scale policies: how far each block is perturbed.  A direction is scale_b * z_b, and so is its update.

    Ones        no scales (MeZO)
    Constant    one fixed scale per block
    Learned     a policy network's, from statistics of the weights and the steps before (`finetuner.py`)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor

from zo_finetuner.optim.base import Method, Part, StepContext
from zo_finetuner.pertnn import PertNN
from zo_finetuner.scale_net import ScaleNet

Nets = PertNN | ScaleNet | str | os.PathLike


@dataclass(frozen=True)
class Asked:
    """What a policy is made for and of: the method that will have it, and the arguments of `make_method`."""

    method: Method
    pertnn: Nets | None = None
    batch_size: int = 16
    seed: int = 0
    normalize: bool = True
    transfer: bool = False


@dataclass
class Ones(Part):
    """halves: all its scales are fp16 numbers, so that a journal holds them in 2 bytes."""

    halves = False

    def scale(self, context: StepContext) -> Tensor | None:
        """(blocks,) fp32 >= 0, None for ones."""
        return None

    def remember(self, losses: Tensor) -> None:
        """losses: (2,) fp32, those of a pair of probes, or the step's mean loss twice."""

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {}


@dataclass
class Constant(Ones):
    """fixed: (blocks,) fp32 >= 0 in the order of the engine's blocks; rounded to fp16, as a journal holds them."""

    fixed: Tensor | None = None

    halves = True

    def __post_init__(self) -> None:
        self.memory["scale"] = self.fixed = self.fixed.half().float()
        self._metrics = {"scale_min": self.fixed.min(), "scale_max": self.fixed.max(), "sigma": self.fixed}

    def scale(self, context: StepContext) -> Tensor:
        return self.fixed

    @property
    def metrics(self) -> dict[str, Tensor]:
        return self._metrics
