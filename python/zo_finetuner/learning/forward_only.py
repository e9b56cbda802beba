"""Gradient energies and costs of a base model from forward passes alone, for models too large for any backward.

    round        one batch: l0 = f(theta), then for every group of blocks l+- = f(theta +- eps a_g z_g)
    energy G_g   mean over rounds of (l+ - l-)^2 / (2 eps a_g)^2          one direction's error: sqrt(2) of it
    cost T_g     mean over rounds of (l+ + l- - 2 l0) / (eps a_g)^2       the trace of the loss's Hessian in the group

a_g = sqrt(D / D_g), LONGEST at most, makes a probe as long as one of all blocks.  A round takes 1 + 2 groups forwards.
Within a group (one kind in a third of the depth, `block_kinds.block_groups`) every element counts the same.  Energies
are drawn to each other a little, as `optim/group_gains.py` says.  Memory: weights and a forward; theta moves in place
and comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.block_kinds import block_groups
from zo_finetuner.errors import InputError
from zo_finetuner.history import History
from zo_finetuner.learning.profile import Mean
from zo_finetuner.learning.streaming import LossFn, Weights
from zo_finetuner.optim.group_gains import GroupGains
from zo_kernels import derive_seed, seed_tensor

LONGEST = 8.0  # a_g: norms are a ten-thousandth of a large model, a hundred times eps is no small step for them


@dataclass(frozen=True)
class Measured:
    """energy: (blocks,) fp32.  losses: (2,) fp32, mean loss+ and loss-.  trace, trace_error: the Hessian's and its
    standard error, to be told from the rounding of losses.  forwards: how many it took."""

    energy: Tensor
    losses: Tensor
    trace: float
    trace_error: float
    forwards: int


def rounds_within(forwards: int, names: Sequence[str]) -> int:
    """How many whole rounds `forwards` are for blocks of these names.  Raises InputError when they are not one."""
    groups = len(block_groups(names)[1])
    least = 1 + 2 * groups
    if forwards < least:
        raise InputError(f"forwards must be at least {least} for the {groups} groups of blocks here, got {forwards}")
    return forwards // least


@torch.no_grad()
def measure_forward(
    weights: Weights, batch: Callable[[int], LossFn], cost: Mean, *, forwards: int, eps: float, seed: int
) -> Measured:
    """Whole rounds that take `forwards` at most, on batches 0, 1, ...; cost: is given every round's T, (blocks,) fp32.

    Raises InputError: what `rounds_within` raises, a loss that is not finite."""
    blocks, device = weights.blocks, weights.device
    number, labels = block_groups(blocks.names)
    rounds = rounds_within(forwards, blocks.names)
    groups = torch.tensor(number, dtype=torch.int64, device=device)
    numels = torch.tensor(blocks.numels, dtype=torch.float64, device=device)
    elements = torch.zeros(len(labels), dtype=torch.float64, device=device).index_add(0, groups, numels)
    share, lengths = numels / elements[groups], (elements.sum() / elements).sqrt().clamp(max=LONGEST)
    step, gains, seen = torch.tensor(eps, dtype=torch.float32, device=device), GroupGains(elements), []
    totals = []
    for i in range(rounds):
        loss_fn, traces = batch(i), []
        centre = loss_fn()
        for group in range(len(labels)):
            scale = torch.where(groups == group, lengths[group], 0.0).float()
            at, pair = seed_tensor(derive_seed(seed, i, group), device), []
            for coef in (step, -step):
                with weights.displaced(at, coef, scale):
                    pair.append(loss_fn())
            slope, width = (pair[0].double() - pair[1].double()) / (2 * step), lengths[group].square()
            gains.add(torch.tensor(group, device=device), slope.square() / width)
            traces.append((pair[0].double() + pair[1].double() - 2 * centre.double()) / step.double().square() / width)
            seen.append(torch.stack(pair))
        cost.add((torch.stack(traces)[groups] * share).float())
        totals.append(torch.stack(traces).sum())
    losses = torch.stack(seen).mean(dim=0).float()
    if not bool(losses.isfinite().all()):
        raise InputError(f"the base model's loss is not finite ({float(losses.mean())})")
    total = torch.stack(totals)
    error = float(total.std() / rounds**0.5) if rounds > 1 else float("inf")
    energy, taken = (gains.gains[groups] * share).float(), rounds * (1 + 2 * len(labels))
    return Measured(energy, losses, float(total.mean()), error, taken)


def history_of(losses: Tensor, blocks: int) -> History:
    """What a policy would remember of steps with these losses, (2,)."""
    history = History.start(blocks, losses.device)
    history.remember(losses)
    return history
