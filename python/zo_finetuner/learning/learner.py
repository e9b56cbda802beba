"""The loop of learning: windows of meta steps, each from the base weights, the best networks kept by held-out rows."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from zo_finetuner.errors import InputError
from zo_finetuner.history import History
from zo_finetuner.learning.base import BaseWeights
from zo_finetuner.learning.closed_form import batch_energy
from zo_finetuner.learning.forward_only import history_of, measure_forward, rounds_within
from zo_finetuner.learning.improved import ImprovedRecipe
from zo_finetuner.learning.paper import PaperRecipe
from zo_finetuner.learning.profile import Layout, Mean
from zo_finetuner.learning.scoring import Point, measure, score
from zo_finetuner.learning.settings import EPOCHS_OF_SEVERAL, EPOCHS_PER_WINDOW, LearnSettings
from zo_finetuner.learning.sources import LearningSet, batch_rows, loss_on
from zo_finetuner.learning.streaming import LossFn, Turn, Weights
from zo_finetuner.learning.trajectory import SGDTrajectory
from zo_finetuner.optim.learned import share_of
from zo_finetuner.pertnn import PertNN
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import derive_seed

logger = logging.getLogger(__name__)

RECENT = 10  # losses of one task (in a shorter window all) whose mean decides that the base model has diverged
DIVERGED = (1.5, 0.5)  # times the loss at the base weights, and above that
ENERGY_BATCHES = 8  # of the closed form that is scored beside what was learned
SLOWEST = 2.0**-6  # a trajectory that diverges at this share of its rate is given up


class Diverged(Exception):
    """The base model's losses left the range of its own."""


