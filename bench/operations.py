"""The ops as they are measured: arguments like a step's, and the elements that each must read and write.

`list_calls` are passes over the parameters of a model, one call each; `tensor_calls` work on single tensors, as the
scratch of a forward does.  `mezo_calls` is the torch provider, the order of operations of MeZO's code:

    perturb   z = torch.normal(...); p.data = p.data + scaling_factor * z * eps
    update    z = torch.normal(...); p.data = p.data - lr * (projected_grad * z)    (weight decay 0 left out)
    stats     p.data.mean(), p.data.var(), which is all that the ZO Fine-tuner asks for
    dot       z = torch.normal(...); (p.data * z).sum()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_kernels import Blocks, block_stats, dot_noise, perturb_, scratch, seed_tensor, update_, update_scratch_

EPS, RATE, GRADIENT = 1e-3, 1e-6, 0.3
TENSOR_ID = 7

# Share of a same-traffic copy's bandwidth that a GPU has to reach; of read bandwidth for `stats`, which writes nothing.
TARGETS = {"perturb": 0.95, "scratch": 0.95, "update": 0.90, "two-noise": 0.85, "stats": 0.90}
PAIRS = {"two scratches": "mirror stochastic", "update, scratch": "update scratch"}  # two calls -> the one instead
LARGE = 100e6  # bytes of a tensor from which the target of `scratch` counts


class Call(NamedTuple):
    run: Callable[[], object]
    accesses: int  # elements read plus elements written, per element of theta
    states: int = 0  # fp32 numbers per element of theta that are read and written besides

    @property
    def floor(self) -> str:
        """Which bandwidth bounds it."""
        return "read" if self.accesses == 1 else "copy"


def list_calls(blocks: Blocks) -> dict[str, Call]:
    """One pass over all blocks.  `update` rounds stochastically, `two-noise` (way back, update and next perturbation
    of weights that are probed in place; scales per direction) to nearest."""
    device = blocks.device
    seed, rounding = seed_tensor(5, device), seed_tensor(6, device)
    one, two = seed_tensor([5], device), seed_tensor([5, 8], device)
    eps, coef = torch.tensor(EPS, device=device), torch.tensor([-RATE * GRADIENT], device=device)
    coefs = torch.tensor([-EPS - RATE * GRADIENT, EPS], device=device)
    scale = torch.linspace(0.5, 2, len(blocks), device=device)
    scales = torch.stack([scale, scale.flip(0)])

    def update(dist: str = "normal", stats: bool = False) -> object:
        return update_(blocks, one, coef, scale, rounding_seed=rounding, dist=dist, stats=stats)

    return {
        "perturb": Call(lambda: perturb_(blocks, seed, eps, scale), 2),
        "update": Call(update, 2),
        "two-noise": Call(lambda: update_(blocks, two, coefs, scales), 2),
        "stats": Call(lambda: block_stats(blocks), 1),
        "update stats": Call(lambda: update(stats=True), 2),
        "dot": Call(lambda: dot_noise(blocks, one), 1),
        "dot stats": Call(lambda: dot_noise(blocks, one, stats=True), 1),
        "perturb rademacher": Call(lambda: perturb_(blocks, seed, eps, scale, dist="rademacher"), 2),
        "update rademacher": Call(lambda: update("rademacher"), 2),
        "two-noise rademacher": Call(lambda: update_(blocks, two, coefs, scales, dist="rademacher"), 2),
        "dot rademacher": Call(lambda: dot_noise(blocks, one, dist="rademacher"), 1),
    }


class Tensors(NamedTuple):
    """Weights of one parameter and the buffers of its two signs."""

    theta: Tensor
    out: Tensor
    mirror: Tensor


def tensor_calls(sets: Sequence[Tensors]) -> dict[str, Call]:
    """The same op on every set in turn.  `stochastic`: the threshold is above the step, so 16-bit results are rounded
    stochastically; the others have no threshold.  `two scratches` and `update, scratch` are what `mirror` and
    `update scratch` replace."""
    device = sets[0].theta.device
    seed, following, rounding = (seed_tensor(s, device) for s in (5, 8, 6))
    one, coef = seed_tensor([5], device), torch.tensor([-RATE * GRADIENT], device=device)
    eps, minus, above = (torch.tensor(value, device=device) for value in (EPS, -EPS, 1.0))
    scale = torch.tensor(0.8, device=device)
    vector = scale.reshape(1)
    blocks = [Blocks([("theta", tensors.theta)], ids={"theta": TENSOR_ID}) for tensors in sets]

    def probe(t: Tensors, sign: Tensor = eps, mirror: Tensor | None = None, **options) -> None:
        scratch(t.theta, t.out, TENSOR_ID, seed, sign, scale, mirror=mirror, **options)

    def fused(t: Tensors, mirror: Tensor | None = None) -> None:
        update_scratch_(
            t.theta, t.out, TENSOR_ID, one, coef, scale, following, eps, scale,
            mirror=mirror, rounding_seed=rounding, nearest_above=above,
        )  # fmt: skip

    def unfused() -> None:
        for block, t in zip(blocks, sets, strict=True):
            update_(block, one, coef, vector, rounding_seed=rounding)
            scratch(t.theta, t.out, TENSOR_ID, following, eps, scale, nearest_above=above)

    def each(op: Callable[..., None], accesses: int, mirrored: bool = False, **options) -> Call:
        def run() -> None:
            for t in sets:
                op(t, mirror=t.mirror if mirrored else None, **options)

        return Call(run, accesses)

    def both() -> None:
        for t in sets:
            probe(t, nearest_above=above)
            probe(t, minus, nearest_above=above)

    return {
        "scratch": each(probe, 2),
        "scratch stochastic": each(probe, 2, nearest_above=above),
        "mirror": each(probe, 3, mirrored=True),
        "mirror stochastic": each(probe, 3, mirrored=True, nearest_above=above),
        "two scratches": Call(both, 4),
        "update scratch": each(fused, 3),
        "update mirror": each(fused, 4, mirrored=True),
        "update, scratch": Call(unfused, 4),
        "scratch rademacher": each(probe, 2, dist="rademacher"),
        "mirror rademacher": each(probe, 3, mirrored=True, dist="rademacher"),
    }


def mezo_calls(parameters: Sequence[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
    """torch's operators, one tensor after the other."""

    def normal(p: Tensor) -> Tensor:
        return torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)

    def perturb() -> None:
        for p in parameters:
            p.data = p.data + 1.0 * normal(p) * EPS

    def update() -> None:
        for p in parameters:
            p.data = p.data - RATE * (GRADIENT * normal(p))

    return {
        "perturb": perturb,
        "update": update,
        "stats": lambda: [(p.data.mean(), p.data.var()) for p in parameters],
        "dot": lambda: [(p.data * normal(p)).sum() for p in parameters],
    }
