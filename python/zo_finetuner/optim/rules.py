"""Update rules: what is done with an estimate of the gradient, e = sum_k g_k d_k.                       state

    sgd          theta -= lr e                                                                              0
    sign         theta -= lr sum_k sign(g_k) d_k / K             or, elementwise, lr sign(e)                0
    normalized   theta -= lr e / a,  a^2 an average of sum g_k^2 over the steps, bias corrected             1 number
    momentum     m = beta m + e;  theta -= lr m                                                             1 P
    adam         m, v averages of e, e^2;  theta -= lr (m/c1) / (sqrt(v/c2) + adam_eps)                     2 P
    adamm        without bias correction, v the largest so far                                              3 P
    sign-ema     m = beta m + (1 - beta) e;  theta -= lr sign(m)                                            1 P

P: an fp32 tensor like the weights.  The equations to the last rounding, and the pass that makes them, are those of
`zo_kernels.rules`.  Sources: Liu et al. 2019 (sign), Zhang et al., arXiv 2402.11592 (ZO-Bench: momentum, Adam, sign),
Chen et al. 2019 (AdaMM), LDSD's code (AdaMM without bias correction, its adam_eps of 1e-10; JAGUAR).

Adam's v is nearly one number for all coordinates, since E (g z_j)^2 = |gradient|^2 + 2 (gradient_j)^2: what it does is
to divide by an average of |g|, which `normalized` does without a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError, require_not_negative
from zo_finetuner.optim.base import Part, RuleStep, StepContext, Update
from zo_finetuner.optim.estimators import Estimate, ratio
from zo_finetuner.optim.state import new_states
from zo_kernels import RULES as KERNELS
from zo_kernels import Blocks


@dataclass
class Rule(Part):
    """kernel: the rule of `zo_kernels` whose states it keeps, "" for none.  constants: its numbers after lr."""

    kernel = ""

    def start(self, blocks: Blocks) -> None:
        if self.kernel:
            self.states = new_states(blocks, KERNELS[self.kernel].states, self.kernel)
        self._constants = torch.tensor(self.constants, dtype=torch.float32, device=blocks.device)

    @property
    def constants(self) -> tuple[float, ...]:
        return ()

    def numbers(self, lr: Tensor) -> Tensor:
        return torch.cat((lr.reshape(1), self._constants))

    def update(self, estimate: Estimate, context: StepContext) -> Update:
        by = RuleStep(self.kernel, list(self.states.values()), self.numbers(context.lr))
        return Update(estimate.terms, estimate.loss, estimate.projected_grad, by)


def moved(estimate: Estimate, coefs: list[Tensor]) -> Update:
    """An update along the directions of an estimate."""
    terms = [(direction, coef) for (direction, _), coef in zip(estimate.terms, coefs, strict=True)]
    return Update(terms, estimate.loss, estimate.projected_grad)


@dataclass
class SGD(Rule):
    def update(self, estimate: Estimate, context: StepContext) -> Update:
        return moved(estimate, [-context.lr * g for _, g in estimate.terms])


@dataclass
class Sign(Rule):
    """sign: "scalar" keeps z and takes the sign of its coefficient, "elementwise" that of every coordinate of e."""

    sign: str = "scalar"
    kernel = "sign"

    def __post_init__(self) -> None:
        if self.sign not in ("scalar", "elementwise"):
            raise InputError(f'sign must be "scalar" or "elementwise", got "{self.sign}"')

    def update(self, estimate: Estimate, context: StepContext) -> Update:
        if self.sign == "elementwise":
            return super().update(estimate, context)
        count = len(estimate.terms)
        return moved(estimate, [-context.lr * g.sign() / count for _, g in estimate.terms])


@dataclass
class Normalized(Rule):
    """beta: of the average, 0 to divide by the step's own length."""

    beta: float = 0.9

    def __post_init__(self) -> None:
        _require_share("beta", self.beta)

    def start(self, blocks: Blocks) -> None:
        super().start(blocks)
        names = ("average", "weight")
        self.memory = {name: torch.zeros((), dtype=torch.float32, device=blocks.device) for name in names}

    def update(self, estimate: Estimate, context: StepContext) -> Update:
        g = torch.stack([g for _, g in estimate.terms])
        average, weight = self.memory["average"], self.memory["weight"]
        average.mul_(self.beta).add_(g.square().sum() * (1 - self.beta))
        weight.mul_(self.beta).add_(1 - self.beta)
        return moved(estimate, list(-context.lr * ratio(g, (average / weight).sqrt())))


@dataclass
class Momentum(Rule):
    beta: float = 0.9
    kernel = "momentum"

    def __post_init__(self) -> None:
        _require_share("beta", self.beta)

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.beta,)


@dataclass
class SignEMA(Momentum):
    beta: float = 0.0
    kernel = "sign-ema"


@dataclass
class AdaMM(Rule):
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-10
    kernel = "adamm"

    def __post_init__(self) -> None:
        _require_share("beta1", self.beta1)
        _require_share("beta2", self.beta2)
        require_not_negative("adam_eps", self.adam_eps)

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.beta1, self.beta2, self.adam_eps)


@dataclass
class Adam(AdaMM):
    adam_eps: float = 1e-8
    kernel = "adam"

    def start(self, blocks: Blocks) -> None:
        super().start(blocks)
        # b^t in fp64, with the very b of the kernel: 1 - .999 in fp32 is off by 5e-5 of itself.
        self._betas = self._constants[:2].double()
        self.memory = {"powers": torch.ones(2, dtype=torch.float64, device=blocks.device)}

    def numbers(self, lr: Tensor) -> Tensor:
        powers = self.memory["powers"].mul_(self._betas)
        return torch.cat((super().numbers(lr), (1 - powers).float()))


RULES = {
    "sgd": SGD,
    "sign": Sign,
    "normalized": Normalized,
    "momentum": Momentum,
    "adam": Adam,
    "adamm": AdaMM,
    "sign-ema": SignEMA,
}


def _require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{name} must be at least 0 and below 1, got {value}")
