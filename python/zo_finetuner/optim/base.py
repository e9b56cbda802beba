"""The ask/tell contract between methods and the engine.

A method never sees a weight.  It names directions by small descriptions, asks for losses at theta + coef * scale * z,
and answers with the coefficients of an update.  The engine owns weights, noise and forwards.

    ask(context)  -> [Probe, ...]
    tell(losses)  -> Update, or another [Probe, ...] for methods of several rounds

Everything numeric is a tensor on the device, so a method costs the step no wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from zo_finetuner.subspace import Held, Subspace
from zo_kernels import Blocks, BlockStats


@dataclass(frozen=True, eq=False)
class Direction:
    """scale_b * z_b, z from `zo_kernels.noise` at `seed` (0-dim int64: the bits of an unsigned one).  scale: (blocks,)
    fp32, None for ones.  Compared by identity: two probes of one direction hold the same object.

    subspace: of a low-rank direction (`zo_finetuner.subspace`), in which z_b of a matrix has few coordinates."""

    seed: Tensor
    scale: Tensor | None = None
    dist: str = "normal"
    subspace: Subspace | None = None

    @cached_property
    def coordinates(self) -> Tensor:
        """Of a low-rank direction, scales included: flat fp32, drawn once for its probes and its update."""
        return self.subspace.layout.draw(self.seed, self.scale, self.dist)


@dataclass(frozen=True)
class Probe:
    """Evaluate the loss at theta + coef * direction.  coef: 0-dim fp32."""

    direction: Direction
    coef: Tensor


@dataclass(frozen=True)
class Update:
    """theta += sum coef * direction over `terms`; one scale and distribution for all terms.

    loss: what the step reports as the training loss (0-dim fp32); projected_grad: (l+ - l-) / 2 eps, for the logs."""

    terms: list[tuple[Direction | Held, Tensor]]
    loss: Tensor
    projected_grad: Tensor


@dataclass(frozen=True)
class StepContext:
    """What a method may look at.  step: number from 0; lr, eps: 0-dim fp32 on the device; seed: number of a direction,
    below the method's `directions` -> its seed (0-dim int64, good until the next step); block_stats: () ->
    `zo_kernels.BlockStats` of the unperturbed weights (one read of them)."""

    step: int
    lr: Tensor
    eps: Tensor
    seed: Callable[[int], Tensor]
    block_stats: Callable[[], BlockStats]


@dataclass
class Method:
    """Base of all methods.  forwards: losses that a step asks for; directions: seeds that it needs.

    What a method keeps from step to step it writes in place (`copy_`), and it keeps no number on the host: a step that
    was captured into a CUDA graph goes on where the one before ended."""

    name = "method"
    forwards = 0
    directions = 1
    low_rank = False  # its directions have subspaces: probes are side products, and no other mode of probing
    metrics: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def prepare(self, blocks: Blocks) -> None:
        """Once, before the first step: the blocks that it will work on.  Raises InputError where they do not fit."""

    def ask(self, context: StepContext) -> list[Probe]:
        raise NotImplementedError

    def tell(self, losses: Tensor) -> Update | list[Probe]:
        """losses: (probes,) fp32 in the order asked."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name} keeps no state, got {sorted(state)}")


def central_difference(direction: Direction, lr: Tensor, eps: Tensor, losses: Tensor) -> Update:
    """The two-point estimator (SPSA; MeZO, arXiv 2305.17333, Alg. 1): g = (l+ - l-) / 2 eps, step -lr * g along z."""
    projected_grad = (losses[0] - losses[1]) / (2 * eps)
    return Update([(direction, -lr * projected_grad)], losses.mean(), projected_grad)
