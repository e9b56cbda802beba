"""Zeroth-order steps in an unmodified Hugging Face Trainer.

The mixin replaces one thing: what happens with an accumulation window.  Schedules, callbacks, `report_to`,
checkpoints, `load_best_model_at_end` and resume stay the Trainer's.  It goes over any Trainer that keeps
`training_step`:

    class MyZOTrainer(ZOTrainerMixin, MyTrainer): ...       TRL's SFTTrainer: `sft.ZOSFTTrainer`

All micro-batches of a window are evaluated under one perturbation, so 8 x 1 equals 2 x 4 examples.

Under torchrun or accelerate the processes take every step together (`ranks.py`): the Trainer deals the rows, rank 0
logs and saves.  There are no gradients to average, so the model is wrapped in nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from zo_finetuner.agreement import agreed, data_facts, digest, method_facts, model_facts, require_same
from zo_finetuner.checkpoints import WholeCheckpoints
from zo_finetuner.errors import InputError
from zo_finetuner.masks import masks_unread
from zo_finetuner.model_card import CardFacts, Result, write_card
from zo_finetuner.optim.base import Method
from zo_finetuner.optim.create import check_method
from zo_finetuner.optimizer import ZOOptimizer, create_zo_optimizer
from zo_finetuner.progress import Speed
from zo_finetuner.ranks import Ranks, joined, leads
from zo_finetuner.recorder import Recorder

Objective = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor]]


class ZOTrainerMixin(WholeCheckpoints):
    """Keyword arguments besides the Trainer's own:

    zo: what `create_zo_optimizer` takes besides the learning rate, weight decay and seed, which are the
        TrainingArguments': {"optimizer": "zo-finetuner", "eps": 1e-3, "pertnn": FILE, "probing": "auto",
        "limits": Limits(clip=1.0)}.  With "journal": PATH every step is written down there (`zo replay` rebuilds the
        weights of any step from it).  With "graphs": True steps are repeated as CUDA graphs, one for each shape of a
        window: `compute_loss` or objective then runs twice for a shape and not again.  With "probe_ranks": N, so many
        of several processes share the probes of a step.
    objective: (model, batch) -> (loss_sum, weight); the window's loss is sum(loss_sum) / sum(weight).
        None: the Trainer's own `compute_loss`.
    """

    def __init__(self, *args: Any, zo: dict[str, Any] | None = None, objective: Objective | None = None, **kwargs):
        self._zo_arguments = dict(zo or {})
        self._objective = objective
        self._window: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = None  # of fp16: there are no gradients to scale
        self._speed = Speed()
        self.add_callback(self._speed)
        if self.args.n_gpu > 1:
            raise InputError(f"one process drives one GPU, this one sees {self.args.n_gpu}: start one for each with "
                             f"torchrun --nproc-per-node {self.args.n_gpu}, or set CUDA_VISIBLE_DEVICES=0")
        probe_ranks = self._zo_arguments.pop("probe_ranks", 1)
        self._ranks = Ranks(probe_ranks) if joined() else None
        if joined():  # evaluation_mode: no DistributedDataParallel around the model; the Trainer has placed it
            prepare, as_it_is = self.accelerator.prepare_model, {"device_placement": False, "evaluation_mode": True}
            self.accelerator.prepare_model = lambda model, **_: prepare(model, **as_it_is)

    @property
    def zo_optimizer(self) -> ZOOptimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # Made here and not by the caller: only now is the model where it will be trained.
        if self.optimizer is None:
            batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
            batch *= self._ranks.data if self._ranks else 1
            arguments = {"seed": self.args.seed, "batch_size": batch, "ranks": self._ranks} | self._zo_arguments
            if not leads():
                arguments.pop("journal", None)
            if isinstance(arguments.get("journal"), str | os.PathLike):
                arguments["journal"] = Recorder(arguments["journal"], schedule_of(self.args))
            self.optimizer = create_zo_optimizer(
                self.model if model is None else model,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                **arguments,
            )
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Ranks that share probes see the same rows."""
        loader = super().get_train_dataloader()
        if self._ranks and self._ranks.probes > 1:
            sampler = getattr(loader, "batch_sampler", None)
            if not hasattr(sampler, "process_index"):
                raise InputError("probe_ranks need training rows with a length, which can be dealt by number")
            sampler.num_processes, sampler.process_index = self._ranks.data, self._ranks.data_rank
        return loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._ranks:
            with agreed():
                self._require_agreement()
        try:
            return super().train(*args, **kwargs)
        finally:
            if isinstance(self.zo_optimizer, ZOOptimizer):
                self.zo_optimizer.engine.flush()
                if self.zo_optimizer.engine.journal is not None:
                    self.zo_optimizer.engine.journal.sync()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.zo_optimizer.engine.journal is not None:  # it must not lack a step that the checkpoint has
            self.zo_optimizer.engine.journal.sync()
        super()._save_checkpoint(*args, **kwargs)

    def _require_agreement(self) -> None:
        """InputError where ranks would not take the same steps."""
        method = self._method()
        facts = model_facts(self.model) | {"training data": data_facts(self.train_dataset)}
        own = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
               "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")  # fmt: skip
        facts["TrainingArguments"] = digest([str(getattr(self.args, name)) for name in own])
        plain = {n: value for n, value in self._zo_arguments.items() if isinstance(value, str | int | float | dict)}
        facts["settings of the optimizer"] = digest(plain) + method_facts(method)
        require_same(facts, method)

    def _method(self) -> Method:
        """That of the steps to come; of a name, as it is before the model is where it will be trained."""
        if isinstance(self.zo_optimizer, ZOOptimizer):
            return self.zo_optimizer.engine.method
        asked = self._zo_arguments.get("optimizer", "mezo")
        if isinstance(asked, Method):
            return asked
        given = {name: self._zo_arguments[name] for name in ("settings", "dist") if self._zo_arguments.get(name)}
        return check_method(asked, settings=given.pop("settings", {}) | given)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._window.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)  # the window's last micro-batch reports for all
        self._speed.count(self._window, self._ranks.data if self._ranks else 1)
        window, self._window = [dict(batch) for batch in self._window], []
        self._stepped_model = model
        with self.compute_loss_context_manager():
            self.zo_optimizer.evaluate_on(self._loss_of, (window, num_items_in_batch))
        return self.zo_optimizer.engine.last_loss.clone()

    def _loss_of(self, inputs: tuple[list[dict[str, Any]], Any]) -> Tensor:
        """The window (`window.py`) of its micro-batches and of what the Trainer counted in them."""
        model, (window, num_items_in_batch) = self._stepped_model, inputs
        if self._objective is not None:
            sums, weights = zip(*(self._objective(model, batch) for batch in window), strict=True)
            return torch.stack((torch.stack(sums), torch.stack(weights)))
        with masks_unread():
            losses = [self.step_loss(model, dict(batch), num_items_in_batch) for batch in window]
        losses = torch.stack(losses).float()
        weights = torch.ones_like(losses)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # a Trainer's own word for it, of transformers 5.1 on
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        if scaled:
            # Each loss is already divided by the number of tokens of the whole window, and the Trainer has multiplied
            # it by the number of processes, whose mean is the window's: a window weighs 1.
            weights[1:].zero_()  # a value set by index comes from the host: no CUDA graph
        return torch.stack((losses, weights))

    def step_loss(self, model: nn.Module, batch: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """What a step minimises, of one micro-batch."""
        return self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)

    def create_model_card(self, model_name: str | None = None, finetuned_from: str | None = None, **hub: Any) -> None:
        """README.md in the output folder, which `push_to_hub` sends with the model: `model_card.py`.  hub: of the
        Trainer's arguments, language, license, tags and dataset are told."""
        if not self.is_world_process_zero() or not isinstance(self.zo_optimizer, ZOOptimizer):
            return
        out, engine = Path(self.args.output_dir), self.zo_optimizer.engine
        data = hub.get("dataset") or hub.get("dataset_name") or ""
        told = {name: hub[name] for name in ("language", "license", "tags") if hub.get(name)}
        told.setdefault("tags", getattr(self, "_tag_names", None))  # TRL's
        journal = None if engine.journal is None else engine.journal.path
        if journal is not None:
            engine.journal.sync()
        facts = CardFacts(
            model_name or out.name, schedule_of(self.args), _held_out(self.state.log_history),
            data if isinstance(data, str) else ", ".join(data), journal, told,
        )
        write_card(out, engine, facts)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor:
        """The log's `grad_norm` is |g|, the projected gradient."""
        return self.zo_optimizer.engine.projected_grad.abs()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and isinstance(self.zo_optimizer, ZOOptimizer):
            numbers = self.zo_optimizer.engine.metrics() | self._speed.since_last_log()
            logs |= {f"zo/{name}": value for name, value in numbers.items()}
            logs["grad_norm"] = abs(numbers["projected_grad"])  # transformers 5.0 asks for no `_get_grad_norm`
        super().log(logs, *args, **kwargs)


def schedule_of(args: TrainingArguments) -> dict[str, Any]:
    """What a journal's header says of the order of the data and of the schedule."""
    names = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
             "num_train_epochs", "learning_rate", "weight_decay", "warmup_steps")  # fmt: skip
    return {name: getattr(args, name) for name in names} | {"lr_scheduler_type": str(args.lr_scheduler_type.value)}


def _held_out(history: list[dict[str, Any]]) -> list[Result]:
    """The last evaluation, against the first where there were several."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    timed = ("runtime", "per_second", "num_tokens")
    numbers = {n: v for n, v in last.items() if n.startswith("eval_") and isinstance(v, int | float)}
    return [Result(name[5:], number, first.get(name) if first is not last else None)
            for name, number in numbers.items() if not name.endswith(timed)]  # fmt: skip


class ZOTrainer(ZOTrainerMixin, Trainer):
    """The Trainer with zeroth-order steps: `ZOTrainer(model, args, train_dataset=..., zo={"optimizer": "mezo"})`."""
