"""What a run trains on and is measured by: rows in three splits, how they become batches, a loss and a metric.

`training` and `zo eval` know this interface only; a task and whatever else can be trained on are behind it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from zo_finetuner.config import RunConfig
from zo_finetuner.data import Splits, load_splits
from zo_finetuner.encoding import Encoded, collate, encode_rows, pad_token
from zo_finetuner.evaluation import evaluate_split
from zo_finetuner.isolation import can_pack
from zo_finetuner.objective import training_loss
from zo_finetuner.tasks import Task, get_task
from zo_finetuner.tasks.templates import Row

SPLITS = ("train", "dev", "test")
Collator = Callable[[Sequence[Encoded]], dict[str, Any]]
Objective = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor]]


class Workload:
    """name: of the rows, for titles.  metric: what `evaluate` gives besides the loss.  splits: the rows."""

    name: str
    metric: str
    splits: Splits

    def encode(self, split: str, tokenizer: Any, max_length: int) -> list[Encoded]:
        """The rows of "train", "dev" or "test" as token ids, at most max_length each.  Raises InputError."""
        raise NotImplementedError

    def evaluate(
        self, model: nn.Module, examples: Sequence[Encoded], tokenizer: Any, batch_size: int, progress: bool = False
    ) -> dict[str, float]:
        """{"loss": what is minimised, self.metric: ..., "n": number of rows}."""
        raise NotImplementedError

    def collator(self, model: nn.Module, tokenizer: Any, few_shapes: bool = False) -> Collator:
        """Encoded rows -> a batch of the objective."""
        return partial(collate, pad_id=pad_token(tokenizer), packed=can_pack(model), few_shapes=few_shapes)

    def objective(self, tokenizer: Any) -> Objective:
        """(model, batch) -> (loss_sum, weight), see `objective`."""
        return training_loss

    def facts(self) -> dict[str, Any]:
        """What result.json says of the rows besides their numbers."""
        return {"origin": self.splits.origin}

    def prior_loss(self) -> float | None:
        """Loss of an answer that looks at no row, where there is one."""
        return None


class TaskWorkload(Workload):
    """One of the eleven tasks: cross-entropy of its options, accuracy or F1."""

    def __init__(self, task: Task, splits: Splits):
        self.task, self.splits = task, splits
        self.name, self.metric = task.name, task.metric

    def encode(self, split: str, tokenizer: Any, max_length: int) -> list[Encoded]:
        return encode_rows(self.task, getattr(self.splits, split), tokenizer, max_length)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Encoded], tokenizer: Any, batch_size: int, progress: bool = False
    ) -> dict[str, float]:
        return evaluate_split(model, self.task, examples, tokenizer, batch_size, progress)

    def prior_loss(self) -> float | None:
        return prior_loss(self.task, self.splits.train, self.splits.test)


def make_workload(config: RunConfig) -> Workload:
    """What a run's settings name, its rows read and checked.  Raises InputError."""
    task = get_task(config.task)
    sizes = {"num_train": config.num_train, "num_dev": config.num_dev, "num_eval": config.num_eval}
    return TaskWorkload(task, load_splits(task, config.data, seed=config.data_seed, **sizes))


def prior_loss(task: Task, train: list[Row], held_out: list[Row]) -> float | None:
    """Loss of always answering the training prior: -mean log p(label), p from the training rows.  None where
    candidates differ from row to row."""
    if task.kind != "classification":
        return None
    counts = Counter(map(task.label, train))
    classes = range(len(task.candidates(train[0])))
    smoothed = {label: (counts[label] + 1e-9) / (len(train) + 1e-9 * len(classes)) for label in classes}
    return -sum(math.log(smoothed[task.label(row)]) for row in held_out) / len(held_out)
