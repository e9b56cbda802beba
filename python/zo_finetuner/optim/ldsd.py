"""LDSD: a direction policy N(mu, std^2) whose mean is learned (learnable direction sampling).

    z_j = mu + std xi_j, j < K candidates:   f_j = f(theta + eps z_j);   * = argmin f_j
    g = (f_* - f(theta - eps z_*)) / 2 eps;  theta by a rule with g z_* for a gradient
    a_j = f_j - mean of the other f;         mu <- mu - mean_lr / (K std) sum_j a_j xi_j

Variants: ldsd-sgd, ldsd-adamm, ldsd-jaguar (sign of an average of g z_*).  State: mu, 1 P in `mean_dtype` (fp32, or
bf16 rounded stochastically), and the rule's (0, 3 P, 1 P).  Forwards per step: K + 1 (published: f_* twice, K + 2).
Where the rule has no state, theta and an fp32 mu are moved in one pass (`update.py`).  With scales s_b, xi is s_b xi,
and mu is moved by the natural gradient.  Source: LDSD's code and scripts (K 5, std 1, mean_lr 4e-2, cosine to .1 of lr
1e-3 on LoRA).
Deviations: mu is moved with the very directions that were evaluated; the published code regenerates them from the best
candidate's continuing stream, so that its mu is a random walk (cosine with the gradient 0 instead of -.95).
JAGUAR: mu starts at zero and all tensors take part; the published code perturbs another random tenth of the tensors
for each candidate, starts from a random unit vector that outweighs the noise, and moves unselected tensors too.
a_j is about eps std |gradient|: with the published rates mu stays far below std, and what is left is the choice of
the best candidate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from zo_finetuner.errors import InputError, nearest, require_not_negative, require_positive
from zo_finetuner.optim.base import Part, Probe, StepContext, Update
from zo_finetuner.optim.composed import Directed
from zo_finetuner.optim.directions import Direction, chosen
from zo_finetuner.optim.estimators import Estimate
from zo_finetuner.optim.rules import SGD, Rule
from zo_finetuner.optim.state import DTYPES, new_states
from zo_kernels import Blocks, shifted


@dataclass
class LDSD(Directed):
    """candidates: K.  std: of the policy.  mean_lr: rate of its mean."""

    name: str = "ldsd"
    rule: Rule = field(default_factory=SGD)
    candidates: int = 5
    std: float = 1.0
    mean_lr: float = 4e-2
    mean_dtype: str = "float32"

    fixed = {
        "estimator": "the mean is learned from its own candidates",
        "subset": "its mean is one of all weights",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 2:
            raise InputError(f"candidates must be at least 2, got {self.candidates}: the baseline of a candidate is "
                             f"the mean of the others")
        require_positive("std", self.std)
        require_not_negative("mean_lr", self.mean_lr)
        if self.mean_dtype not in DTYPES:
            raise InputError(f'mean_dtype must be {" or ".join(DTYPES)}, got "{self.mean_dtype}"'
                             f"{nearest(self.mean_dtype, DTYPES)}")

    @property
    def parts(self) -> dict[str, Part]:
        return {"scales": self.scales, "rule": self.rule}

    @property
    def directions(self) -> int:
        return self.candidates

    @property
    def forwards(self) -> int:
        return self.candidates + 1

    def start(self, blocks: Blocks) -> None:
        super().start(blocks)
        self.states = new_states(blocks, ("mu",), self.name, dtype=DTYPES[self.mean_dtype])
        ids = dict(zip(blocks.names, blocks.ids, strict=True))
        self._mean = Blocks(zip(blocks.names, self.states["mu"], strict=True), ids, blocks.offsets)
        self._form = shifted(self.states["mu"], None)
        self._std = torch.full((len(blocks),), self.std, dtype=torch.float32, device=blocks.device)

    def ask(self, context: StepContext) -> list[Probe]:
        directions = self.draw(context, self._form)
        scale = self._std if directions[0].scale is None else directions[0].scale * self.std
        self._candidates, self._losses = [replace(direction, scale=scale) for direction in directions], None
        return [Probe(direction, context.eps) for direction in self._candidates]

    def tell(self, losses: Tensor) -> Update | list[Probe]:
        if self._losses is None:
            self._losses = losses
            self._star = chosen(self._candidates, losses.argmin())
            return [Probe(self._star, -self._context.eps)]
        pair = torch.stack((self._losses.min(), losses[0]))
        g = (pair[0] - pair[1]) / (2 * self._context.eps)
        self.scales.remember(pair)
        update = self.rule.update(Estimate.of([(self._star, g)], self._losses.mean(), g, pair), self._context)
        return replace(update, mean=(self._mean, self._mean_terms()))

    def _mean_terms(self) -> list[tuple[Direction, Tensor]]:
        """Natural gradient of E f: the candidates' scale is std, so the rate is divided by std^2."""
        above = (self._losses - self._losses.mean()) * (self.candidates / (self.candidates - 1))
        coefs = above * (-self.mean_lr / (self.candidates * self.std**2))
        return [(replace(d, form=None), coef) for d, coef in zip(self._candidates, coefs, strict=True)]
