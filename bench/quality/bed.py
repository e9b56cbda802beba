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

POINTS = 8  # of a run where held-out rows are evaluated, besides the start
LOST = 1e3  # the loss of a run that left the finite numbers: a row holds finite ones
ADAM_POINTS, ADAM_STEPS = 5, 100


@dataclass
class Run:
    """curve: (forwards, loss on the rows asked for); accuracy of the last point; diverged: it was stopped early, or
    ended worse than at the start by a tenth and .3."""

    curve: list[tuple[int, float]]
    accuracy: float | None
    steps: int
    seconds: float
    diverged: bool = False

    @property
    def loss(self) -> float:
        return self.curve[-1][1]


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

    def zeroth_order(self, make: Callable[[nn.Module, int], Method], lr: float, seed: int, split: str) -> Run:
        """make: (model, seed) -> method.  On test rows a point at every 8th of the steps, on dev rows the end alone;
        stopped when the training loss of an 8th says that it diverged."""
        first, _ = self.first(split)
        self.restore()
        engine = Engine(self.model, make(self.model, seed), eps=EPS, seed=seed)
        forwards = engine.method.forwards
        steps = self.cell.steps * 2 // forwards  # equal forwards
        started, curve, losses = time.perf_counter(), [(0, first)], []
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
        return Run(curve, accuracy, step, time.perf_counter() - started, lost or self._diverged(curve[-1][1]))

    def probe(self, make: Callable[[nn.Module, int], Method]) -> float:
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
        started, best, curve = time.perf_counter(), (math.inf, first, None), [(0, first)]
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
        return Run(curve, best[2], step, time.perf_counter() - started)

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
