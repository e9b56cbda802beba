"""What a run trains on and is measured by: rows in three splits, how they become batches, a loss and a metric.

`training` and `zo eval` know this interface only; tasks, rows of one's own and objectives of one's own are behind it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_finetuner.config import RunConfig
from zo_finetuner.data import Splits, load_splits
from zo_finetuner.encoding import Encoded, collate, encode_rows, pad_token
from zo_finetuner.errors import InputError, RunStopped
from zo_finetuner.evaluation import batches, evaluate_split, evaluating, mean_token_loss, to_device
from zo_finetuner.isolation import can_pack
from zo_finetuner.objective import training_loss
from zo_finetuner.own.encoding import encode_own
from zo_finetuner.own.formats import Format
from zo_finetuner.own.objective import OwnObjective, collate_rows
from zo_finetuner.own.splits import load_own
from zo_finetuner.ranks import joined
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

    def rehearse(self, model: nn.Module, examples: Sequence[Encoded], tokenizer: Any) -> None:
        """Raises InputError for what can only be found wrong with a model and a first batch."""

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


class OwnWorkload(Workload):
    """A user's own rows (`own.formats`): cross-entropy of the tokens to learn, every token counted once, and its
    exponential."""

    metric = "perplexity"

    def __init__(self, name: str, splits: Splits, format: Format):
        self.name, self.splits, self.format = name, splits, format

    def encode(self, split: str, tokenizer: Any, max_length: int) -> list[Encoded]:
        return encode_own(getattr(self.splits, split), self.format, tokenizer, max_length, split)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Encoded], tokenizer: Any, batch_size: int, progress: bool = False
    ) -> dict[str, float]:
        loss = mean_token_loss(model, examples, pad_token(tokenizer), batch_size, progress)
        return {"loss": loss, "perplexity": float(np.exp(np.float64(loss))), "n": len(examples)}

    def facts(self) -> dict[str, Any]:
        return {"origin": self.splits.origin, "format": str(self.format)}


class ObjectiveWorkload(Workload):
    """The rows of another workload under an objective of one's own, which is the metric too."""

    def __init__(self, rows: Workload, own: OwnObjective):
        self._rows, self._own = rows, own
        self.name, self.splits = f"{rows.name}, {own.name}", rows.splits
        self.metric = own.name if own.name not in ("loss", "n") else "objective"

    def encode(self, split: str, tokenizer: Any, max_length: int) -> list[Encoded]:
        return self._rows.encode(split, tokenizer, max_length)

    def collator(self, model: nn.Module, tokenizer: Any, few_shapes: bool = False) -> Collator:
        return partial(collate_rows, pad_id=pad_token(tokenizer))

    def objective(self, tokenizer: Any) -> Objective:
        def weighted(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            count = len(batch["rows"])
            try:
                loss = self._own.loss(self._own(model, tokenizer, batch))
            except InputError as error:
                if joined():  # the other processes are in the middle of a step, and cannot be asked for their faults
                    raise RunStopped(str(error)) from error
                raise
            loss = torch.as_tensor(loss, dtype=torch.float32, device=batch["input_ids"].device)
            return loss * count, loss.new_full((), count)

        return weighted

    def evaluate(
        self, model: nn.Module, examples: Sequence[Encoded], tokenizer: Any, batch_size: int, progress: bool = False
    ) -> dict[str, float]:
        lengths = [len(e.prompt) for e in examples]
        total = 0.0
        with evaluating(model):
            for some in batches(lengths, [1] * len(examples), batch_size, progress):
                total += float(self._value(model, [examples[i] for i in some], tokenizer)) * len(some)
        value = total / len(examples)
        return {"loss": self._own.loss(value), self.metric: value, "n": len(examples)}

    def rehearse(self, model: nn.Module, examples: Sequence[Encoded], tokenizer: Any) -> None:
        with evaluating(model):
            self._own.require_finite(self._value(model, examples, tokenizer))

    def _value(self, model: nn.Module, examples: Sequence[Encoded], tokenizer: Any) -> Tensor | float:
        return self._own(model, tokenizer, to_device(model, collate_rows(examples, pad_token(tokenizer))))

    def facts(self) -> dict[str, Any]:
        return self._rows.facts()


def make_workload(config: RunConfig) -> Workload:
    """What a run's settings name, its rows read and checked.  Raises InputError."""
    if config.objective:
        own = OwnObjective(config.objective, config.maximize)
        return ObjectiveWorkload(_rows(config, prompts=True), own)
    return _rows(config)


def _rows(config: RunConfig, prompts: bool = False) -> Workload:
    """prompts: whether prompts without answers will do."""
    sizes = {"num_train": config.num_train, "num_dev": config.num_dev, "num_eval": config.num_eval}
    if config.task:
        task = get_task(config.task)
        return TaskWorkload(task, load_splits(task, config.data, seed=config.data_seed, **sizes))
    sources = (config.data, config.dev_data, config.test_data)
    splits, format = load_own(*sources, columns=config.columns, seed=config.data_seed, **sizes, prompts=prompts)
    return OwnWorkload(Path(config.data or config.test_data).name, splits, format)


def prior_loss(task: Task, train: list[Row], held_out: list[Row]) -> float | None:
    """Loss of always answering the training prior: -mean log p(label), p from the training rows.  None where
    candidates differ from row to row."""
    if task.kind != "classification":
        return None
    counts = Counter(map(task.label, train))
    classes = range(len(task.candidates(train[0])))
    smoothed = {label: (counts[label] + 1e-9) / (len(train) + 1e-9 * len(classes)) for label in classes}
    return -sum(math.log(smoothed[task.label(row)]) for row in held_out) / len(held_out)
