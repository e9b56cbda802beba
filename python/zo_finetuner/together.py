"""Several probes in one forward: the members of a group (+ and -, or a population) travel as one repeated batch.

    closure of the first    a call of the model is given its batch once for each member.  A module that computes with
                            weights of its member takes the members' rows one after the other, each with the copies of
                            its own (`paired.py`), or all at once beside a side product (`lowrank.py`).  Everything
                            else runs on the repeated batch.  The closure is handed the first member's rows.
    closures of the others  the same calls with the same inputs are answered with their rows; nothing is computed.
                            (What a closure's own hooks do inside the model has to be the same for all.)

A member goes through a module of its own weights in the shape it would have alone, so losses equal those of a forward
each to the rounding of what runs on the repeated batch (frozen matrix products and attention, where the size of a batch
may change the order of a sum).

Memory: activations of N batches; the outputs of all model calls of one closure (logits too), until the closures of the
others have taken them.  Models return no cache (`use_cache` is switched off).

The first step takes a forward each and then rehearses (`rehearsal.py`) whether groups may be trusted.  A model or a
call that cannot be repeated takes a forward each, as under `scratch`; the log says which module or argument is the
reason.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from zo_finetuner.calls import Call
from zo_finetuner.members import Members, NotMembers, argument_names, batch_of, loss_per_member
from zo_finetuner.optim.base import Probe
from zo_finetuner.rehearsal import rehearsal
from zo_finetuner.routes import Forward, rerouted
from zo_finetuner.rows import forward_accepts, unwrap
from zo_finetuner.scratch import ScratchProbing
from zo_finetuner.stack import Frame
from zo_finetuner.virtual_tokens import prompt_of_every_row
from zo_kernels import Blocks

logger = logging.getLogger(__name__)


class TogetherProbing(ScratchProbing):
    """What paired and low-rank probing have in common.

    reason: why all probes of this model take a forward each; empty while they do not.
    members: the repeated batch, while the model runs on one and outside of modules that take members one by one.
    poisoned: numbers of the members whose weights are NaN in a rehearsal; else None."""

    def __init__(self, model: nn.Module, blocks: Blocks):
        super().__init__(model, blocks)
        self.reason = ""
        self.members: Members | None = None
        self.poisoned: frozenset[int] | None = None
        self._names = {module: name or "the model itself" for name, module in model.named_modules()}
        self._group: list[Probe] = []  # from the start of its first closure to the end of its last
        self._next = 0  # the member whose closure comes next
        self._calls: deque[Call | None] = deque()  # of the first closure; None took a forward of its own
        self._inside = False
        self._trusted: set[str] = set()  # kinds of calls
        self._met: set[str] = set()
        self._shared = 0  # members of the last group that could have shared a forward
        self._told: set[str] = set()
        if model in self._modules:
            self._give_up("trainable weights belong to the model itself, not to a module inside it")

    def group_of(self, probes: Sequence[Probe]) -> list[Probe]:
        """The leading probes that may share a forward; empty where the first takes its own."""
        raise NotImplementedError

    def unfit(self, group: list[Probe]) -> str:
        """Why a group cannot be evaluated together, from its values (waits for the device); empty where it can."""
        return ""

    def most(self, rows: int, length: int) -> int:
        """Members that may share a forward of a batch of rows x length."""
        return len(self._group)

    @property
    def settled(self) -> bool:
        return super().settled and (bool(self.reason) or self._met <= self._trusted)

    def _answers(self, probe: Probe) -> bool:
        """Whether it is a member of a group whose first closure has run."""
        return self._next < len(self._group) and probe is self._group[self._next]

    @contextlib.contextmanager
    def at(self, probe: Probe, following: Sequence[Probe] = ()) -> Iterator[None]:
        later = self._answers(probe)
        if not later:
            self.forget()
            self._group = [] if self.reason else self.group_of([probe, *following])
        self._next += 1
        with super().at(self._group[0] if self._group and not later else probe), contextlib.ExitStack() as routes:
            if self._group:
                routes.enter_context(rerouted([self.model], self._answer if later else self._call_model))
            if self._group and not later:
                routes.enter_context(rerouted(self._routed, self._call_module))
            yield
        if self._next >= len(self._group):
            self.forget()

    @property
    def _routed(self) -> list[nn.Module]:
        """Modules that take the members one by one."""
        return self._modules

    def restore(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What a group has, of which a closure may still be to come."""
        self._group, self._next = [], 0
        self._calls.clear()

    def rehearse(self, probes: list[Probe], losses: list[Tensor], loss_fn: Callable[[], Any]) -> None:
        """After a step with calls of a kind not met before, which took a forward each: may such calls be repeated?"""
        if self.reason or self._met <= self._trusted:
            return
        for at in range(len(probes)):
            group = self.group_of(probes[at:])[: self._shared]
            if len(group) < 2:
                continue
            with _disable_current_modes():  # who watches a step for waits is not to see those that are made once
                verdict = self.unfit(group) or rehearsal(self, group, losses[at:], loss_fn)
            if verdict:
                self._give_up(verdict)
            elif verdict is not None:
                self._trusted |= self._met
            return

    def _call_model(self, model: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A call of the model by the first closure."""
        if self._inside:
            return forward(*args, **kwargs)
        self._inside = True
        try:
            outputs = self._all(forward, args, kwargs)
        finally:
            self._inside = False
        if outputs is None:
            self._calls.append(None)
            return forward(*args, **kwargs)
        self._calls.append(Call(self._inputs(args, kwargs), outputs[1:]))
        return outputs[0]

    def _answer(self, model: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A call of the model by the closure of another member."""
        if self._inside:
            return forward(*args, **kwargs)
        call = self._calls.popleft() if self._calls else None
        if self._next < len(self._group):  # there are members to come
            self._calls.append(call)
        if call is not None:
            same, outputs = call.answer(self._inputs(args, kwargs))
            if same:
                return outputs[self._next - 2]
            self.tell("the closure gives the model other inputs for - than it gave for +")
        self._inside = True
        try:
            with self.alone():
                return forward(*args, **kwargs)
        finally:
            self._inside = False

    def alone(self) -> contextlib.AbstractContextManager:
        """Within it the model computes with the weights of a member whose call could not be answered."""
        return contextlib.nullcontext()

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """All that decides what a call computes: its arguments, and the rows or targets that are asked of a head."""
        asked = [module.__dict__.get(name) for module in self._names for name in ("_zo_rows", "_zo_targets")]
        return args, kwargs, [value for value in asked if value is not None]

    def _all(self, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
        """The outputs of all members, or None for a call that has to take a forward each."""
        try:
            members = self._repeated(forward, args, kwargs)
            if members is None:
                return None
            self._met.add(members.kind)
            if members.kind not in self._trusted and self.poisoned is None:
                return None
        except NotMembers as reason:
            self.tell(str(reason))
            return None
        try:
            return self._run(forward, members)
        except NotMembers as reason:
            if self.poisoned is not None:
                raise
            self.tell(str(reason))
            return None

    def _repeated(self, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> Members | None:
        names = argument_names(forward, args)
        if "use_cache" in forward_accepts(self.model) and "use_cache" not in names:
            if kwargs.get("use_cache"):
                raise NotMembers("the closure asks for a cache (use_cache=True)")
            kwargs = {**kwargs, "use_cache": False}
        if not self._calls:
            batch = batch_of(dict(zip(names, args, strict=True)) | kwargs)
            self._group = self._group[: max(1, self.most(batch.shape[0], batch.shape[1] if batch.dim() > 1 else 1))]
        if len(self._group) < 2:
            return None
        self._shared = len(self._group)
        return Members(self._shared, names, args, kwargs)

    def _run(self, forward: Forward, members: Members) -> list[Any]:
        self.members = members
        try:
            with loss_per_member(unwrap(self.model), members) as losses, prompt_of_every_row(self.model):
                output = forward(*members.args, **members.kwargs)
        finally:
            self.members = None
        return members.split_output(output, bool(losses))

    def _perturb(self, frame: Frame, parameter: nn.Parameter, block: int, rows: Tensor | None) -> None:
        if self.members is None:
            return super()._perturb(frame, parameter, block, rows)
        copies = [self._take(frame, parameter, rows) for _ in self._group]
        self._write_all(parameter.data, copies, block, rows)
        for member in self.poisoned or ():
            copies[member].fill_(torch.nan)
        frame.swap(parameter, *copies)

    def _write_all(self, theta: Tensor, copies: list[Tensor], block: int, rows: Tensor | None) -> None:
        for member, copy in enumerate(copies):
            self._probe = self._group[member]
            self._write(theta, copy, block, rows)
        self._probe = self._group[0]

    def _call_module(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A module with copies of its weights on a repeated batch: each member with its own, children included."""
        frame = self._frames[-1] if self._frames else None
        if self.members is None or frame is None or frame.module is not module:
            return forward(*args, **kwargs)
        return self._one_by_one(module, forward, args, kwargs, frame.turn)

    def _one_by_one(
        self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict[str, Any], turn: Callable[[int], None]
    ) -> Any:
        """turn: to the weights of a member; they are the first's when it begins."""
        members, self.members = self.members, None
        try:
            calls, differ = members.split(args, kwargs)
            if differ and _is_linear(module, forward) and not kwargs:
                return self._linear(module, [inputs for (inputs,), _ in calls], turn)
            outputs = []
            for member, (own, named) in enumerate(calls):
                self._turn(member, turn)
                outputs.append(forward(*own, **named))
            return members.join(outputs, broadcast=not differ)
        except NotMembers as reason:
            raise NotMembers(f"{self.describe(module)} {reason}") from None
        finally:
            self._probe, self.members = self._group[0], members

    def _turn(self, member: int, turn: Callable[[int], None]) -> None:
        self._probe = self._group[member]
        if member:
            turn(member)

    def _linear(self, module: nn.Linear, inputs: list[Tensor], turn: Callable[[int], None]) -> Tensor:
        """A linear layer's products, written where they belong: to join them takes 8 % of a step on a CPU."""
        joined = inputs[0].new_empty(len(inputs), *inputs[0].shape[:-1], module.weight.shape[0])
        for member, x in enumerate(inputs):
            self._turn(member, turn)
            x, out = x.reshape(-1, x.shape[-1]), joined[member].view(-1, joined.shape[-1])
            if module.bias is None:
                torch.mm(x, module.weight.t(), out=out)
            else:
                torch.addmm(module.bias, x, module.weight.t(), out=out)
        return joined.flatten(0, 1)

    def describe(self, module: nn.Module) -> str:
        return f"{self._names[module]} ({type(module).__name__})"

    def tell(self, reason: str) -> None:
        """Log, once, why probes take a forward each."""
        if reason not in self._told:
            logger.warning("probes take a forward each: %s", reason)
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
