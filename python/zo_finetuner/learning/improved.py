"""The recipe that learns: the published idea with the sampled meta loss replaced by its expectation over directions.

    minimise over phi   sum over a simulated run of   sum G * KL(share of the gain || share of the noise)

with s_b = (nu sigma_b(phi))^2; `profile.py` says what that is and why.  Where phi can say anything, a block's share of
the noise becomes its share of the run's whole gain.

Against the published recipe: sigma is 1 at the start, its logarithm is learned from scale-free inputs
(`scale_net.py`), with Adam in fp32, and averaged over the last steps; the normaliser is in the graph; the gain compares
two batches, so that a block whose gradient is batch noise earns nothing, and a vocabulary earns no more for the few
rows that a classification task asks of it; and nothing is divided by a million.

The simulated run is deployment's mean, `stretch` two-point steps per first-order step, at deployment's own rate:

    theta_b -= stretch * rate * s_b * gradient_b,     rate = RATE / sum s T

so a window of some tens of steps covers a horizon of a thousand.  A step is two forward and backward passes; the second
one's gradients move theta after they have been measured, clipped with the first one's norm.  Memory: weights,
activations, the largest gradient; there is no momentum.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zo_finetuner.history import History
from zo_finetuner.learning.profile import Estimate, Layout, Mean, divergence, sample
from zo_finetuner.learning.streaming import Turn, Visit, Weights
from zo_finetuner.pertnn import normalizer
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import derive_seed

MEMORY = 16  # samples that a gain remembers: theta moves meanwhile
AVERAGED = 100  # steps that the learned weights are averaged over: each one follows the noise of its window
WARM = 8  # samples at the start of a window before anything moves
#: Best constant rates of runs of 400 steps with six kinds of scales were .09 to .19 / sum s T (bench/LOG.md).
RATE = 0.12


class ImprovedRecipe:
    """nets: for the blocks of `weights`, in their order.  share: c_b of the normaliser (blocks,).
    horizon: two-point steps of the runs to learn for.  window: steps per task that cover them, the first WARM do not
    move anything.  costs: of every task that takes turns; this recipe goes on adding to them."""

    name = "improved"

    def __init__(
        self, weights: Weights, nets: ScaleNet, share: Tensor, *, window: int, costs: list[Mean], horizon: int = 1000,
        lr_mlp: float = 0.03, eps: float = 1e-3,
    ):  # fmt: skip
        self.weights, self.moving_nets, self.share = weights, nets, share
        self.nets = deepcopy(nets).requires_grad_(False)  # the average: what is learned
        self.learned_steps = 0
        self.stretch = horizon / max(window - WARM, 1) / len(costs)
        self.eps = torch.tensor(eps, dtype=torch.float32, device=weights.device)
        self.layout = Layout(weights.blocks)
        # eps of Adam: gradients are differences of shares, of order 1 / blocks; noise far below that moves nothing.
        self.optimizer = torch.optim.Adam(self.moving_nets.parameters(), lr=lr_mlp, eps=1e-3)
        self._costs = costs
        self._estimates: dict[int, Estimate] = {}
        self._first_gains: dict[int, Tensor] = {}
        self._check_seeds: dict[int, int] = {}

    def restart(self) -> None:
        """The base model has been put back to its own weights."""
        self._estimates, self._first_gains = {}, {}

    def step(self, turn: Turn) -> Tensor:
        """A meta step and a step of the simulated run on one batch; returns the batch's loss, 0-dim."""
        estimate = self._estimates.setdefault(turn.task, Estimate(MEMORY, self._costs[turn.task]))
        if estimate.count % 2 == 0:
            self._check_seeds[turn.task] = derive_seed(turn.seed, 0, 0)
        s = self.energies(turn.history)
        warm, moving = estimate.count >= WARM, None
        if warm:
            rate = turn.slower * RATE / (s.detach() * self.layout.pooled(estimate.cost)).sum()
            moving = partial(self._moving, s.detach(), rate, estimate.energy.mean)
        taken = sample(self.weights, turn.loss_fn, turn.seed, self._check_seeds[turn.task], self.eps, moving)
        estimate.add(taken)
        if warm:
            self.optimizer.zero_grad()
            gain = estimate.least_gain()
            if turn.few_answers:
                gain = self.layout.lasting(gain)
            # Where a run gains little its shares are noise, and matter little.
            first = self._first_gains.setdefault(turn.task, gain.sum())
            ((gain.sum() / first) * divergence(gain, self.layout.numels, s)).backward()
            self.optimizer.step()
            self._average()
        turn.history.remember(taken.losses)
        return taken.losses.mean()

    def energies(self, history: History) -> Tensor:
        """s_b = (nu sigma_b)^2, (blocks,) fp32, with the graph to the nets; sets `history.sigma`."""
        sigma = self.moving_nets.scales(self.weights.stats(), history)
        history.sigma = sigma.detach()
        return (normalizer(sigma, self.share) * sigma).square().float()

    def _moving(self, s: Tensor, rate: Tensor, usual: Tensor, energy: Tensor) -> Visit:
        """The mean of `stretch` two-point steps; a batch whose step would be more than twice as long as usual is
        clipped, by the norm of the first pass's gradient."""
        clip = (2 * ((s.square() * usual).sum() / (s.square() * energy).sum()).sqrt()).clamp(max=1)
        steps = clip * self.stretch * rate * s

        def move(blocks: list[int], gradients: list[Tensor]) -> None:
            for block, gradient in zip(blocks, gradients, strict=True):
                self.weights.parameters[block].data.sub_(gradient.mul_(steps[block]))

        return move

    @torch.no_grad()
    def _average(self) -> None:
        self.learned_steps += 1
        share = 1 / min(self.learned_steps, AVERAGED)
        for average, now in zip(self.nets.parameters(), self.moving_nets.parameters(), strict=True):
            average.lerp_(now, share)

    def state_dict(self) -> dict[str, Any]:
        return {
            "nets": self.nets.state_dict(),
            "moving_nets": self.moving_nets.state_dict(),
            "learned_steps": self.learned_steps,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nets.load_state_dict(state["nets"])
        self.moving_nets.load_state_dict(state["moving_nets"])
        self.learned_steps = state["learned_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
