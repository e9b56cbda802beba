"""MeZO that keeps the losses it is told, for tests that look at both signs."""

from __future__ import annotations

import torch

from zo_finetuner.optim import MeZO


class Noted(MeZO):
    def __init__(self):
        super().__init__()
        self.told: list[torch.Tensor] = []

    def tell(self, losses):
        self.told.append(losses)
        return super().tell(losses)
