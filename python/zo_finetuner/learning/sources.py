"""What an optimizer is learned on: tasks of the MeZO protocol and plain text, each as a learning set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_finetuner.data import load_splits
from zo_finetuner.encoding import Encoded, collate, context_length, encode_rows
from zo_finetuner.errors import InputError
from zo_finetuner.learning.text import text_windows
from zo_finetuner.objective import training_loss
from zo_finetuner.tasks import get_task
from zo_kernels import derive_seed


@dataclass(frozen=True)
class LearningSet:
    """Rows to learn on, and rows held out for the meta loss and the choice of the best networks."""

    name: str
    train: list[Encoded]
    held_out: list[Encoded]

    @property
    def few_answers(self) -> bool:
        """Whether its loss is a choice between candidates: it asks for few rows of a vocabulary."""
        return self.train[0].kind == "classification"

    def require(self, batch_size: int) -> None:
        """InputError unless a batch can be learned on and another one held out."""
        for rows, what in ((self.train, "learn on"), (self.held_out, "hold out")):
            if len(rows) < batch_size:
                raise InputError(
                    f"{self.name}: {len(rows)} rows to {what} are fewer than a batch of {batch_size}; "
                    f"give more rows, or a smaller --batch-size"
                )


def task_set(
    name: str, data: str | None, model: nn.Module, tokenizer: Any, *, seed: int, num_train: int | None,
    num_held_out: int | None, max_length: int,
) -> LearningSet:  # fmt: skip
    """The task's train rows, and its dev rows held out; the validation split is not looked at.

    data: the task's folder, a folder that holds one of the task's name, a Hub dataset, or None for the task's own."""
    task = get_task(name)
    if data is not None and (Path(data) / task.name).is_dir():
        data = str(Path(data) / task.name)
    rows = load_splits(task, data, seed=seed, num_train=num_train, num_dev=num_held_out, num_eval=0)
    limit = min(max_length, context_length(model))
    return LearningSet(
        task.name, encode_rows(task, rows.train, tokenizer, limit), encode_rows(task, rows.dev, tokenizer, limit)
    )


def text_set(
    path: str, model: nn.Module, tokenizer: Any, *, seed: int, num_train: int, num_held_out: int, length: int
) -> LearningSet:
    """Windows of plain text, for language modelling; the held-out windows come from other documents."""
    limit = min(length, context_length(model))
    train, held_out = text_windows(Path(path), tokenizer, limit, seed=seed, counts=(num_train, num_held_out))
    return LearningSet(f"text:{Path(path).name}", train, held_out)


def batch_rows(rows: list[Encoded], size: int, number: int, seed: int) -> list[Encoded]:
    """Batch `number` (from 0) of an endless pass over the rows, each epoch in an order of its own; the rows that do not
    fill a batch are left out of their epoch."""
    epoch, place = divmod(number, len(rows) // size)
    order = np.random.RandomState(derive_seed(seed, epoch, 0) & 0xFFFFFFFF).permutation(len(rows))
    return [rows[i] for i in order[place * size : (place + 1) * size]]


def loss_on(model: nn.Module, rows: list[Encoded], pad_id: int) -> Callable[[], Tensor]:
    """() -> mean loss of the batch at the model's weights as they are (0-dim fp32, differentiable)."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(rows, pad_id).items()}

    def loss() -> Tensor:
        total, weight = training_loss(model, batch)
        return total / weight

    return loss


@torch.no_grad()
def mean_loss(model: nn.Module, rows: list[Encoded], pad_id: int, batch_size: int) -> float:
    """Mean over batches of the loss on rows in their order."""
    starts = range(0, len(rows) - batch_size + 1, batch_size)
    return sum(float(loss_on(model, rows[i : i + batch_size], pad_id)()) for i in starts) / len(starts)
