"""What scales are worth on rows that nothing was learned from: the meta loss that chooses the best networks.

A point of training is measured once, on held-out rows, with unit scales; any policy is then scored there by the
divergence of its noise from the gain (`profile.py`), without another pass.  The points are the base weights and the end
of the first window, for every learning set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_finetuner.history import History
from zo_finetuner.learning.profile import Estimate, Layout, Mean, divergence, sample
from zo_finetuner.learning.streaming import LossFn, Weights
from zo_finetuner.pertnn import PertNN, normalizer
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import BlockStats, derive_seed

SAMPLES = 8  # per point: 16 backward passes
SETTLING = 5  # times that networks which read their own last answer are run; published ones settle in 3


@dataclass(frozen=True)
class Point:
    """Statistics of the weights (blocks,), the losses seen so far, and the gain on held-out rows (blocks,) of the
    learning set number `task`."""

    task: int
    stats: BlockStats
    history: History
    gain: Tensor

    @torch.no_grad()
    def energies(self, nets: PertNN | ScaleNet, share: Tensor) -> Tensor:
        """s_b = (nu sigma_b)^2 of a policy at this point, (blocks,) fp32."""
        history = History(torch.ones_like(self.history.sigma), self.history.losses, self.history.first,
                          self.history.average)
        for _ in range(SETTLING):
            history.sigma = nets.scales(self.stats, history)
        return (normalizer(history.sigma, share) * history.sigma).square().float()

    def state_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "stats": list(self.stats),
            "history": self.history.state_dict(),
            "gain": self.gain,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device | str = "cpu") -> Point:
        stats = BlockStats(*(tensor.to(device) for tensor in state["stats"]))
        history = History(**{name: tensor.to(device) for name, tensor in state["history"].items()})
        return cls(state["task"], stats, history, state["gain"].to(device))


def measure(
    weights: Weights, batch: Callable[[int], LossFn], history: History, cost: Mean, *, task: int, seed: int, eps: float,
    few_answers: bool = False,
) -> Point:  # fmt: skip
    """The weights as they are on held-out batches 0, 1, ...  cost: is added to.  few_answers: the set's."""
    estimate, losses = Estimate(None, cost), []
    step = torch.tensor(eps, dtype=torch.float32, device=weights.device)
    for number in range(SAMPLES):
        check_seed = derive_seed(seed, number // 2, 1)
        taken = sample(weights, batch(number), derive_seed(seed, number, 0), check_seed, step)
        estimate.add(taken)
        losses.append(taken.losses)
    seen = history.copy()
    seen.remember(torch.stack(losses).mean(dim=0))
    gain = estimate.least_gain()
    return Point(task, weights.stats(), seen, Layout(weights.blocks).lasting(gain) if few_answers else gain)


def score(points: list[Point], numels: Tensor, nets: PertNN | ScaleNet, share: Tensor) -> float:
    """Divergence, averaged over the points with the gain there as weight (of each learning set in all 1); lower is
    better.  numels: (blocks,)."""
    value, tasks = 0.0, {point.task for point in points}
    for task in tasks:
        mine = [point for point in points if point.task == task]
        gains = torch.stack([point.gain.sum() for point in mine])
        each = torch.stack([divergence(point.gain, numels, point.energies(nets, share)) for point in mine])
        value += float((gains * each).sum() / gains.sum()) / len(tasks)
    return value
