"""The engine as a `torch.optim.Optimizer`: param groups, LR schedulers, `state_dict`, accelerate and Trainer work.

    optimizer = ZOOptimizer(model, MeZO(), lr=1e-6, eps=1e-3)
    for batch in data:
        loss = optimizer.step(lambda: model(**batch).loss)
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.adapters import adapter_kind, default_rates
from zo_finetuner.engine import Engine, LossFn, LossOf
from zo_finetuner.errors import require_positive
from zo_finetuner.graphs import Capturer, GraphedSteps
from zo_finetuner.guards import Limits
from zo_finetuner.optim.base import Method
from zo_finetuner.optim.create import make_method
from zo_finetuner.optim.mezo import MeZO
from zo_finetuner.params import trainable_blocks
from zo_finetuner.ranks import Ranks, joined, leads
from zo_finetuner.recorder import Recorder


class ZOOptimizer(torch.optim.Optimizer):
    """A zeroth-order optimizer over the trainable parameters of `model` (a PEFT model trains its adapter).

    method: an ask/tell method; default `MeZO()`.  lr: positive and finite; change it through `param_groups` or an LR
    scheduler.  graphs: whether steps of `evaluate_on` are repeated as CUDA graphs (`graphs.py`), or what captures them
    (`graphs.Capturer`); InputError for a model that is not on a CUDA device.  journal: a file to write every step down
    in, from which `replay` rebuilds the weights (`close()` sees it on the disk).  ranks: where torch.distributed runs,
    by default all its processes, each with its own rows; the first one keeps the journal.  Other arguments: see
    `Engine`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None = None,
        *,
        lr: float = 1e-6,
        eps: float = 1e-3,
        seed: int = 0,
        probing: str = "auto",
        weight_decay: float = 0.0,
        limits: Limits | None = None,
        graphs: bool | Capturer = False,
        journal: str | os.PathLike | Recorder | None = None,
        ranks: Ranks | None = None,
    ):
        require_positive("lr", lr, "; MeZO uses 1e-7 to 1e-6 for full fine-tuning")
        blocks = trainable_blocks(model)
        ranks = Ranks() if ranks is None and joined() else ranks
        journal = journal if leads() else None
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": lr})
        self.engine = Engine(
            model,
            method or MeZO(),
            eps=eps,
            seed=seed,
            probing=probing,
            weight_decay=weight_decay,
            limits=limits,
            blocks=blocks,
            journal=Recorder(journal) if isinstance(journal, str | os.PathLike) else journal,
            ranks=ranks,
        )
        self.graphs = GraphedSteps(self.engine, None if graphs is True else graphs) if graphs else None
        self._stepped = False

    def step(self, closure: LossFn | None = None) -> Tensor | None:
        """One step.  closure: () -> loss, forward only, called once per probe; required, since the loss at the
        perturbed weights is all that the method sees.  Returns the mean loss of the probes.

        Called without a closure it ends a step whose losses `evaluate` has taken (as HF Trainer does)."""
        if closure is not None:
            return self.engine.step(closure, self.param_groups[0]["lr"])
        if not self._stepped:
            raise RuntimeError("ZOOptimizer.step needs a closure that returns the loss: optimizer.step(lambda: loss)")
        self._stepped = False
        return None

    def evaluate(self, closure: LossFn) -> Tensor:
        """A whole step, for loops that call `step()` without a closure afterwards."""
        loss = self.engine.step(closure, self.param_groups[0]["lr"])
        self._stepped = True
        return loss

    def evaluate_on(self, loss_of: LossOf, inputs: Any) -> Tensor:
        """`evaluate` of the loss `loss_of(inputs)`; the form that graphs can repeat: see `GraphedSteps.step`."""
        step = self.engine.step_on if self.graphs is None else self.graphs.step
        loss = step(loss_of, inputs, self.param_groups[0]["lr"])
        self._stepped = True
        return loss

    def close(self) -> None:
        """The journal's last steps on the disk; without a journal, nothing."""
        if self.engine.journal is not None:
            self.engine.journal.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """There are no gradients."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "zo": self.engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.engine.load_state_dict(state.pop("zo"))
        super().load_state_dict(state)


def create_zo_optimizer(
    model: nn.Module,
    optimizer: str | Method = "mezo",
    *,
    lr: float | None = None,
    eps: float | None = None,
    seed: int = 0,
    probing: str = "auto",
    weight_decay: float = 0.0,
    limits: Limits | None = None,
    graphs: bool | Capturer = False,
    journal: str | os.PathLike | Recorder | None = None,
    ranks: Ranks | None = None,
    **arguments: Any,
) -> ZOOptimizer:
    """A `ZOOptimizer` by the method's name, or with a method made before.  lr, eps: None for the method's own, or for
    those of the adapter that `model` trains (`adapters.RATES`).

    arguments: for a name, what `optim.make_method` takes (pertnn, batch_size, settings={"beta": 0.9}, ...)."""
    named = not isinstance(optimizer, Method)
    method = make_method(optimizer, model, seed=seed, **arguments) if named else optimizer
    usual = default_rates(optimizer if named else "mezo", adapter_kind(model))
    lr, eps = (own if given is None else given for given, own in zip((lr, eps), usual, strict=True))
    return ZOOptimizer(
        model, method, lr=lr, eps=eps, seed=seed, probing=probing, weight_decay=weight_decay, limits=limits,
        graphs=graphs, journal=journal, ranks=ranks,
    )  # fmt: skip