class Learner:
    """Learning on one model.  `state_dict` is complete at the end of every window.

    Raises InputError: what `Weights` raises, a learning set with too few rows, too few forwards for a round."""

    def __init__(
        self, model: nn.Module, pad_id: int, sets: list[LearningSet], settings: LearnSettings, source: str | None = None
    ):
        for learning_set in sets:
            learning_set.require(settings.batch_size)
        self.model, self.pad_id, self.sets, self.settings = model.eval(), pad_id, sets, settings
        self.weights = Weights(model)
        if settings.recipe == "forward":
            rounds_within(settings.forwards, self.weights.blocks.names)
        self.share = share_of(model, self.weights.blocks, settings.batch_size)
        self.base = BaseWeights(self.weights, source)
        self.epoch = len(sets[0].train) // settings.batch_size
        epochs = EPOCHS_PER_WINDOW if len(sets) == 1 else EPOCHS_OF_SEVERAL
        self.steps = settings.window or epochs * self.epoch
        self.layout, self.costs = Layout(self.weights.blocks), [Mean() for _ in sets]
        self.recipe = _make_recipe(self.weights, self.share, settings, self.steps, self.costs)
        self.histories = [self.fresh_history() for _ in sets]
        self.window, self.slower = 0, 1.0
        self.points: list[Point] = []
        self.first_losses: list[float] = []
        self.forwards = 0  # spent by recipe "forward"
        self.energies: list[Tensor] = []  # batch energies at the base weights, of the learning sets
        self.snapshots = [_copied(self.recipe.nets)]  # before learning, then after every window
        self.log: list[dict[str, float | int | str]] = []

    def measure_base(self) -> None:
        """The first points, losses and energies, at the base weights, which come back exactly."""
        if self.settings.recipe == "forward":
            self._measure_forward()
        else:
            self._measure(at_base=True)
        self.base.restore()  # probes leave roundings behind

    def run(self, save: Callable[[dict[str, Any]], None], progress: bool = True) -> None:
        """Go on to the last window.  save: is given the state at the end of each."""
        settings, tasks = self.settings, len(self.sets)
        total = settings.windows * self.steps * tasks
        done = self.window * self.steps * tasks
        if self.window < settings.windows:
            self.base.restore()
            if not self.points:
                self.measure_base()
        with tqdm(total=total, initial=done, desc=f"learn ({self.recipe.name})", disable=not progress) as bar:
            while self.window < settings.windows:
                before = deepcopy(self.state_dict())
                try:
                    lines = self._window(bar)
                    if len(self.points) == tasks:
                        self._measure(at_base=False)
                except Diverged as reason:
                    self._slow_down(before, str(reason))
                    bar.n = done = self.window * self.steps * tasks
                    bar.refresh()
                    continue
                self.log += lines
                self.snapshots.append(_copied(self.recipe.nets))
                self.window += 1
                self.base.restore()
                save(self.state_dict())

    def _window(self, bar: tqdm) -> list[dict[str, Any]]:
        self.recipe.restart()
        recent = [deque(maxlen=RECENT) for _ in self.sets]
        lines = []
        for i in range(self.steps):
            number = self.window * self.steps + i
            self._forget(number, i)
            for task, learning_set in enumerate(self.sets):
                turn = Turn(
                    loss_fn=self.batch(learning_set.train, number),
                    task=task,
                    history=self.histories[task],
                    seed=derive_seed(self.settings.seed, number * len(self.sets) + task, 0),
                    place=i / self.steps,
                    slower=self.slower,
                    few_answers=learning_set.few_answers,
                )
                loss = float(self.recipe.step(turn))
                recent[task].append(loss)
                self._require_sane(recent[task], task, i)
                lines.append({"window": self.window, "step": number, "set": learning_set.name, "loss": loss})
                bar.update()
            bar.set_postfix(window=self.window, loss=f"{loss:.3f}", refresh=False)
        return lines

    def _forget(self, number: int, place: int) -> None:
        """The paper keeps histories over restarts with one data set, and drops them every epoch with several."""
        if self.recipe.name == "improved":
            fresh = place == 0
        else:
            fresh = len(self.sets) > 1 and number % self.epoch == 0
        if fresh:
            self.histories = [self.fresh_history() for _ in self.sets]

    def _require_sane(self, recent: deque[float], task: int, place: int) -> None:
        mean, first = sum(recent) / len(recent), self.first_losses[task]
        enough = len(recent) == min(RECENT, self.steps)
        if not math.isfinite(mean) or (enough and mean > DIVERGED[0] * first + DIVERGED[1]):
            raise Diverged(f"{self.sets[task].name}: loss {mean:.2f} after {place + 1} steps, {first:.2f} at the start")

    def _slow_down(self, before: dict[str, Any], reason: str) -> None:
        """Back to the window's start, at half the rate."""
        slower = self.slower / 2
        if slower < SLOWEST:
            raise InputError(
                f"the base model diverges in window {self.window} even at {self.slower:.3g} of the rate ({reason}): "
                f"give a smaller --lr-llm (paper) or --horizon (improved)"
            )
        self.base.restore()
        self.load_state_dict(before)
        self.slower = slower
        logger.warning("window %d diverged (%s): started again at %.3g of the rate", self.window, reason, slower)

    def _measure(self, at_base: bool) -> None:
        """A point of every learning set, on its held-out rows."""
        for task, learning_set in enumerate(self.sets):
            history = self.fresh_history() if at_base else self.histories[task]
            point = measure(
                self.weights,
                lambda number, rows=learning_set.held_out: self.batch(rows, number),
                history,
                self.costs[task],
                task=task,
                seed=derive_seed(self.settings.seed, task, 1 if at_base else 2),
                eps=self.settings.eps,
                few_answers=learning_set.few_answers,
            )
            self.points.append(point)
            if not at_base and not point.gain.isfinite().all():
                raise Diverged(f"{learning_set.name}: no finite gain on held-out rows after {self.steps} steps")
            if at_base:
                loss = float(point.history.losses.mean())
                if not math.isfinite(loss):
                    raise InputError(f"{learning_set.name}: the base model's own loss is not finite ({loss})")
                self.first_losses.append(loss)
                self.energies.append(self._batch_energy(learning_set))

    def _measure_forward(self) -> None:
        """The same without a backward pass, on the learning rows; a gain has the noise of its batch in it."""
        for task, learning_set in enumerate(self.sets):
            found = measure_forward(
                self.weights,
                lambda number, rows=learning_set.train: self.batch(rows, number),
                self.costs[task],
                forwards=self.settings.forwards,
                eps=self.settings.eps,
                seed=derive_seed(self.settings.seed, task, 3),
            )
            if found.trace < 3 * found.trace_error:
                logger.warning("%s: the losses' curvature, %.3g, does not stand above its error, %.3g: suggested_lr is "
                               "a guess; give more --forwards or a larger --eps", learning_set.name, found.trace,
                               found.trace_error)  # fmt: skip
            history = history_of(found.losses, len(self.weights.blocks))
            self.points.append(Point(task, self.weights.stats(), history, found.energy))
            self.first_losses.append(float(found.losses.mean()))
            self.energies.append(found.energy)
            self.forwards += found.forwards

    def _batch_energy(self, learning_set: LearningSet) -> Tensor:
        count = self.settings.window if self.settings.recipe == "closed-form" else ENERGY_BATCHES
        return batch_energy(self.weights, (self.batch(learning_set.train, number) for number in range(count)))

    def batch(self, rows: list, number: int) -> LossFn:
        chosen = batch_rows(rows, self.settings.batch_size, number, self.settings.data_seed)
        return loss_on(self.model, chosen, self.pad_id)

    def fresh_history(self) -> History:
        return History.start(len(self.weights.blocks), self.weights.device)

    def curve(self) -> list[float]:
        """The held-out divergence before learning and after every window."""
        values = []
        for snapshot in self.snapshots:
            self.recipe.nets.load_state_dict(snapshot)
            values.append(self.score(self.recipe.nets))
        self.recipe.nets.load_state_dict(self.snapshots[-1])
        return values

    def pooled_costs(self) -> list[Tensor]:
        """Of every learning set, (blocks,) fp32 each."""
        return [self.layout.pooled(cost) for cost in self.costs]

    def score(self, nets: PertNN | ScaleNet) -> float:
        """The held-out divergence of these networks."""
        return score(self.points, self.layout.numels, nets, self.share)

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "slower": self.slower,
            "recipe": self.recipe.state_dict(),
            "histories": [history.state_dict() for history in self.histories],
            "costs": [cost.state_dict() for cost in self.costs],
            "points": [point.state_dict() for point in self.points],
            "first_losses": list(self.first_losses),
            "energies": list(self.energies),
            "snapshots": list(self.snapshots),
            "log": list(self.log),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.weights.device
        self.window, self.slower = state["window"], state["slower"]
        self.recipe.load_state_dict(state["recipe"])
        for history, saved in zip(self.histories, state["histories"], strict=True):
            history.load_state_dict(saved)
        for cost, saved in zip(self.costs, state["costs"], strict=True):
            cost.load_state_dict(saved, device)
        self.points = [Point.from_state(saved, device) for saved in state["points"]]
        self.first_losses = list(state["first_losses"])
        self.energies = [energy.to(device) for energy in state["energies"]]
        self.snapshots, self.log = list(state["snapshots"]), list(state["log"])


def _make_recipe(weights: Weights, share: Tensor, settings: LearnSettings, steps: int, costs: list[Mean]):
    names, numels = weights.blocks.names, weights.blocks.numels
    if settings.recipe == "improved":
        nets = ScaleNet.fresh(names, numels).to(weights.device)
        return ImprovedRecipe(
            weights, nets, share, window=steps, costs=costs, horizon=settings.horizon, lr_mlp=settings.lr_mlp,
            eps=settings.eps,
        )  # fmt: skip
    nets = PertNN.fresh(names, seed=settings.seed).to(weights.device)
    trajectory = SGDTrajectory(weights, keep_gradients=settings.keep_gradients)
    return PaperRecipe(
        weights, nets, share, trajectory, lr_mlp=settings.lr_mlp, lr_update=settings.lr_update,
        lr_llm=settings.lr_llm, eps=settings.eps, zeroth_order=settings.zeroth_order,
    )  # fmt: skip


def _copied(nets: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in nets.state_dict().items()}
