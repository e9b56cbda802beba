"""Evolution strategies: an average over a population of N members, each a forward.

    antithetic   pairs +-z_k, k = 1 .. N/2:   g_k = (f(theta + eps z_k) - f(theta - eps z_k)) / (eps N)
    mean         z_k, k = 1 .. N:             g_k = (f(theta + eps z_k) - mean) / (eps (N - 1))
    theta -= lr sum_k g_k z_k

Both estimate the gradient: the second with the mean of the population as baseline, which is N / (N - 1) times too
small a distance from the mean of the other members.  State: none.  Forwards per step: N.
Source: Salimans et al., arXiv 1703.03864; deviation: losses are not ranked or made z-scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update


@dataclass
class ES(Method):
    """members: N, at least 2; even where they are antithetic."""

    members: int = 8
    antithetic: bool = True
    dist: str = "normal"

    name = "es"

    def __post_init__(self) -> None:
        if self.members < 2:
            raise InputError(f"members must be at least 2, got {self.members}: each is compared with the others")
        if self.antithetic and self.members % 2:
            raise InputError(f"members must be even, got {self.members}: antithetic members come in pairs")

    @property
    def forwards(self) -> int:
        return self.members

    @property
    def directions(self) -> int:
        return self.members // 2 if self.antithetic else self.members

    def ask(self, context: StepContext) -> list[Probe]:
        self._context = context
        self._directions = [Direction(context.seed(k), dist=self.dist) for k in range(self.directions)]
        signs = (context.eps, -context.eps) if self.antithetic else (context.eps,)
        return [Probe(direction, coef) for direction in self._directions for coef in signs]

    def tell(self, losses: Tensor) -> Update:
        eps, lr = self._context.eps, self._context.lr
        if self.antithetic:
            plus, minus = losses.view(-1, 2).unbind(1)
            g = (plus - minus) / (eps * self.members)
        else:
            g = (losses - losses.mean()) / (eps * (self.members - 1))
        terms = list(zip(self._directions, (-lr * g).unbind(), strict=True))
        return Update(terms, losses.mean(), torch.linalg.vector_norm(g))
