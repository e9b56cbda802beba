"""BSZO: the gradient in the span of k directions, by Bayesian regression on one-sided differences.

    prior    mu = 0, variances p = sigma_p^2 = d / 10^6 on each of k directions, anew at every step
    sample   y = (f(theta + eps z_j) - f(theta)) / eps;   r = y - mu_j
             noise = max(.9 noise + .1 r^2, .01 sigma_p^2);   K = p_j / (p_j + noise);   mu_j += K r;   p_j -= K p_j
    update   gradient ~ sum mu_j z_j

The first k samples take the directions in turn; the others the direction of largest variance, from its other side:
y = (f(theta) - f(theta - eps z_j)) / eps.  (Samples along axes keep the covariance diagonal, so its top eigenvector is
an axis.)  State: the noise, one number.  Forwards per step: 1 + samples (4).  Source: BSZO's code, k 2, 3 samples.
In effect two one-sided estimates, each shrunk by sigma_p^2 / (sigma_p^2 + average of y^2): a soft clip.
Deviation: the published code (v3) takes the cached y of that direction for its third sample, which counts one
observation as two independent ones; compat "reference" does so, and takes one forward less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Probe, StepContext
from zo_finetuner.optim.directions import Direction, chosen, pick
from zo_finetuner.optim.estimators import Estimate, Estimator
from zo_kernels import Blocks


@dataclass
class Bayesian(Estimator):
    """probes: k.  samples: of the regression, k to 2 k."""

    probes: int = 2
    samples: int = 3
    compat: str = "intended"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.probes <= self.samples <= 2 * self.probes:
            raise InputError(f"samples must be between probes ({self.probes}) and twice that, got {self.samples}: a "
                             f"direction has two sides")
        if self.compat not in ("intended", "reference"):
            raise InputError(f'compat must be "intended" or "reference", got "{self.compat}"')

    @property
    def forwards(self) -> int:
        return 1 + (self.samples if self.compat == "intended" else self.probes)

    def start(self, blocks: Blocks) -> None:
        self._prior = torch.full((), sum(blocks.whole) / 1e6, dtype=torch.float32, device=blocks.device)
        self.memory["noise"] = self._prior.clone()

    def ask(self, directions: list[Direction], context: StepContext) -> list[Probe]:
        self._directions, self._eps, self._left = directions, context.eps, self.samples - self.probes
        self._mean = torch.zeros(self.probes, dtype=torch.float32, device=context.eps.device)
        self._variance = self._prior.expand(self.probes).clone()
        self._axis = self._center = None
        return [Probe(None), *(Probe(direction, context.eps) for direction in directions)]

    def tell(self, losses: Tensor) -> Estimate | list[Probe]:
        if self._center is None:
            self._center, self._slopes = losses[0], (losses[1:] - losses[0]) / self._eps
            axes = torch.arange(self.probes, device=losses.device)
            for axis, slope in zip(axes, self._slopes, strict=True):
                self._observe(axis, slope)
        else:
            self._observe(self._axis, (self._center - losses[0]) / self._eps)
        while self._left:
            self._left -= 1
            self._axis = self._variance.argmax()
            if self.compat == "reference":
                self._observe(self._axis, pick(self._slopes, self._axis))
                continue
            return [Probe(chosen(self._directions, self._axis), -self._eps)]
        return Estimate.of(list(zip(self._directions, self._mean, strict=True)), self._center)

    def _observe(self, axis: Tensor, slope: Tensor) -> None:
        noise, here = self.memory["noise"], axis == torch.arange(self.probes, device=axis.device)
        residual = slope - pick(self._mean, axis)
        noise.copy_(torch.maximum(0.9 * noise + 0.1 * residual.square(), 0.01 * self._prior))
        gain = torch.where(here, self._variance / (self._variance + noise), 0.0)
        self._mean = self._mean + gain * residual
        self._variance = self._variance - gain * self._variance + 1e-10
