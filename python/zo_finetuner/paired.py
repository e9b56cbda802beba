"""Probing through a scratch, both signs in one forward: + and - travel as one batch of twice the rows.

    closure for +    a call of the model is given its batch twice.  A module with trainable weights reads theta once,
                     makes theta + c * scale_b * z_b and theta - c * scale_b * z_b in one pass (one noise for both), and
                     computes the first half of the rows with one, the second with the other.  Everything else runs on
                     the doubled batch.  The closure is handed the + half.
    closure for -    the same calls with the same inputs are answered with the - halves; nothing is computed.  (What a
                     closure's own hooks do inside the model has to be the same for both.)

A half goes through a trained module in the shape it would have alone, so losses equal those of two forwards to the
rounding of what runs on the doubled batch (frozen matrix products and attention, where the size of a batch may change
the order of a sum).  Noise and rounding are those of `scratch` probing, and theta is never written.

Memory: two scratch copies of the largest module; activations of twice the batch; the outputs of all model calls of one
closure (logits too), until the closure for - has taken them.  Models return no cache (`use_cache` is switched off).

The first step takes two forwards and then rehearses (`rehearsal.py`) whether pairs may be trusted.  A model or a call
that cannot be paired takes two forwards, as under `scratch`; the log says which module or argument is the reason.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from zo_finetuner.calls import Call
from zo_finetuner.halves import Halves, NotHalves, argument_names
from zo_finetuner.optim.base import Probe
from zo_finetuner.rehearsal import rehearsal
from zo_finetuner.routes import Forward, rerouted
from zo_finetuner.rows import forward_accepts, unwrap
from zo_finetuner.scratch import ScratchProbing
from zo_finetuner.stack import Frame
from zo_finetuner.virtual_tokens import prompt_of_every_row
from zo_kernels import Blocks

logger = logging.getLogger(__name__)


class PairedProbing(ScratchProbing):
    """reason: why the pairs of this model take two forwards; empty while they take one.
    halves: the doubled batch, while the model runs on one and outside of its trained modules; else None.
    poisoned: the sign, 0 for + or 1 for -, whose copies are NaN in a rehearsal; else None."""

    mode = "paired"

    def __init__(self, model: nn.Module, blocks: Blocks):
        super().__init__(model, blocks)
        self.reason = ""
        self.halves: Halves | None = None
        self.poisoned: int | None = None
        self._names = {module: name or "the model itself" for name, module in model.named_modules()}
        self._pair: tuple[Probe, Probe] | None = None  # + and -, from the start of one to the end of the other
        self._calls: deque[Call | None] = deque()  # of the closure for +; None took a forward of its own
        self._inside = False
        self._trusted: set[str] = set()  # kinds of calls
        self._met: set[str] = set()
        self._told: set[str] = set()
        if model in self._modules:
            self._give_up("trainable weights belong to the model itself, not to a module inside it")

    @property
    def settled(self) -> bool:
        return super().settled and (bool(self.reason) or self._met <= self._trusted)

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Probe | None = None) -> Iterator[None]:
        second = self._pair is not None and probe is self._pair[1]
        if not second:
            self.restore()
            paired = probe.direction is not None and following is not None and following.direction is probe.direction
            if paired and not self.reason:
                self._pair = (_mirrored(probe, following), following)
        with super().at(self._pair[0] if self._pair and not second else probe), contextlib.ExitStack() as routes:
            if self._pair is not None:
                routes.enter_context(rerouted([self.model], self._answer if second else self._call_model))
            if self._pair is not None and not second:
                routes.enter_context(rerouted(self._modules, self._call_module))
            yield
        if second:
            self.restore()

    def restore(self) -> None:
        """Forget a pair of which one half is still to be taken."""
        self._pair = None
        self._calls.clear()

    def rehearse(self, probes: list[Probe], losses: list[Tensor], loss_fn: Callable[[], Any]) -> None:
        """After a step with calls of a kind not met before, which took two forwards: may such calls be paired?"""
        if self.reason or self._met <= self._trusted:
            return
        for at, (probe, following) in enumerate(pairwise(probes)):
            if probe.direction is following.direction:
                with _disable_current_modes():  # who watches a step for waits is not to see those that are made once
                    verdict = rehearsal(self, (probe, following), losses[at : at + 2], loss_fn)
                if verdict:
                    self._give_up(verdict)
                elif verdict is not None:
                    self._trusted |= self._met
                return

    def _call_model(self, model: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A call of the model by the closure for +."""
        if self._inside:
            return forward(*args, **kwargs)
        self._inside = True
        try:
            outputs = self._both(forward, args, kwargs)
        finally:
            self._inside = False
        if outputs is None:
            self._calls.append(None)
            return forward(*args, **kwargs)
        plus, minus = outputs
        self._calls.append(Call(self._inputs(args, kwargs), minus))
        return plus

    def _answer(self, model: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A call of the model by the closure for -."""
        call = self._calls.popleft() if self._calls else None
        if call is not None:
            same, minus = call.answer(self._inputs(args, kwargs))
            if same:
                return minus
            self.tell("the closure gives the model other inputs for - than it gave for +")
        return forward(*args, **kwargs)

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """All that decides what a call computes: its arguments, and the rows or targets that are asked of a head."""
        asked = [module.__dict__.get(name) for module in self._names for name in ("_zo_rows", "_zo_targets")]
        return args, kwargs, [value for value in asked if value is not None]

    def _both(self, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """(outputs for +, outputs for -), or None for a call that has to take two forwards."""
        try:
            halves = self._double(forward, args, kwargs)
            self._met.add(halves.kind)
            if halves.kind not in self._trusted and self.poisoned is None:
                return None
        except NotHalves as reason:
            self.tell(str(reason))
            return None
        try:
            return self._run(forward, halves)
        except NotHalves as reason:
            if self.poisoned is not None:
                raise
            self.tell(str(reason))
            return None

    def _double(self, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> Halves:
        names = argument_names(forward, args)
        if "use_cache" in forward_accepts(self.model) and "use_cache" not in names:
            if kwargs.get("use_cache"):
                raise NotHalves("the closure asks for a cache (use_cache=True)")
            kwargs = {**kwargs, "use_cache": False}
        return Halves(names, args, kwargs)

    def _run(self, forward: Forward, halves: Halves) -> tuple[Any, Any]:
        self.halves = halves
        try:
            with _loss_per_half(unwrap(self.model), halves) as losses, prompt_of_every_row(self.model):
                output = forward(*halves.args, **halves.kwargs)
        finally:
            self.halves = None
        return halves.split_output(output, bool(losses))

    def _perturb(self, frame: Frame, parameter: nn.Parameter, block: int, rows: Tensor | None) -> None:
        if self.halves is None:
            return super()._perturb(frame, parameter, block, rows)
        out, mirror = self._take(frame, parameter, rows), self._take(frame, parameter, rows)
        self._write(parameter.data, out, block, rows, mirror)
        if self.poisoned is not None:
            (out, mirror)[self.poisoned].fill_(torch.nan)
        frame.swap(parameter, out, mirror)

    def _call_module(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A trained module on a doubled batch: each half with the copies of its sign, children included."""
        frame = self._frames[-1] if self._frames else None
        if self.halves is None or frame is None or frame.module is not module:
            return forward(*args, **kwargs)
        halves, self.halves = self.halves, None
        try:
            plus, minus, both = halves.split(args, kwargs)
            if both and _is_linear(module, forward) and not kwargs:
                return _linear(module, *plus[0], *minus[0], frame.turn)
            first = forward(*plus[0], **plus[1])
            frame.turn()
            self._probe = self._pair[1]
            second = forward(*minus[0], **minus[1])
            return halves.join(first, second, broadcast=not both)
        except NotHalves as reason:
            raise NotHalves(f"{self.describe(module)} {reason}") from None
        finally:
            self._probe, self.halves = self._pair[0], halves

    def describe(self, module: nn.Module) -> str:
        return f"{self._names[module]} ({type(module).__name__})"

    def tell(self, reason: str) -> None:
        """Log, once, why pairs take two forwards."""
        if reason not in self._told:
            logger.warning("a pair of probes takes two forwards: %s", reason)
        self._told.add(reason)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self.tell(reason)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reason": self.reason, "trusted": sorted(self._trusted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._trusted = set(state["trusted"])
        if state["reason"]:
            self._give_up(state["reason"])


def _is_linear(module: nn.Module, forward: Forward) -> bool:
    own = getattr(forward, "__func__", None) is nn.Linear.forward  # not a subclass's, nor one put around it
    return own and not torch.is_autocast_enabled(module.weight.device.type)


def _linear(module: nn.Linear, plus: Tensor, minus: Tensor, turn: Callable[[], None]) -> Tensor:
    """A linear layer's two products, written where they belong: to join them takes 8 % of a step on a CPU."""
    joined = plus.new_empty(2, *plus.shape[:-1], module.weight.shape[0])
    _product(module, plus, joined[0])
    turn()
    _product(module, minus, joined[1])
    return joined.flatten(0, 1)


def _product(module: nn.Linear, x: Tensor, out: Tensor) -> None:
    x, out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if module.bias is None:
        torch.mm(x, module.weight.t(), out=out)
    else:
        torch.addmm(module.bias, x, module.weight.t(), out=out)


def _mirrored(plus: Probe, minus: Probe) -> Probe:
    """`plus`, with a coefficient of NaN if that of `minus` is not its opposite: a method that asks for something else
    than it did in the rehearsal has its step skipped, without a wait for the device."""
    return Probe(plus.direction, torch.where(minus.coef == -plus.coef, plus.coef, torch.nan))


@contextlib.contextmanager
def _loss_per_half(model: nn.Module, halves: Halves) -> Iterator[list[Tensor]]:
    """Within it a Hugging Face model given labels makes a loss for each half, [l+, l-].  Yields those made."""
    losses: list[Tensor] = []
    if not halves.labelled or not isinstance(getattr(type(model), "loss_function", None), property):
        yield losses
        return
    own, function = model.__dict__.get("_loss_function"), model.loss_function

    def both(*args: Any, **kwargs: Any) -> Tensor:
        plus, minus, _ = halves.split(args, kwargs)
        losses.append(torch.stack((function(*plus[0], **plus[1]), function(*minus[0], **minus[1]))))
        return losses[-1]

    model.loss_function = both
    try:
        yield losses
    finally:
        del model._loss_function
        if own is not None:
            model.loss_function = own
