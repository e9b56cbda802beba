"""A method as a composition:  direction x scale policy x estimator x update rule.

    ask     z_k = scale_b * noise of seed k (normal, random signs, masked)      scales.py, sparse.py
            probes along z_k                                                    estimators.py, guided.py, ...
    tell    gradient ~ sum g_k z_k                                              the estimator
            theta -= lr * what the rule makes of it                             rules.py

A new estimator or rule takes a class, and a line in the table of `create`.  State and forwards are those of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Method, Part, Probe, Slope, StepContext, Update
from zo_finetuner.optim.directions import Direction
from zo_finetuner.optim.estimators import Central, Estimate, Estimator
from zo_finetuner.optim.rules import SGD, Rule
from zo_finetuner.optim.scales import Ones
from zo_finetuner.optim.sparse import Everything
from zo_kernels import Blocks, Form

DISTRIBUTIONS = ("normal", "rademacher")


@dataclass
class Directed(Method):
    """A method that draws its directions by a distribution and a scale policy.

    dist: "normal", or "rademacher": random signs, the same estimator quality in high dimension."""

    name: str = "directed"
    scales: Ones = field(default_factory=Ones)
    dist: str = "normal"

    def __post_init__(self) -> None:
        if self.dist not in DISTRIBUTIONS:
            raise InputError(f'dist must be {" or ".join(DISTRIBUTIONS)}, got "{self.dist}"')

    @property
    def parts(self) -> dict[str, Part]:
        return {"scales": self.scales}

    def start(self, blocks: Blocks) -> None:
        for part in self.parts.values():
            part.start(blocks)

    def draw(self, context: StepContext, form: Form | None = None) -> list[Direction]:
        scale = self.scales.scale(context)
        self.metrics, self._context = self.scales.metrics, context
        return [Direction(context.seed(k), scale, self.dist, form) for k in range(self.directions)]

    def kept(self) -> dict[str, Tensor]:
        parts = {f"{part}.{name}": t for part, kept in self.parts.items() for name, t in kept.memory.items()}
        return {**self.memory, **parts}

    def state_dict(self) -> dict[str, Any]:
        parts = {f"{part}.{name}": t for part, kept in self.parts.items() for name, t in kept.states.items()}
        return {**super().state_dict(), **parts}


@dataclass
class Composed(Directed):
    """subset: which weights take part."""

    name: str = "composed"
    estimator: Estimator = field(default_factory=Central)
    rule: Rule = field(default_factory=SGD)
    subset: Everything = field(default_factory=Everything)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator.only_sgd and type(self.rule) is not SGD:
            raise InputError(f"{self.name} goes with the rule sgd alone: {self.estimator.only_sgd}")

    @property
    def parts(self) -> dict[str, Part]:
        return {"scales": self.scales, "estimator": self.estimator, "rule": self.rule, "subset": self.subset}

    @property
    def directions(self) -> int:
        return self.estimator.directions

    @property
    def forwards(self) -> int:
        return self.estimator.forwards

    @property
    def pairs(self) -> int:
        return self.estimator.pairs

    @property
    def slopes(self) -> bool:
        return self.estimator.slopes

    @property
    def scratch_only(self) -> str:
        return self.subset.scratch_only

    @property
    def whole_only(self) -> str:
        return "dual numbers stand in for whole tensors" if self.slopes else self.subset.whole_only

    def ask(self, context: StepContext) -> list[Probe] | list[Slope]:
        return self.estimator.ask(self.draw(context, self.subset.form), context)

    def tell(self, losses: Tensor) -> Update | list[Probe]:
        estimate = self.estimator.tell(losses)
        if not isinstance(estimate, Estimate):
            return estimate
        self.scales.remember(estimate.pair)
        return self.rule.update(estimate, self._context)
