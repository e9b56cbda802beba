"""What scales are worth at a point of training: where a two-point step gains, and where its noise costs.

With scales s_b = (nu sigma_b)^2, batches drawn anew and a small rate, averaged over directions z and batches,

    E[loss(theta - lr g nu sigma z)] - loss = -lr sum s_b G_b  +  lr^2 / 2 (sum s_b E_b) (sum s_b T_b)

    G_b  gain       <gradient_b of one batch, gradient_b of another>: the true gradient's squared norm
    E_b  energy     ||gradient_b of a batch||^2: G_b and the noise of the batch
    T_b  cost       trace of the loss's Hessian in the block: what moving along noise costs

All three come from two backward passes at theta +- eps z on one batch, and only numbers are kept: T_b is
<gradient_b(+) - gradient_b(-), z_b> / 2 eps (Hutchinson, random signs), E_b rides on the same read, and G_b is the
product of two batches' dots with the same noise.

The measure of scales is the divergence of where they put their noise from where there is something to gain,

    KL(w || u)     w_b = G_b / sum G      u_b = s_b D_b / sum s D          0 where s is proportional to G / D

For one step the largest decrease would be on one block.  Over a run it is not: a block that is favoured is used up.
Where the loss of each block falls with the logarithm of its own time (learning curves are about as slow as that), the
decrease under sum s T = const is largest at s ~ G / T; the number of elements D stands for T there.  Measured traces
per element are worse on three counts (bench/LOG.md): they scatter more than they differ between blocks, they are
another loss's where scales are deployed on another loss, and they are large where gains are.  T only sets rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_finetuner.block_kinds import KINDS, block_kind
from zo_finetuner.learning.streaming import LossFn, NoiseDots, Visit, Weights
from zo_kernels import Blocks, derive_seed, seed_tensor

DIST = "rademacher"  # less variance in a trace than normal noise, and a seventh of the instructions
CHECKS = 4  # further directions whose dots compare two batches
LEAST_GAIN = 0.02  # of a block's energy: estimates of its gain scatter by a quarter of that energy
LEAST_COST = 0.05  # of a block's share of the elements in the whole cost
VOCABULARY = ("embedding", "head")  # kinds of blocks with a row for every token


def divergence(gain: Tensor, numels: Tensor, s: Tensor) -> Tensor:
    """KL(w || u) of gains and numbers of elements, 0-dim >= 0, differentiable in s; all (blocks,) fp32.  Blocks with
    s = 0 take no part."""
    kept = s > 0
    gain, noise = torch.where(kept, gain, 0.0), s * numels
    w = gain / gain.sum()
    ratio = torch.where(kept, w * noise.sum() / torch.where(kept, noise, 1.0), 1.0)
    return (w * ratio.log()).sum()


@dataclass(frozen=True)
class Sample:
    """One batch's numbers.  losses: (2,), at theta +- eps z; energy, cost: (blocks,); checks: (CHECKS, blocks), dots of
    the gradient with the noise of `check_seed`."""

    losses: Tensor
    energy: Tensor
    cost: Tensor
    checks: Tensor
    check_seed: int


def sample(
    weights: Weights, loss_fn: LossFn, seed: int, check_seed: int, eps: Tensor,
    moving: Callable[[Tensor], Visit] | None = None,
) -> Sample:  # fmt: skip
    """Two backward passes on one batch, at theta + eps z and theta - eps z; theta comes back.

    moving: given the first pass's squared gradient norms (blocks,), a visitor of the second pass's gradients, which has
    them after they have been measured and may move theta."""
    at = seed_tensor(seed, weights.device)
    seeds = [seed, *(derive_seed(check_seed, 0, k) for k in range(CHECKS))]
    plus = NoiseDots(weights.blocks, seed_tensor(seeds, weights.device), DIST)
    minus = NoiseDots(weights.blocks, at.reshape(1), DIST)

    def pass_at(coef: Tensor, visit: Visit) -> Tensor:
        with weights.displaced(at, coef, dist=DIST):
            loss = loss_fn()
            weights.backward(loss, visit)
        return loss.detach().float()

    losses = [pass_at(eps, plus)]
    move = None if moving is None else moving(plus.energy)

    def measured(blocks: list[int], gradients: list[Tensor]) -> None:
        minus(blocks, gradients)
        if move is not None:
            move(blocks, gradients)

    losses.append(pass_at(-eps, measured))
    cost = (plus.dots[0] - minus.dots[0]) / (2 * eps)
    return Sample(torch.stack(losses), (plus.energy + minus.energy) / 2, cost, plus.dots[1:], check_seed)


class Mean:
    """A running mean of vectors, and of their squares.  memory: how many are remembered; None: all."""

    def __init__(self, memory: int | None = None):
        self.memory, self.count = memory, 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, value: Tensor) -> None:
        if self.mean is None:
            self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)
        self.count += 1
        share = 1 / (self.count if self.memory is None else min(self.count, self.memory))
        self.mean = self.mean + share * (value - self.mean)
        self.square = self.square + share * (value.square() - self.square)

    @property
    def error(self) -> Tensor:
        """Standard error of the mean."""
        return ((self.square - self.mean.square()).clamp(min=0) / max(self.count - 1, 1)).sqrt()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.count = state["count"]
        self.mean, self.square = (
            None if state[name] is None else state[name].to(device) for name in ("mean", "square")
        )


class Estimate:
    """Profiles from samples: gain and energy of the last ones (they change along a run), cost of all of them (it
    scatters, by more than its size in small blocks, and hardly changes)."""

    def __init__(self, memory: int | None, cost: Mean):
        """memory: samples that gain and energy remember, None for all.  cost: to go on from, and to add to."""
        self.gain, self.energy, self.cost = Mean(None if memory is None else memory // 2), Mean(memory), cost
        self.count = 0
        self._last: Sample | None = None

    def add(self, taken: Sample) -> None:
        last, self._last = self._last, taken
        self.count += 1
        self.energy.add(taken.energy)
        self.cost.add(taken.cost)
        if last is not None and last.check_seed == taken.check_seed:
            self.gain.add((last.checks * taken.checks).mean(dim=0))
            self._last = None

    def least_gain(self) -> Tensor:
        """Gains, (blocks,) fp32 > 0.  Needs two samples with one check seed."""
        return torch.maximum(self.gain.mean, LEAST_GAIN * self.energy.mean).clamp(min=1e-20)


class Layout:
    """Sizes and kinds of the blocks: what is known of their costs before any is measured."""

    def __init__(self, blocks: Blocks):
        self.numels = torch.tensor(blocks.numels, dtype=torch.float32, device=blocks.device)
        named = [block_kind(name) for name in blocks.names]
        kinds = torch.tensor([KINDS.index(kind) for kind in named], device=blocks.device)
        present = kinds.unique()
        self._members = (kinds == present[:, None]).float()  # (kinds, blocks)
        self._vocabulary = torch.tensor([kind in VOCABULARY for kind in named], device=blocks.device)

    def lasting(self, gain: Tensor) -> Tensor:
        """Gains of a classification loss, (blocks,), of which other tasks have their part: a vocabulary's, per element,
        are no more than the mean of all other blocks.  They are those of its few answers' rows; noise goes to all rows,
        and costs nothing until a loss asks for them (bench/LOG.md)."""
        if self._vocabulary.all():
            return gain
        others = torch.where(self._vocabulary, 0.0, 1.0)
        most = (gain * others).sum() / (self.numels * others).sum() * self.numels
        return torch.where(self._vocabulary, torch.minimum(gain, most), gain)

    def pooled(self, cost: Mean) -> Tensor:
        """Costs, (blocks,) fp32 > 0, from estimates that scatter: costs per element of one kind of block are drawn to
        their kind's mean, the more the less they differ for what their errors are (empirical Bayes).  Together they are
        no less than their error, so that a rate stays finite where the whole trace is not known."""
        value, variance = cost.mean / self.numels, (cost.error / self.numels).square().clamp(min=1e-30)
        weight = self._members / variance
        mean = (weight * value).sum(dim=1) / weight.sum(dim=1)
        off = value - self._members.T @ mean
        spread = (self._members * (off.square() - variance)).sum(dim=1) / self._members.sum(dim=1)
        spread = self._members.T @ spread.clamp(min=0)
        drawn = (value - off * variance / (spread + variance)) * self.numels
        least = LEAST_COST * drawn.clamp(min=0).sum() * self.numels / self.numels.sum()
        drawn = torch.maximum(drawn, least).clamp(min=1e-20)
        return drawn * (cost.error.norm() / drawn.sum()).clamp(min=1)
