"""Low-rank directions for the matrices: any method of seeds and coefficients, with few coordinates instead of noise.

    lozo        d = U V^T, V drawn every `period` steps, U every step (Chen et al., LOZO, arXiv 2410.07698, Alg. 1)
                g = (l+ - l-) / 2 eps,   theta -= lr g U V^T
    lozo-m      N = beta N + (1 - beta) g U  (first N = g U),   theta -= lr N V^T                      (Alg. 2)
                where V is redrawn, N becomes N V_old^T V_new / n
    subzero     d = sqrt(m n) / r * U Z V^T, U and V orthonormal, drawn every `period` steps (Yu et al., SubZero,
                arXiv 2410.08989),   theta -= lr g d
    es-lowrank  d_k = A_k B_k^T / sqrt(r) of N members (EGGROLL, arXiv 2511.16652),   theta -= lr sum_k g_k d_k

Other tensors (norms, biases) have dense noise; lozo-m has their momentum in full.  The weights are not written between
two subspaces (`lowrank.py`); es-lowrank writes them when the collected rank exceeds `limit`.

State: V of the matrices, sum n r numbers (lozo-m: and sum m r, and one per other element; subzero: sum (m + n) r); what
is collected, sum m r (subzero: r^2 a matrix; es-lowrank: sum (m + n) limit).  Forwards per step: 2; es-lowrank N.

Deviations.  lozo: U is a function of the step's seed and the tensor, so an update cannot draw another U than its probe;
the published code does on every step that redraws V.  As in that code, g U V^T is not divided by r.  subzero: LoRA's
matrices keep their shape (the code makes them square first).  es-lowrank: coefficients are those of the estimator, not
z-scores of the losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update
from zo_finetuner.optim.es import ES
from zo_finetuner.optim.learned import make_finetuner
from zo_finetuner.optim.mezo import MeZO
from zo_finetuner.params import trainable_blocks
from zo_finetuner.subspace import Held, Layout, Subspace
from zo_kernels import Blocks


@dataclass
class LowRank(Method):
    """inner: the method whose directions get subspaces; its scales stay (they multiply the product of a block).
    period: steps of a subspace, 0 for one of its own for every direction."""

    rank: int = 2
    period: int = 50
    inner: Method = field(default_factory=MeZO)

    low_rank = True

    def __post_init__(self) -> None:
        if self.period < 0:
            raise InputError(f"period must be at least 1 step, got {self.period}")
        self._layout: Layout | None = None
        self._subspace: Subspace | None = None
        self._seed: Tensor | None = None  # of that subspace
        self._factored: dict[Direction, Direction] = {}

    @property
    def forwards(self) -> int:
        return self.inner.forwards

    @property
    def directions(self) -> int:
        return self.inner.directions + bool(self.period)  # the last one's seed is a subspace's

    def layout(self, blocks: Blocks) -> Layout:
        return Layout(blocks, self.rank, limit=self.rank)

    def prepare(self, blocks: Blocks) -> None:
        self.inner.prepare(blocks)
        self._layout = self.layout(blocks)

    def ask(self, context: StepContext) -> list[Probe]:
        if self.period and (self._subspace is None or context.step % self.period == 0):
            self._enter(context.seed(self.directions - 1).clone())
        self._factored.clear()
        request = self._low_rank(self.inner.ask(context))
        self.metrics, self._context = self.inner.metrics, context
        return request

    def tell(self, losses: Tensor) -> Update | list[Probe]:
        return self._low_rank(self.inner.tell(losses))

    def _enter(self, seed: Tensor) -> None:
        self._seed, self._subspace = seed, Subspace(self._layout, seed)

    def _low_rank(self, request: Update | list[Probe]) -> Update | list[Probe]:
        if isinstance(request, Update):
            return dataclasses.replace(request, terms=[(self._factor(d), coef) for d, coef in request.terms])
        return [dataclasses.replace(probe, direction=self._factor(probe.direction)) for probe in request]

    def _factor(self, direction: Direction) -> Direction:
        if direction not in self._factored:
            subspace = self._subspace if self.period else Subspace(self._layout, direction.seed)
            self._factored[direction] = dataclasses.replace(direction, subspace=subspace)
        return self._factored[direction]

    def state_dict(self) -> dict[str, Any]:
        seed = {} if self._seed is None else {"subspace": self._seed}
        return {**seed, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "subspace" in state:
            self._enter(state["subspace"].to(self._layout.device))
        self.inner.load_state_dict(state["inner"])


@dataclass
class LOZO(LowRank):
    name: str = "lozo"


@dataclass
class LOZOMomentum(LowRank):
    """inner: a two-point method."""

    name: str = "lozo-m"
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < 1:
            raise InputError(f"beta must be at least 0 and below 1, got {self.beta}")

    def prepare(self, blocks: Blocks) -> None:
        super().prepare(blocks)
        others = sum(other.numel for other in self._layout.others)
        self.momentum, self.dense, self.started = (
            torch.zeros(shape, dtype=torch.float32, device=blocks.device)
            for shape in ((sum(self._layout.sizes),), (others,), ())
        )

    def ask(self, context: StepContext) -> list[Probe]:
        before = self._subspace
        request = super().ask(context)
        if before is not None and before is not self._subspace:
            self.momentum.copy_(before.expressed_in(self.momentum, self._subspace))
        return request

    def tell(self, losses: Tensor) -> Update:
        update = super().tell(losses)
        ((direction, _),) = update.terms
        finite = torch.isfinite(losses).all()
        share = torch.where(self.started > 0, 1 - self.beta, 1.0)
        dense = self._layout.draw_others(direction.seed, direction.scale, direction.dist)
        for momentum, d in ((self.momentum, direction.coordinates), (self.dense, dense)):
            new = self.beta * momentum + share * update.projected_grad * d
            momentum.copy_(torch.where(finite, new, momentum))  # not in place: 0 * NaN is NaN
        self.started.copy_(torch.where(finite, 1.0, self.started))
        held = Held(self._subspace, self.momentum, self.dense)
        return dataclasses.replace(update, terms=[(held, -self._context.lr)])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "momentum": self.momentum, "dense": self.dense, "started": self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in ("momentum", "dense", "started"):
            getattr(self, name).copy_(state[name])


@dataclass
class SubZero(LowRank):
    name: str = "subzero"
    rank: int = 8
    period: int = 1000

    def layout(self, blocks: Blocks) -> Layout:
        return Layout(blocks, self.rank, two_sided=True, limit=self.rank)


@dataclass
class LowRankES(LowRank):
    """limit: the rank that may be collected before it is merged.  A side product of rank k costs about k (1/m + 1/n) of
    a forward, a merge one pass over the weights."""

    name: str = "es-lowrank"
    rank: int = 1
    period: int = 0
    inner: Method = field(default_factory=ES)
    limit: int = 16

    def layout(self, blocks: Blocks) -> Layout:
        return Layout(blocks, self.rank, gain=self.rank**-0.5, limit=self.limit)


def make_low_rank(
    kind: type[LowRank], model: nn.Module, *, pertnn: Any, dist: str, settings: Mapping[str, Any], **arguments: Any
) -> LowRank:
    """settings: fields of the kind, and of ES for its members.  pertnn: nets whose scales multiply each block's
    product."""
    own, rest = dict(settings), {}
    if kind is LowRankES:
        rest = {name: own.pop(name) for name in ("members", "antithetic") if name in own}
        inner: Method = ES(dist=dist, **rest)
    elif pertnn is None:
        inner = MeZO(dist=dist)
    else:
        inner = make_finetuner(model, pertnn=pertnn, dist=dist, **arguments)
    known = [f.name for f in dataclasses.fields(kind) if f.init and f.name not in ("name", "inner")]
    for name in own:
        if name not in known:
            raise InputError(f'{kind.name} has no setting "{name}"{nearest(name, known)}; it has: {", ".join(known)}')
    method = kind(inner=inner, **own)
    method.prepare(trainable_blocks(model))
    return method
