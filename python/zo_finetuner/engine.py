"""One zeroth-order step.  Read this first.

    ask       the method names probes: (seed, per-block scale, coefficient)             optim/
    evaluate  the loss at theta + coef * scale * z, forward only, for each of them      probing.py, zo_kernels
    tell      the method turns the losses into coefficients, or asks again              optim/
    apply     theta = round(decay * theta + sum coef * scale * z), one pass             update.py, zo_kernels

`begin`, `compute`, `end`: what the host does before, what the device does (and a CUDA graph may repeat, `graphs.py`),
what the host does after.

The engine owns the weights, the noise and the forwards; methods see descriptions and scalars.  Losses, coefficients
and scales stay on the device: nothing here waits for the host.  A step that must not be (`guards.py`) is skipped on the
device (coefficient 0, no decay, the method's state and memory as before), counted, and reported at the next step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.autocast import casts_not_kept
from zo_finetuner.block_kinds import by_kind
from zo_finetuner.errors import InputError, require_not_negative, require_positive
from zo_finetuner.guards import Guard, Limits
from zo_finetuner.optim.base import Method, Probe, Slope, StepContext, Update
from zo_finetuner.params import trainable_blocks
from zo_finetuner.phases import phase
from zo_finetuner.probing import make_probing
from zo_finetuner.ranks import Ranks
from zo_finetuner.recorder import Recorder
from zo_finetuner.shards import local, stats_of
from zo_finetuner.step_inputs import StepInputs
from zo_finetuner.tangent import directional_derivative
from zo_finetuner.update import guarded
from zo_finetuner.window import as_window, flat, total
from zo_kernels import NOISE_VERSION, Blocks

logger = logging.getLogger(__name__)

LossFn = Callable[[], Tensor | float]
LossOf = Callable[[Any], Tensor | float]


class Given:
    """In place of a loss function: the losses of a step that is repeated from a journal, in their order.  InputError
    where a method asks for more than there are."""

    def __init__(self, losses: Tensor):
        self._losses, self._next = losses, 0

    def take(self, count: int) -> Tensor:
        self._next += count
        if self._next > len(self._losses):
            raise InputError(f"the journal has {len(self._losses)} losses a step, its method asks for more: it is "
                             f"not this method's run")
        return self._losses[self._next - count : self._next]


class Engine:
    """Runs the steps of one method on one model.

    method: an ask/tell method (`zo_finetuner.optim`), made for `blocks` where it keeps something per block.
    eps: size of the perturbation.  seed: the run's seed, any unsigned 64-bit integer (0 is a seed).
    probing: "scratch" (weights never written by a probe), "paired" (scratch, both signs in one forward), "inplace"
        (fp32 weights, adapters), "auto" by dtype.
    weight_decay: decoupled; theta is multiplied by 1 - lr * weight_decay in the update's pass.
    limits: which steps are clipped or skipped, and when a run stops.
    journal: where every step is written down (`journal.py`), None for nowhere.
    ranks: the processes that take the steps together (`ranks.py`), each with its own rows or probes.

    Raises InputError for eps that is not positive and finite, a method whose state does not fit or that cannot be
    probed so, and what `trainable_blocks` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        eps: float = 1e-3,
        seed: int = 0,
        probing: str = "auto",
        weight_decay: float = 0.0,
        limits: Limits | None = None,
        blocks: Blocks | None = None,
        journal: Recorder | None = None,
        ranks: Ranks | None = None,
    ):
        require_positive("eps", eps, "; 1e-3 is usual")
        require_not_negative("weight_decay", weight_decay)
        self.model, self.method, self.ranks = model, method, ranks
        self.blocks = trainable_blocks(model) if blocks is None else blocks
        parameters = dict(model.named_parameters())
        self.parameters = [parameters[name] for name in self.blocks.names]
        if ranks is not None:
            probing = ranks.probing(probing, method, self.blocks)
        self.probing = make_probing(probing, model, self.blocks, method)
        method.prepare(self.blocks)
        self.seed, self.weight_decay = seed, weight_decay
        self.journal = journal
        self.step_count = 0
        self.device = self.blocks.device
        self.eps = torch.tensor(eps, dtype=torch.float32, device=self.device)
        self.inputs = StepInputs(method.directions, self.device)
        self.guard = Guard(limits or Limits(), {t.dtype for t in self.blocks.tensors}, method.slopes, self.device)
        self.last_loss = torch.zeros((), dtype=torch.float32, device=self.device)
        self.projected_grad = torch.zeros((), dtype=torch.float32, device=self.device)
        self.realised_share: Tensor | None = None

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped, 0-dim on the device."""
        return self.guard.skipped

    def step(self, loss_fn: LossFn, lr: float | Tensor) -> Tensor:
        """One step: `loss_fn()` is called once per probe and must run forwards only; paired and low-rank probing call
        it some times more before they trust a kind of model call.  It returns a loss, or the window of losses and
        weights that `window.py` describes.  Returns the mean of the probes' losses (0-dim fp32, on the device), NaN
        when the step was skipped.

        The weights are whole again after any exception: untouched under scratch probing, to fp32 rounding in place.
        Raises RuntimeError naming a tensor that was moved to other memory since the engine was made, and UnstableRun
        (an InputError) when too many steps were skipped.
        """
        self.begin(lr)
        loss = self.compute(loss_fn)
        self.end()
        return loss

    def step_on(self, loss_of: LossOf, inputs: Any, lr: float | Tensor) -> Tensor:
        """`step` on the loss `loss_of(inputs)`: the form that `graphs.GraphedSteps` repeats on other inputs."""
        return self.step(lambda: loss_of(inputs), lr)

    @torch.no_grad()
    def begin(self, lr: float | Tensor) -> None:
        """Before a step: checks, what was to be told of the step before, and the step's inputs."""
        self._require_unmoved()
        self.guard.report(self.step_count)
        if self.ranks is not None:
            self.ranks.require_replicas(self.blocks, self.step_count)
        if self.journal is not None:
            self.journal.before(self)
        self.inputs.fill(lr, self.seed, self.step_count)
        if self.step_count & (self.step_count - 1) == 0:  # 0, 1, 2, 4, ...: weights that start at 0 grow (LoRA's B)
            self.probing.measure()
        if self.method.turns(self.step_count):
            self.flush()
            self.method.turn(self._context(self.step_count))
        self.probing.begin()

    @torch.no_grad()
    @casts_not_kept()
    def compute(self, loss_fn: LossFn | Given, captured: bool = False) -> Tensor:
        """What the device does in a step; returns its loss.  captured: into a CUDA graph, which has no step number."""
        training = self.model.training
        self.model.eval()  # no dropout: both probes must see the same function
        before = {name: tensor.clone() for name, tensor in self.method.kept().items()}
        asked, told = [], []
        try:
            with phase("ask"):
                request = self.method.ask(self._context(None if captured else self.step_count))
            if self.step_count == 0 and not isinstance(loss_fn, Given):
                self._report_share(request)
            while not isinstance(request, Update):
                losses = self._losses(request, loss_fn)
                asked, told = [*asked, *request], [*told, losses]
                with phase("tell"):
                    request = self.method.tell(told[-1])
            with phase("update"):
                request, ok = self.guard.judge(request, torch.cat(told))
                update, decay = self._apply(request, ok, before)
                if self.journal is not None:
                    self.journal.take(self, asked, told, update, ok, decay)
                loss = torch.where(ok, request.loss, torch.nan)
        except BaseException:
            self.probing.restore()
            for name, tensor in self.method.kept().items():
                tensor.copy_(before[name])
            raise
        finally:
            self.model.train(training)
        return loss

    @torch.no_grad()
    def end(self) -> None:
        """After a step: it is counted, and what the next one tells of it is sent without waiting."""
        if self.journal is not None:
            self.journal.after(self)
        self.step_count += 1
        self.guard.send()

    def _require_unmoved(self) -> None:
        """`model.to(...)` or `p.data = ...` after the engine was made would leave it updating memory nobody reads."""
        for name, tensor, parameter in zip(self.blocks.names, self.blocks.tensors, self.parameters, strict=True):
            if not tensor.is_set_to(local(parameter)):
                raise RuntimeError(f"{name} has moved since the optimizer was made: make it after model.to(...)")

    def _context(self, step: int | None) -> StepContext:
        return StepContext(
            step=step,
            lr=self.inputs.lr,
            eps=self.eps,
            seed=self.inputs.seeds.__getitem__,
            block_stats=lambda: stats_of(self.blocks),
        )

    def _losses(self, request: list[Probe] | list[Slope], loss_fn: LossFn | Given) -> Tensor:
        """Of all probes asked for, (probes,); a slope has two numbers.  Of several ranks each evaluates its share."""
        if isinstance(loss_fn, Given):
            return torch.hstack([self._pass_by(probe, loss_fn) for probe in request])
        mine = request if self.ranks is None else self.ranks.share(request)
        windows = [self._evaluate(probe, mine[i + 1 :], loss_fn) for i, probe in enumerate(mine)]
        losses = [total(window) for window in flat(windows)]
        self.probing.rehearse(mine, losses, lambda: total(as_window(loss_fn(), self.device)))
        return torch.stack(losses) if self.ranks is None else self.ranks.losses(request, windows)

    def _pass_by(self, probe: Probe | Slope, given: Given) -> Tensor:
        """A loss that is known, in place of its evaluation."""
        if isinstance(probe, Probe):
            self.probing.pass_by(probe)
        return given.take(2 if isinstance(probe, Slope) else 1)

    def _evaluate(
        self, probe: Probe | Slope, following: list[Probe] | list[Slope], loss_fn: LossFn
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A loss or a window; of a `Slope` also its derivative."""
        if isinstance(probe, Slope):
            with phase("forward"):
                return directional_derivative(self.model, self.blocks, probe.direction, loss_fn)
        with phase("probe"), self.probing.at(probe, following), phase("forward"):
            loss = loss_fn()
        return as_window(loss, self.device)

    def _apply(self, update: Update, ok: Tensor, before: dict[str, Tensor]) -> tuple[Update, Tensor | None]:
        """before: the method's memory as it was, which a step that is skipped gets back.  Returns what was applied: the
        update and the decay."""
        update = guarded(update, ok)
        decay = torch.where(ok, 1 - self.inputs.lr * self.weight_decay, 1.0) if self.weight_decay else None
        self.probing.apply(update, ok, decay, self.inputs.rounding)
        for name, tensor in self.method.kept().items():
            tensor.copy_(torch.where(ok, tensor, before[name]))
        self.last_loss.copy_(torch.where(ok, update.loss, self.last_loss))
        self.projected_grad.copy_(torch.where(ok, update.projected_grad, 0.0))
        return update, decay

    def _report_share(self, request: list[Probe] | list[Slope]) -> None:
        """Rounding a 16-bit scratch may swallow a small perturbation: say how much of it is really made."""
        probe = next((p for p in request if isinstance(p, Probe) and p.direction is not None), None)
        if probe is None or self.probing.mode == "inplace":
            return
        if any(t.dtype != torch.float32 for t in self.blocks.tensors):
            self.realised_share = share = self.probing.realised_share(probe)
            low, middle, high = share.min(), share.median(), share.max()
            logger.info("realised share of the perturbation: %.3f to %.3f, median %.3f", low, high, middle)

    def metrics(self) -> dict[str, float]:
        """The last step's numbers for a log (waits for the device); scales as `sigma/KIND`, a number for every kind of
        block (`block_kinds.KINDS`): the root mean square."""
        forwards = self.step_count * self.method.forwards
        values = {"projected_grad": self.projected_grad, "forwards": forwards, **self.guard.metrics(),
                  **self.method.metrics}  # fmt: skip
        sigma = values.pop("sigma", None)
        kinds = {} if sigma is None else by_kind(self.blocks.names, sigma.tolist())
        return {name: float(value) for name, value in values.items()} | {f"sigma/{k}": v for k, v in kinds.items()}

    def flush(self) -> None:
        """Write what a method of low-rank directions has collected into the weights; a model that is called, saved or
        loaded does so by itself."""
        self.probing.flush()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-equal resume needs besides the weights.  It flushes, as saving the model does: a run is
        continued to the bit from where it was saved."""
        self.flush()
        return {
            "noise_version": NOISE_VERSION,
            "method": self.method.name,
            "seed": self.seed,
            "step": self.step_count,
            "guard": self.guard.state,
            "last_loss": self.last_loss,
            "ids": dict(zip(self.blocks.names, self.blocks.ids, strict=True)),
            "probing": {"mode": self.probing.mode, **self.probing.state_dict()},
            "method_state": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises InputError when the state is of another noise contract, method, probing mode or set of tensors."""
        mine = self.state_dict()
        for key in ("noise_version", "method", "ids"):
            if state[key] != mine[key]:
                raise InputError(f"cannot resume: {key} differs ({_brief(state[key])} saved, {_brief(mine[key])} here)")
        if state["probing"]["mode"] != self.probing.mode:
            raise InputError(f"cannot resume: the run probed {state['probing']['mode']}, not {self.probing.mode}")
        self.seed, self.step_count = state["seed"], state["step"]
        self.guard.load(state["guard"])
        self.last_loss.copy_(state["last_loss"])
        self.probing.load_state_dict(state["probing"])
        self.method.load_state_dict(state["method_state"])


def _brief(value: Any) -> str:
    return f"{len(value)} tensors" if isinstance(value, dict) else str(value)
