"""Low-rank directions for the matrices: few coordinates instead of noise, with any estimator.

    lozo        d = U V^T, V drawn every `period` steps, U every step (Chen et al., LOZO, arXiv 2410.07698, Alg. 1)
                g = (l+ - l-) / 2 eps,   theta -= lr g U V^T
    lozo-m      N = beta N + (1 - beta) g U  (first N = g U),   theta -= lr N V^T                      (Alg. 2)
                where V is redrawn, N becomes N V_old^T V_new / n
    subzero     d = sqrt(m n) / r * U Z V^T, U and V orthonormal, drawn every `period` steps (Yu et al., SubZero,
                arXiv 2410.08989),   theta -= lr g d
    es-lowrank  d_k = A_k B_k^T / sqrt(r), both drawn for every pair of members (EGGROLL, arXiv 2511.16652),
                theta -= lr sum_k g_k d_k

Other tensors (norms, biases) have dense noise; lozo-m has their momentum in full.  The weights are not written between
two subspaces (`lowrank.py`); es-lowrank writes them when the collected rank exceeds `limit`.

State: V of the matrices, sum n r numbers (lozo-m: and sum m r, and one per other element; subzero: sum (m + n) r); what
is collected, sum m r (subzero: r^2 a matrix; es-lowrank: sum (m + n) limit).  Forwards per step: 2, es-lowrank 8.

Deviations.  lozo: U is a function of the step's seed and the tensor, so an update cannot draw another U than its probe;
the published code does on every step that redraws V.  As in that code, g U V^T is not divided by r.  subzero: LoRA's
matrices keep their shape (the code makes them square first).  es-lowrank: losses are not made z-scores.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Probe, StepContext, Update
from zo_finetuner.optim.composed import Composed
from zo_finetuner.optim.directions import Direction
from zo_finetuner.optim.estimators import Estimate
from zo_finetuner.optim.forward_grad import ExactSlope
from zo_finetuner.optim.rules import SGD, Sign
from zo_finetuner.optim.sparse import Small
from zo_finetuner.subspace import Held, Layout, Subspace
from zo_kernels import Blocks, Form


@dataclass
class LowRank(Composed):
    """rank: r.  period: steps of a subspace; 0: one of its own for every direction, which is then divided by sqrt(r).
    two_sided: as SubZero.  limit: with period 0 the rank that may be collected before it is merged (0: that of one
    subspace); a side product of rank k costs about k (1/m + 1/n) of a forward, a merge one pass over the weights."""

    name: str = "low-rank"
    rank: int = 2
    period: int = 50
    two_sided: bool = False
    limit: int = 0

    low_rank = True
    whole_only = "its factors are of whole matrices"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("period", "limit"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.period and self.limit:
            raise InputError(f"{self.name}: limit goes with period 0; what is collected in a lasting subspace has its "
                             f"rank")
        scalar = isinstance(self.rule, Sign) and self.rule.sign == "scalar"
        if self.rule.kernel and not scalar:
            raise InputError(f"{self.name} does not go with the rule {self.rule.kernel}: it keeps a state or looks at "
                             f"the step of every weight, and low-rank steps are not written out")
        if isinstance(self.estimator, ExactSlope):
            raise InputError(f"{self.name} does not go with the estimator slope: it differentiates along dense noise")
        if isinstance(self.subset, Small):
            raise InputError(f"{self.name} does not go with the subset small: a masked product has no low rank")

    @property
    def uniform(self) -> bool:
        """With subspaces of their own for all directions, a step merges or does not, by what is collected."""
        return bool(self.period)

    @property
    def directions(self) -> int:
        return self.estimator.directions + bool(self.period)  # the last one's seed is a subspace's

    @property
    def factor_bytes(self) -> int:
        matrices, r = self._layout.matrices, self.rank
        if not self.period:
            return 4 * sum((x.m + x.n) * self._layout.limit for x in matrices)
        return 4 * (sum(x.n * r + self.two_sided * x.m * r for x in matrices) + sum(self._layout.sizes))

    @property
    def merges_per_step(self) -> float:
        """Passes over the weights: one for each subspace, or whenever the limit is reached."""
        if self.period:
            return 1 / self.period
        return 1 / max(1, -(-self.limit // (self.rank * self.estimator.directions)))

    def start(self, blocks: Blocks) -> None:
        super().start(blocks)
        gain = 1.0 if self.period else self.rank**-0.5
        self._layout = Layout(blocks, self.rank, self.two_sided, gain, self.limit or self.rank)
        self._seed = torch.zeros((), dtype=torch.int64, device=blocks.device)
        self._subspace: Subspace | None = None
        self._began = -1  # step of this subspace

    def turns(self, step: int) -> bool:
        fresh = self._subspace is None or step % max(self.period, 1) == 0
        return bool(self.period) and fresh and step != self._began

    def turn(self, context: StepContext) -> None:
        self._seed.copy_(context.seed(self.estimator.directions))
        self._began = context.step
        self._enter(Subspace(self._layout, self._seed, lasting=True))

    def _enter(self, subspace: Subspace) -> None:
        if self._subspace is None:
            self._subspace = subspace
        else:
            self._subspace.become(subspace)

    def draw(self, context: StepContext, form: Form | None = None) -> list[Direction]:
        drawn = super().draw(context, form)[: self.estimator.directions]
        return [
            dataclasses.replace(d, subspace=self._subspace if self.period else Subspace(self._layout, d.seed))
            for d in drawn
        ]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "subspace": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.period:
            LowRank._enter(self, Subspace(self._layout, self._seed, lasting=True))


@dataclass
class LowRankMomentum(LowRank):
    """Momentum in the coordinates."""

    name: str = "lozo-m"
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.rule) is not SGD:
            raise InputError(f"{self.name} takes no rule: its momentum is the rule")
        if not 0 <= self.beta < 1:
            raise InputError(f"beta must be at least 0 and below 1, got {self.beta}")
        if not self.period or self.two_sided:
            raise InputError(f"{self.name} needs one-sided directions with a period: its momentum moves along them")

    def start(self, blocks: Blocks) -> None:
        super().start(blocks)
        others = sum(other.numel for other in self._layout.others)
        shapes = {"momentum": (sum(self._layout.sizes),), "dense": (others,), "started": ()}
        self.memory = {n: torch.zeros(s, dtype=torch.float32, device=blocks.device) for n, s in shapes.items()}

    def _enter(self, subspace: Subspace) -> None:
        if self._subspace is not None:
            momentum = self.memory["momentum"]
            momentum.copy_(self._subspace.expressed_in(momentum, subspace))
        super()._enter(subspace)

    def tell(self, losses: Tensor) -> Update | list[Probe]:
        estimate = self.estimator.tell(losses)
        if not isinstance(estimate, Estimate):
            return estimate
        self.scales.remember(estimate.pair)
        momentum, dense, started = self.memory.values()
        momentum.mul_(self.beta), dense.mul_(self.beta)
        share = torch.where(started > 0, 1 - self.beta, 1.0)
        for d, g in estimate.terms:
            step = torch.where(g.isfinite(), share * g, 0.0)  # a skipped step moves by 0 times the momentum
            momentum.addcmul_(d.coordinates, step)
            dense.addcmul_(self._layout.draw_others(d.seed, d.scale, d.dist), step)
        started.fill_(1.0)
        return Update([(Held(self._subspace, momentum, dense), -self._context.lr)], estimate.loss,
                      estimate.projected_grad)  # fmt: skip
