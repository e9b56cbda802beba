"""Probing in place: theta itself moves, and the way back merges with the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.optim.base import Probe, Update
from zo_finetuner.optim.directions import Terms, together
from zo_finetuner.update import apply_terms, apply_update
from zo_kernels import Blocks


class InPlaceProbing:
    """theta itself is moved.  Between `at()` and `apply()`/`restore()` the weights stay displaced, so that a pair of
    probes and the update cost three passes over the weights (MeZO's order: four), and N probes N + 1: the way back from
    one and the way to the next are one pass of two directions."""

    mode = "inplace"
    settled, grown = True, 0  # there is no scratch

    def __init__(self, model: nn.Module, blocks: Blocks):
        self.blocks = blocks
        self._displaced: Probe | None = None
        self._owed: list[Terms] = []  # ways that were passed by and are not made yet

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Sequence[Probe] = ()) -> Iterator[None]:
        here, self._displaced = self._displaced, probe
        for terms in _passes(here, probe):
            apply_terms(self.blocks, terms)
        yield

    def pass_by(self, probe: Probe) -> None:
        """What a probe does to the weights, without an evaluation.  Nobody looks at them there, so that fp32 weights,
        which are not rounded between passes, are moved all ways at once: along one z, which is made once."""
        here, self._displaced = self._displaced, probe
        self._owed += _passes(here, probe)

    def _pay(self) -> None:
        owed, self._owed = [terms for terms in self._owed if terms], []
        whole = [term for terms in owed for term in terms]
        exact = all(tensor.dtype == torch.float32 for tensor in self.blocks.tensors)
        if exact and owed and together(whole) and (whole[0][0].form is None or whole[0][0].form.kind == "weighted"):
            owed = [whole]
        for terms in owed:
            apply_terms(self.blocks, terms)

    def measure(self) -> None:
        """Nothing to measure: an in-place probe rounds to nearest."""

    def rehearse(self, probes: list[Probe], losses: list[Tensor], loss_fn: Callable[[], Any]) -> None:
        """Nothing to rehearse: the closure sees a model with other weights."""

    def restore(self) -> None:
        here, self._displaced = self._displaced, None
        self._owed += _passes(here, None)
        self._pay()

    def apply(self, update: Update, finite: Tensor, decay: Tensor | None, rounding_seed: Tensor) -> None:
        back = [] if self._displaced is None else _back(self._displaced)
        if back and update.by is None and update.terms and together([*back, *update.terms]):
            # decay * (theta + c z) - decay * c z: the way back shares the pass, whatever the update's directions are.
            if decay is not None:
                back = [(direction, coef * decay) for direction, coef in back]
            self._pay()
            update, self._displaced = replace(update, terms=[*back, *update.terms]), None
        else:  # a state is of the update alone, and a curvature that it changes is that of the way back
            self.restore()
        apply_update(self.blocks, update, finite, decay, rounding_seed)

    def begin(self) -> None:
        """Nothing to do on the host before a step."""

    def flush(self) -> None:
        """Nothing to write: updates are in the weights."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


def _back(probe: Probe) -> Terms:
    return [] if probe.direction is None else [(direction, -coef) for direction, coef in probe.terms]


def _passes(here: Probe | None, there: Probe | None) -> list[Terms]:
    """From one place to another: one pass over the weights where one can make both ways, else two, or none."""
    back = [] if here is None else _back(here)
    forth = [] if there is None or there.direction is None else there.terms
    if back and forth and here.direction is there.direction:
        return [Probe(there.direction, there.coef - here.coef).terms]
    if back and forth and not together([*back, *forth]):
        return [back, forth]
    return [[*back, *forth]]
