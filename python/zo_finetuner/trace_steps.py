"""What whole steps of a low-rank method cost, from shapes alone: its own probing makes them on meta tensors.

    first     a subspace begins, every probe takes a forward of its own, the update is collected
    later     probes share forwards as far as they may, beside as much as may be collected
    turning   what is collected goes into the weights, and another subspace begins

The bytes of what stays between steps (factors, what is collected, copies of vectors) are `kept`, once the method has
collected all that it may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zo_finetuner.lowrank import LowRankProbing
from zo_finetuner.objective import training_loss
from zo_finetuner.optim.base import Method, Probe, StepContext, Update
from zo_finetuner.rows import unwrap
from zo_finetuner.trace import Batch, Cost, counted
from zo_finetuner.update import guarded
from zo_kernels import Blocks


@dataclass(frozen=True)
class StepCost:
    """Bytes besides weights and batch.  first, turning: at most, of all that is alive.  later: above what is kept; its
    flops, traffic and operators are of all forwards of a step.  forwards: of the model, shared ones once."""

    first: int
    later: Cost
    kept: int
    turning: int
    forwards: int


class LowRankShapes(LowRankProbing):
    def __init__(self, model: nn.Module, blocks: Blocks):
        super().__init__(model, blocks)
        self._checked = True  # whether a weight is read elsewhere cannot be seen: there are none

    def rehearse(self, *_: object) -> None:
        self._trusted |= self._met  # there are no values to compare


class Steps:
    """Those of an engine, without numbers."""

    def __init__(self, model: nn.Module, blocks: Blocks, method: Method, loss: Callable[[], Tensor]):
        self.probing, self.method, self.loss = LowRankShapes(model, blocks), method, loss
        seeds = torch.empty(method.directions, dtype=torch.int64, device="meta").unbind()
        number = torch.empty((), device="meta")
        self.context = StepContext(0, number, number, seeds.__getitem__, lambda: None)
        self.rounding, self.finite = seeds[0], torch.empty((), dtype=torch.bool, device="meta")

    def turn(self) -> None:
        self.probing.flush()
        if self.method.period:
            self.method.turn(self.context)

    def step(self, evaluate: bool = True) -> None:
        """evaluate: else losses come from nowhere, and the update alone is made."""
        self.probing.begin()
        request = self.method.ask(self.context)
        while not isinstance(request, Update):
            losses = torch.empty(len(request), device="meta").unbind()
            if evaluate:
                losses = [self._loss(probe, request[i + 1 :]) for i, probe in enumerate(request)]
                self.probing.rehearse()
            request = self.method.tell(torch.stack(losses))
        self.probing.apply(guarded(request, self.finite), self.finite, None, self.rounding)

    def _loss(self, probe: Probe, following: list[Probe]) -> Tensor:
        with self.probing.at(probe, following):
            return self.loss()


@torch.no_grad()
def trace_steps(
    model: nn.Module, blocks: Blocks, batch: Batch, method: Method, loss: Callable = training_loss
) -> StepCost:
    """method: low-rank, made for these blocks on the meta device."""

    def mean() -> Tensor:
        total, weight = loss(model, batch)
        return total / weight

    steps, forwards = Steps(model, blocks, method, mean), []
    handle = unwrap(model).get_input_embeddings().register_forward_pre_hook(lambda *_: forwards.append(1))
    with counted(model, batch) as tally:
        steps.turn()
        steps.step()
        first = tally.cost().peak
        for _ in range(0 if method.period else method.limit // (method.rank * method.estimator.directions) - 2):
            steps.step(evaluate=False)  # a population's ranks add up until they are merged
        kept = tally.restart()
        forwards.clear()
        steps.step()
        later = tally.cost()
        count = len(forwards)
        ground = tally.restart()
        steps.turn()
        turning = ground + tally.cost().peak
    handle.remove()
    return StepCost(first, later, kept, turning, count)
