"""A model on a cell's rows: a run of a zeroth-order method by the library's engine, or of first-order Adam.

Every run begins at the base weights.  Batches depend on the seed alone, so all methods see the same ones; probing is
the engine's choice by dtype, the same for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.quality.cells import BATCH, EPS, Cell, load_rows
from zo_finetuner.encoding import Encoded, collate, pad_token
from zo_finetuner.engine import Engine
from zo_finetuner.evaluation import evaluate_split
from zo_finetuner.isolation import can_pack
from zo_finetuner.learning.sources import batch_rows
from zo_finetuner.loading import load_model
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import Method
from zo_finetuner.prediction import method_bytes

POINTS = 8  # of a run where held-out rows are evaluated, besides the start
SMALL_RATE = 1e-6  # of `travel`
LOST = 1e3  # the loss of a run that left the finite numbers: a row holds finite ones
ADAM_POINTS, ADAM_STEPS = 5, 100

Make = Callable[[nn.Module, int], Method]  # of the model and the seed


@dataclass
class Run:
    """curve: (forwards, loss on the rows asked for); accuracy of the last point; seconds: held-out rows included, by
    the clock and of the processor (one thread's: the clock of an idle machine); diverged: it was stopped early, or
    ended worse than at the start by a tenth and .3; forwards: of a step; state: of the method, in units of the
    weights."""

    curve: list[tuple[int, float]]
    accuracy: float | None
    steps: int
    seconds: float
    processor_seconds: float
    diverged: bool = False
    forwards: int = 1
    state: float | None = None

    @property
    def loss(self) -> float:
        return self.curve[-1][1]


class Watch:
    """Seconds from here on."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """By the clock, and of this process's threads."""
        return time.perf_counter() - self._started[0], time.process_time() - self._started[1]


class Bed:
    """cell: what is deployed.  dtype of the weights: float32, as the learned scales' own."""

    def __init__(self, cell: Cell, shared: Path, work: Path):
        self.cell = cell
        self.model, self.tokenizer = load_model(cell.model, "float32")
        self.rows = load_rows(cell, shared, work, self.model, self.tokenizer)
        self._pad = pad_token(self.tokenizer)
        self._packed = not cell.is_text and can_pack(self.model)  # windows are all of one length
        self._base = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._first: dict[str, tuple[float, float | None]] = {}

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, base in zip(self.model.parameters(), self._base, strict=True):
            parameter.requires_grad_(True)
            parameter.copy_(base)
            parameter.grad = None

    def first(self, split: str) -> tuple[float, float | None]:
        """Loss and accuracy at the base weights."""
        if split not in self._first:
            self.restore()
            self._first[split] = self.evaluate(split)
        return self._first[split]

    @torch.no_grad()
    def evaluate(self, split: str) -> tuple[float, float | None]:
        """(mean loss, accuracy or None) on "dev" or "test" rows."""
        rows: list[Encoded] = getattr(self.rows, split)
        if self.rows.task is not None:
            values = evaluate_split(self.model, self.rows.task, rows, self.tokenizer, 2 * BATCH)
            return _finite(values["loss"]), values.get("accuracy")
        total = weight = 0.0
        for start in range(0, len(rows), 2 * BATCH):
            sums = training_loss(self.model, self._collate(rows[start : start + 2 * BATCH]))
            total, weight = total + float(sums[0]), weight + float(sums[1])
        return _finite(total / weight), None

    def zeroth_order(self, make: Make, lr: float, seed: int, split: str, eps: float = EPS) -> Run:
        """As many steps as the cell's forwards give.  On test rows a point at every 8th of the steps, on dev rows the
        end alone; stopped when the training loss of an 8th says that it diverged.  Raises InputError."""
        first, _ = self.first(split)
        self.restore()
        engine = Engine(self.model, make(self.model, seed), eps=eps, seed=seed)
        forwards, blocks = engine.method.forwards, engine.blocks
        state = method_bytes(engine.method, blocks) / sum(t.nbytes for t in blocks.tensors)
        steps = self.cell.steps_of(forwards)
        watch, curve, losses = Watch(), [(0, first)], []
        for step in range(1, steps + 1):
            losses.append(engine.step(self._loss_fn(step - 1, seed), lr))
            if step * POINTS // steps == (step - 1) * POINTS // steps:
                continue
            mean, losses = float(torch.stack(losses).mean()), []
            lost = self._diverged(mean)
            if split == "test" or step == steps or lost:
                loss, accuracy = self.evaluate(split)
                curve.append((step * forwards, loss))
            if lost:
                break
        diverged = lost or self._diverged(curve[-1][1])
        return Run(curve, accuracy, step, *watch.read(), diverged, forwards, state)

    @torch.no_grad()
    def travel(self, make: Make, forwards: int, eps: float = EPS) -> float:
        """How far the weights are from the base after so many forwards, per rate, where rates are small."""
        self.restore()
        engine = Engine(self.model, make(self.model, 0), eps=eps)
        for number in range(max(1, forwards // engine.method.forwards)):
            engine.step(self._loss_fn(number, 0), SMALL_RATE)
        names = (name for name, _ in self.model.named_parameters())
        moved = self.model.state_dict()  # with what a method collects before it writes the weights
        pairs = ((moved[name], base) for name, base in zip(names, self._base, strict=True))
        return math.sqrt(sum(float((p - base).double().square().sum()) for p, base in pairs)) / SMALL_RATE

    def probe(self, make: Make) -> float:
        """Seconds of a step at rate 0, the faster of the second and third."""
        engine, seconds = Engine(self.model, make(self.model, 0), eps=EPS), []
        for number in range(3):
            loss_fn, started = self._loss_fn(number, 0), time.perf_counter()
            float(engine.step(loss_fn, 0.0))
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    def adam(self, lr: float, seed: int, split: str) -> Run:
        """First-order Adam at a constant rate; the point of the lowest dev loss counts, and is the curve's last."""
        first, _ = self.first(split)
        self.restore()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        watch, best, curve = Watch(), (math.inf, first, None), [(0, first)]
        for step in range(1, ADAM_STEPS + 1):
            self._loss_fn(step - 1, seed)().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % (ADAM_STEPS // ADAM_POINTS) == 0:
                dev, accuracy = self.evaluate("dev")
                if dev < best[0]:
                    loss, accuracy = (dev, accuracy) if split == "dev" else self.evaluate(split)
                    best = (dev, loss, accuracy)
                    curve.append((step, loss))
                elif dev > best[0] + 0.3:
                    break
        return Run(curve, best[2], step, *watch.read())

    def _loss_fn(self, number: int, seed: int) -> Callable[[], Tensor]:
        batch = self._collate(batch_rows(self.rows.train, self.cell.batch, number, seed))

        def loss() -> Tensor:
            total, weight = training_loss(self.model, batch)
            return total / weight

        return loss

    def _collate(self, rows: list[Encoded]) -> dict[str, Tensor]:
        device = self._base[0].device
        return {name: tensor.to(device) for name, tensor in collate(rows, self._pad, packed=self._packed).items()}

    def _diverged(self, loss: float) -> bool:
        first = next(iter(self._first.values()))[0]
        return not math.isfinite(loss) or loss > 1.1 * first + 0.3


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) and loss < LOST else LOST
