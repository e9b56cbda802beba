"""A small problem whose gradient is known, and its dense numpy twin: z materialised, everything in float64.

    f_t(theta) = 1/2 theta' diag(h) theta + (b + s_t)' theta          three blocks, another slope s_t at every step
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from zo_finetuner.engine import Engine
from zo_kernels import derive_seed, draw_noise, seed_tensor, tensor_ids

SHAPES = {"embed": (5, 4), "k_proj": (6, 3), "bias": (7,)}
SIZE = 45
EPS, LR, SEED = 0.1, 0.02, 3  # a loss near 20 has an ulp of 1.9e-6: g is off by some 1e-5, theta by some 1e-6


class Problem(nn.Module):
    """seen: the weights that every evaluation of the loss has met, flat, float64."""

    def __init__(self, curvature: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.h = curvature * (torch.rand(SIZE, generator=generator, dtype=torch.float64) + 0.5)
        self.b = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.slopes = torch.randn(16, SIZE, generator=generator, dtype=torch.float64)
        self.step, self.seen = 0, []

    def theta(self) -> torch.Tensor:
        return torch.cat([parameter.flatten() for parameter in self.parameters()]).double()

    def forward(self) -> torch.Tensor:
        theta = self.theta()
        self.seen.append(theta.detach())
        return (0.5 * self.h * theta * theta + (self.b + self.slopes[self.step]) * theta).sum()

    def gradient(self) -> torch.Tensor:
        return (self.h * self.theta() + self.b + self.slopes[self.step]).detach()


def run(engine: Engine, steps: int = 1, lr: float = LR) -> None:
    """Steps of an engine on its Problem, each on its own slope."""
    for _ in range(steps):
        engine.model.step = engine.step_count
        engine.step(engine.model, lr)


def places() -> dict[str, slice]:
    """Where each block lies in a flat theta."""
    found, start = {}, 0
    for name, shape in SHAPES.items():
        found[name] = slice(start, start + int(np.prod(shape)))
        start = found[name].stop
    return found


class Dense:
    """A problem in numpy: theta (45,), f and its gradient at step t, z of a seed or of direction k of step t."""

    def __init__(
        self, model: Problem, scale: dict[str, float] | None = None, dist: str = "normal", lr: float = LR
    ):  # fmt: skip
        self.theta = model.theta().detach().numpy().copy()
        self.start = self.theta.copy()
        self.h, self.b, self.slopes = model.h.numpy(), model.b.numpy(), model.slopes.numpy()
        self.scale, self.dist, self.lr, self.t = scale or {}, dist, lr, 0
        self.ids = tensor_ids(SHAPES)

    def f(self, theta: np.ndarray) -> float:
        return float(np.sum(0.5 * self.h * theta**2 + (self.b + self.slopes[self.t]) * theta))

    def gradient(self) -> np.ndarray:
        return self.h * self.theta + self.b + self.slopes[self.t]

    def seed(self, k: int = 0) -> int:
        return derive_seed(SEED, self.t, k)

    def z(self, k: int = 0, seed: int | None = None) -> np.ndarray:
        """Scaled noise of direction k of this step, or of a seed."""
        place = seed_tensor(self.seed(k) if seed is None else seed)
        parts = [
            self.scale.get(name, 1.0) * draw_noise(shape, place, self.ids[name], dist=self.dist).flatten().numpy()
            for name, shape in SHAPES.items()
        ]
        return np.concatenate(parts).astype(np.float64)
