"""Probing in place: theta itself moves, and the way back merges with the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from zo_finetuner.optim.base import Probe, Update
from zo_finetuner.update import apply_terms
from zo_kernels import Blocks, perturb_


class InPlaceProbing:
    """theta itself is moved.  Between `at()` and `apply()`/`restore()` the weights stay displaced, so that a pair of
    probes and the update cost three passes over the weights (MeZO's order: four)."""

    mode = "inplace"

    def __init__(self, model: nn.Module, blocks: Blocks):
        self.blocks = blocks
        self._displaced: Probe | None = None

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Probe | None = None) -> Iterator[None]:
        here = self._displaced
        if here is not None and here.direction is not probe.direction:
            self.restore()
            here = None
        coef = probe.coef if here is None else probe.coef - here.coef
        self._displaced = probe
        perturb_(self.blocks, probe.direction.seed, coef, probe.direction.scale, dist=probe.direction.dist)
        yield

    def measure(self) -> None:
        """Nothing to measure: an in-place probe rounds to nearest."""

    def rehearse(self, probes: list[Probe], losses: list[Tensor], loss_fn: Callable[[], Any]) -> None:
        """Nothing to rehearse: the closure sees a model with other weights."""

    def restore(self) -> None:
        here, self._displaced = self._displaced, None
        if here is not None:
            perturb_(self.blocks, here.direction.seed, -here.coef, here.direction.scale, dist=here.direction.dist)

    def apply(self, update: Update, decay: Tensor | None, rounding_seed: Tensor) -> None:
        here, self._displaced = self._displaced, None
        terms = update.terms
        if here is not None:
            # decay * (theta + c z) - decay * c z: the way back shares the pass, whatever the update's directions are.
            back = -here.coef if decay is None else -here.coef * decay
            terms = [(here.direction, back), *terms]
        apply_terms(self.blocks, terms, decay, rounding_seed)

    def flush(self) -> None:
        """Nothing to write: updates are in the weights."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass
