"""The main job: `zo train`.  Rows -> checked -> encoded -> Trainer with zeroth-order steps -> result.json.

Everything that can be wrong with the input is found before the output folder is made.  OUT holds afterwards:
config.yaml (as resolved), journal.zoj (every step), log.jsonl, model/ (best on dev), checkpoint-N/, report.html,
curve.png, and last of all result.json.  A run that is interrupted, killed or out of disk space goes on with --resume.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from zo_finetuner.agreement import agreed, data_facts, digest, exchange, model_facts, require_same
from zo_finetuner.config import RunConfig
from zo_finetuner.encoding import Encoded, context_length
from zo_finetuner.errors import InputError
from zo_finetuner.files import whole_folder, write_json, write_text
from zo_finetuner.fits import require_fits
from zo_finetuner.hf import ZOTrainerMixin, schedule_of
from zo_finetuner.hub import push_run, require_hub
from zo_finetuner.interruption import StopAfterStep
from zo_finetuner.loading import load_model
from zo_finetuner.model_card import CardFacts, Result, write_card
from zo_finetuner.optim import Method, make_method
from zo_finetuner.positions import Position, ResumesFromJournal, best_of, take_best, why_not
from zo_finetuner.probing import require_goes
from zo_finetuner.progress import LogFile, Progress
from zo_finetuner.ranks import Ranks, divided, joined, leads
from zo_finetuner.reading import read_object, shown
from zo_finetuner.recorder import Recorder
from zo_finetuner.replay import branch_off
from zo_finetuner.report_page import PAGE, PICTURE, write_report
from zo_finetuner.reporters import require_reporter
from zo_finetuner.run_folder import JOURNAL, LOG, RunFolder
from zo_finetuner.runs import Run
from zo_finetuner.workload import SPLITS, Workload, make_workload

AGAIN = "remove the file, and it is measured again"


class TaskTrainer(ResumesFromJournal, ZOTrainerMixin, Trainer):
    """Evaluates dev rows as the workload does: eval_loss is what is minimised, eval_<metric> its metric."""

    def __init__(self, *args: Any, work: Workload, tokenizer: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._work, self._tokenizer = work, tokenizer

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"):
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        values = self._work.evaluate(self.model, examples, self._tokenizer, size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items() if name != "n"}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@agreed()
def train(config: RunConfig) -> dict[str, Any]:
    """Run the whole job; returns what result.json holds.  Raises InputError before anything is written.

    Several processes run it together, the first of them writes."""
    config.check()
    data_ranks = Ranks(config.probe_ranks).data if joined() else 1
    shape = divided(config.batch_size, config.grad_accum, data_ranks)
    folder = RunFolder(Path(config.output_dir), config.resume, config.overwrite) if leads() else nullcontext()
    with folder as held:
        return _train(config, shape, held)


def _train(config: RunConfig, shape: tuple[int, int], folder: RunFolder | None) -> dict[str, Any]:
    """shape: rows in a micro-batch and micro-batches in a window, of this process; folder: None unless it leads."""
    out = Path(config.output_dir)
    if folder is not None:
        folder.require_same(dataclasses.asdict(config))
    require_reporter(config.report_to)
    if config.push_to_hub and leads():
        require_hub(config.push_to_hub)
    work = make_workload(config)
    require_fits(config)
    model, tokenizer = load_base(config)
    graphs = not joined() and use_graphs(config.graphs, model)
    limit = context_length(model, config.max_length)
    splits = {split: work.encode(split, tokenizer, limit) for split in SPLITS}
    method = make_method(
        config.optimizer, model, batch_size=config.batch_size * config.grad_accum, seed=config.seed,
        pertnn=config.pertnn, settings=config.set, transfer=config.transfer,
    )
    require_goes(config.probing, method)
    work.rehearse(model, splits["train"][: config.batch_size], tokenizer)

    settings = {"settings of the run": digest(dataclasses.asdict(config))}
    require_same(settings | model_facts(model) | {"training data": data_facts(splits["train"])}, method)
    journalled, position, checkpoint = not why_not(config, model), None, None
    if not journalled:
        checkpoint = exchange(folder.last_checkpoint() if folder is not None else None)[0]
    elif config.resume:
        position = Position.of(out / JOURNAL, out / LOG, config.steps, evaluates_every(config))
    if folder is not None:
        folder.open()
        if checkpoint is None and position is None:
            (out / JOURNAL).unlink(missing_ok=True)
        write_text(out / "config.yaml", config.to_yaml())
        print(config.to_yaml(), end="", flush=True)

    size = config.eval_batch_size
    measure = partial(work.evaluate, model, splits["test"], tokenizer, size, progress=leads())
    before = exchange(_saved_before(out, work.metric) if checkpoint or position else None)[0]
    if before is None:
        _peak_bytes()
        before = measure() | {"peak_bytes": _peak_bytes()}
        if leads():
            write_json(out / "before.json", before)
    _say("before", before, work.metric)

    trainer = _trainer(config, shape, out, model, tokenizer, work, splits, method, graphs)
    started = time.perf_counter()
    kept = "journal" if journalled else "checkpoint" if config.checkpoints else ""
    with StopAfterStep(f"zo train --config {out / 'config.yaml'} --resume", kept, not joined()) as stop:
        trainer.add_callback(stop)
        if position is None:
            trainer.train(resume_from_checkpoint=checkpoint)
        else:
            trainer.resume(position)
    seconds, training = time.perf_counter() - started, _peak_bytes()
    history, engine = trainer.state.log_history, trainer.zo_optimizer.engine
    if journalled and config.checkpoints:
        take_best(config, engine, out / JOURNAL, history)
    best = best_of(history) if config.checkpoints else None
    after = measure()
    _say("after", after, work.metric)

    result = {
        "steps": engine.step_count,
        "forwards": engine.step_count * engine.method.forwards,
        "seconds": seconds,
        "metric": work.metric,
        "eval_loss_before": before["loss"],
        "eval_loss_after": after["loss"],
        "eval_metric_before": before[work.metric],
        "eval_metric_after": after[work.metric],
        "eval_rows": after["n"],
        "prior_loss": work.prior_loss(),
        "best_step": best and best["step"],
        "best_dev_loss": trainer.state.best_metric,
        "skipped_steps": int(engine.skipped),
        "peak_bytes": {"evaluation": before.get("peak_bytes"), "training": training},
        "random_weights": config.random_weights,
        "seed": config.seed,
        "data": work.facts() | {"rows": {name: len(examples) for name, examples in splits.items()}},
        "config": dataclasses.asdict(config),
    }
    if engine.ranks is not None:
        result["ranks"] = engine.ranks.traffic()
    if not leads():
        return result
    if config.save_model:
        with whole_folder(out / "model") as saved:
            trainer.save_model(str(saved))
            tokenizer.save_pretrained(str(saved))
            write_card(saved, engine, _facts(config, trainer, result))
    write_report([Run(str(out), result["config"], history, result)], out / PAGE, out / PICTURE)
    write_json(out / "result.json", result)
    if config.push_to_hub:
        print(f"pushed to {push_run(out, config.push_to_hub)}", flush=True)
    return result


def load_base(config: RunConfig) -> tuple[nn.Module, Any]:
    """(model, tokenizer) as the run begins with them.  Raises InputError."""
    set_seed(config.seed)  # LoRA's initial values
    model, tokenizer = load_model(
        config.model, config.dtype, random_weights=config.random_weights, quantize=config.quantize,
        adapter=config.make_adapter(), seed=config.seed,
    )
    if config.branch:
        branch_off(model, config.branch)
    return model, tokenizer


def _trainer(
    config: RunConfig, shape: tuple[int, int], out: Path, model: nn.Module, tokenizer: Any, work: Workload,
    splits: dict[str, list[Encoded]], method: Method, graphs: bool,
) -> TaskTrainer:
    every = evaluates_every(config)
    checkpoints = config.checkpoints and bool(why_not(config, model))
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=shape[0],
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=shape[1],
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.lr_scheduler,
        lr_scheduler_kwargs=config.schedule_arguments,
        warmup_steps=config.warmup_steps,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps" if checkpoints else "no",
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=checkpoints,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # it waits for the device at every step; the engine has its own
        max_grad_norm=0.0,
        accelerator_config={"non_blocking": model.device.type != "cpu"},  # batches are pinned: sending does not wait
        report_to=config.report_to,
        log_level_replica="error",  # of several processes the first speaks for all
        seed=config.seed,
        remove_unused_columns=False,
        disable_tqdm=True,  # `Progress` has the bar
        use_cpu=model.device.type == "cpu",
    )
    trainer = TaskTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["dev"],
        data_collator=work.collator(model, tokenizer, few_shapes=bool(graphs)),
        work=work,
        tokenizer=tokenizer,
        zo={
            "optimizer": method, "eps": config.eps, "probing": config.probing, "graphs": graphs,
            "limits": config.limits(), "probe_ranks": config.probe_ranks,
            "journal": Recorder(out / JOURNAL, {**schedule_of(arguments), "config": dataclasses.asdict(config)})
            if config.journal and leads() else None,
        },  # fmt: skip
        objective=work.objective(tokenizer),
        callbacks=[LogFile(out / LOG), Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _facts(config: RunConfig, trainer: Trainer, result: dict[str, Any]) -> CardFacts:
    names = {"loss": "loss", "metric": result["metric"]}
    results = [Result(named, result[f"eval_{name}_after"], result[f"eval_{name}_before"], result["eval_rows"])
               for name, named in names.items()]  # fmt: skip
    journal = trainer.zo_optimizer.engine.journal
    if journal is not None:
        journal.sync()
    step = result["best_step"]
    run = schedule_of(trainer.args) | {"weights": f"of step {step}, best on dev rows" if step else "of the last step"}
    return CardFacts(
        (config.push_to_hub or Path(config.output_dir).name).rpartition("/")[2], run, results,
        config.task or Path(str(config.data)).name, None if journal is None else journal.path,
    )


def evaluates_every(config: RunConfig) -> int:
    return config.eval_steps or max(1, config.steps // 5)


def use_graphs(choice: str, model: nn.Module) -> bool:
    """Whether steps are captured; choice: one of `config.GRAPHS`.  InputError for "always" where they cannot be."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    can = len(devices) == 1 and model.device.type == "cuda"
    if choice == "always" and not can:
        raise InputError(f"graphs always: the model is on {', '.join(sorted(devices))}; CUDA graphs need one GPU")
    return can and choice != "never"


def _saved_before(out: Path, metric: str) -> dict[str, float] | None:
    path = out / "before.json"
    if not path.exists():
        return None
    values = read_object(path, AGAIN, finite=False)
    for name in ("loss", metric, "n"):
        if type(values.get(name)) not in (int, float):
            raise InputError(f'{path}: "{name}" is {shown(values.get(name))}, not a number; {AGAIN}')
    return values


def _peak_bytes() -> int | None:
    """Most bytes of tensors on the GPU since this was last asked; None without one."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _say(when: str, values: dict[str, float], metric: str) -> None:
    if leads():
        said = f"{when}: loss {values['loss']:.4f}, {metric} {values[metric]:.3f} on {values['n']} test rows"
        print(said, flush=True)
