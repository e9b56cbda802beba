"""What a policy of scales remembers from step to step: numbers on the device, 3 + blocks of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

AVERAGED = 0.02  # share of a step's loss in the running average: about 50 steps are remembered


@dataclass
class History:
    """All fp32 and written in place.  sigma: (blocks,) raw scales of the step before (1 before the first).  losses:
    (2,) loss+ and loss- of the step before (0 before the first).  first: 0-dim, mean loss of the first step; average:
    0-dim, running mean; both NaN before the first step."""

    sigma: Tensor
    losses: Tensor
    first: Tensor
    average: Tensor

    @classmethod
    def start(cls, blocks: int, device: torch.device | str = "cpu") -> History:
        losses = torch.zeros(2, dtype=torch.float32, device=device)
        unknown = torch.full((2,), torch.nan, dtype=torch.float32, device=device)
        return cls(torch.ones(blocks, dtype=torch.float32, device=device), losses, unknown[0], unknown[1])

    def copy(self) -> History:
        """With tensors of its own."""
        return History(*(getattr(self, entry.name).clone() for entry in fields(self)))

    def remember(self, losses: Tensor) -> None:
        """Take in a step's two losses, (2,) fp32; losses that are not finite are forgotten.  No wait for the host."""
        finite = torch.isfinite(losses).all()
        self.losses.copy_(torch.where(finite, losses, self.losses))
        mean = losses.mean()
        moved = torch.where(self.average.isnan(), mean, self.average + AVERAGED * (mean - self.average))
        self.average.copy_(torch.where(finite, moved, self.average))
        self.first.copy_(torch.where(finite & self.first.isnan(), mean, self.first))

    @property
    def progress(self) -> Tensor:
        """log(average / first loss), 0-dim fp32: 0 at the start, below as the loss falls; scale-free."""
        ratio = self.average.clamp(min=1e-6) / self.first.clamp(min=1e-6)
        return torch.nan_to_num(ratio.log())

    def state_dict(self) -> dict[str, Tensor]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for entry in fields(self):
            getattr(self, entry.name).copy_(state[entry.name])
