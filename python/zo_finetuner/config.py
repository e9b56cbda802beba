"""One run's settings: one dataclass, filled from a YAML file and from flags, unknown keys refused."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zo_finetuner.adapters import ADAPTERS, Adapter, default_rates
from zo_finetuner.errors import InputError, nearest, require_not_negative, require_positive
from zo_finetuner.guards import Limits
from zo_finetuner.loading import DTYPES
from zo_finetuner.optim import METHODS, PRESETS, check_method
from zo_finetuner.probing import MODES
from zo_finetuner.quantised import QUANTISATIONS, require_quantisation
from zo_finetuner.reading import is_plain, shown
from zo_finetuner.yaml_file import read_yaml

GRAPHS = ("auto", "always", "never")  # auto: on a GPU (no "on" and "off", which YAML takes for true and false)


def _option(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RunConfig:
    """Settings of `zo train`.  A flag is the field's name with dashes; a YAML key is the field's name."""

    model: str = _option("", "folder of a Hugging Face model, or a Hub id")
    task: str = _option("", "sst2 rte cb boolq wsc wic multirc copa record squad drop; without: rows of your own")
    data: str | None = _option(
        None, "folder of {train,validation}.jsonl, or a Hub dataset; default: the task's. Without a task: rows of "
        "text, of prompt and completion, or of messages, in a .jsonl, .json, .csv or .parquet file, a folder of such "
        "splits, or a Hub dataset"
    )
    columns: dict = _option({}, "a column of your data by another name, NAME=COLUMN, as prompt=question; repeat it")
    dev_data: str | None = _option(None, "dev rows of your own (default: held out of --data)")
    test_data: str | None = _option(None, "test rows of your own (default: held out of --data)")
    objective: str | None = _option(
        None, "an objective of your own instead of the loss, FILE.py:NAME or MODULE:NAME: (model, batch) or (model, "
        "tokenizer, batch) -> a number, which is minimised"
    )
    maximize: bool = _option(False, "more is better: maximise the objective of your own")
    output_dir: str = _option("", "where the run goes")
    optimizer: str = _option("mezo", " or ".join(METHODS))
    set: dict = _option({}, "a setting of the optimizer, NAME=VALUE; as often as needed (YAML: set: {name: value})")
    pertnn: str | None = _option(
        None, "learned scales (.safetensors or published .pth) for zo-finetuner (default: fresh nets) and other methods"
    )
    transfer: bool = _option(False, "take nets or scales of another depth or width of this family, block by block")
    steps: int = _option(1000, "number of steps")
    batch_size: int = _option(16, "examples per micro-batch")
    grad_accum: int = _option(1, "micro-batches per step, evaluated under one perturbation")
    probe_ranks: int = _option(1, "of several processes so many share the probes of a step, the others its rows")
    lr: float | None = _option(None, "learning rate; default: the optimizer's own, MeZO's is 1e-6")
    eps: float | None = _option(None, "size of the perturbation; default: the optimizer's own, mostly 1e-3")
    seed: int = _option(0, "seed of the directions and of the order of the rows")
    data_seed: int = _option(0, "seed of the sample of train, dev and test rows")
    lr_scheduler: str | None = _option(
        None, "any schedule of the Hugging Face Trainer; default: the optimizer's own, mostly constant"
    )
    warmup_steps: int = _option(0, "steps of learning-rate warm-up")
    weight_decay: float = _option(0.0, "decoupled weight decay, on every trained tensor")
    clip: float = _option(0.0, "bound of the projected gradient; 0: none")
    explosion: float = _option(10.0, "skip a step with a loss above so many times max(1, its running mean); 0: never")
    max_skipped: float = _option(0.5, "stop when more than this share of the last steps (about 50) was skipped")
    probing: str = _option(
        "auto", "scratch (weights never written by a probe), paired (both signs in one forward), inplace, auto by dtype"
    )
    graphs: str = _option("auto", "steps repeated as CUDA graphs, one for each shape of a batch: " + ", ".join(GRAPHS))
    dtype: str = _option("auto", "dtype to load the model in: " + ", ".join(DTYPES))
    random_weights: bool = _option(False, "weights drawn afresh from the config, to measure speed and memory")
    branch: str | None = _option(
        None, "JOURNAL:STEP, begin with the weights that this run of the model had after so many steps"
    )
    adapter: str | None = _option(None, f"train an adapter instead of the whole model: {', '.join(ADAPTERS)}")
    lora_rank: int = _option(0, "rank of lora and dora (default: 8); alone it asks for lora")
    lora_alpha: int = _option(16, "alpha of lora and dora")
    lora_targets: str | None = _option(
        None, "layers of lora and dora, q_proj,v_proj or all-linear; default: PEFT's for the architecture"
    )
    virtual_tokens: int = _option(0, "tokens of prefix (default: 5) and prompt (default: 10)")
    quantize: str | None = _option(
        None, f"quantise the base under an adapter while it is loaded: {', '.join(QUANTISATIONS)}"
    )
    num_train: int | None = _option(None, "training rows; default: the protocol's")
    num_dev: int | None = _option(None, "dev rows, for the best checkpoint; default: the protocol's")
    num_eval: int | None = _option(None, "test rows; default: the protocol's")
    max_length: int = _option(2048, "longest sequence; the model's context when that is shorter")
    eval_batch_size: int = _option(32, "sequences per evaluation batch")
    eval_steps: int = _option(0, "evaluate on dev and keep a checkpoint every so many steps; 0: five times a run")
    logging_steps: int = _option(10, "steps between logged losses")
    report_to: str = _option("none", "a Hugging Face reporter, e.g. tensorboard; all: those that are installed")
    push_to_hub: str | None = _option(None, "send the model, its card and the journal to this repository, USER/NAME")
    resume: bool = _option(False, "go on where the run in output_dir ended (start fresh where there is none)")
    overwrite: bool = _option(False, "replace an earlier run in output_dir")
    journal: bool = _option(True, "write every step to output_dir/journal.zoj, for `zo replay`")
    checkpoints: bool = _option(True, "end with the weights that were best on dev; without, with the last ones")
    save_model: bool = _option(True, "write the weights to output_dir/model at the end")

    def check(self) -> None:
        """Raise InputError for the first setting that cannot work.  Rates that are not given become the optimizer's."""
        for name in ("model", "output_dir"):
            if not getattr(self, name):
                raise InputError(f"{name} is missing: give --{name.replace('_', '-')} or put it in the config file")
        if self.push_to_hub and not self.save_model:
            raise InputError("push_to_hub sends the model, and save_model is off: leave one of them out")
        self.check_data(self.data)
        self.check_objective()
        check_method(self.optimizer, self.pertnn or None, self.set, self.transfer)
        if self.lora_rank and not self.adapter:
            self.adapter = "lora"
        self.make_adapter()
        lr, eps = default_rates(self.optimizer, self.adapter)
        self.lr, self.eps = _first(self.lr, lr), _first(self.eps, eps)
        self.lr_scheduler = self.lr_scheduler or PRESETS[self.optimizer].schedule
        for name in ("lr", "eps"):
            require_positive(name, getattr(self, name))
        require_not_negative("weight_decay", self.weight_decay)
        self.limits()
        for name in ("steps", "batch_size", "grad_accum", "eval_batch_size", "logging_steps", "max_length",
                     "probe_ranks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.num_dev is not None and self.num_dev < 1:
            raise InputError(f"num_dev must be at least 1, got {self.num_dev}: dev rows choose the best checkpoint")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed must be between 0 and 2^32 - 1, got {self.seed}")
        from transformers import SchedulerType  # not for the verbs that have no such settings

        schedules = [schedule.value for schedule in SchedulerType]
        for name, choices in (
            ("probing", MODES), ("graphs", GRAPHS), ("dtype", DTYPES), ("lr_scheduler", schedules)
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f'unknown {name} "{value}"{nearest(value, choices)}; there are: {", ".join(choices)}')

    @property
    def schedule_arguments(self) -> dict[str, float]:
        """What the schedule has no default for: to end at a tenth of lr, to fall in the last tenth of the steps."""
        if "min_lr" in self.lr_scheduler:
            return {"min_lr_rate": 0.1}
        return {"num_decay_steps": -(-self.steps // 10)} if self.lr_scheduler == "warmup_stable_decay" else {}

    def make_adapter(self) -> Adapter | None:
        """The adapter that is asked for.  Raises InputError."""
        if self.quantize:
            require_quantisation(self.quantize)
        if self.adapter:
            return Adapter(self.adapter, self.lora_rank, self.lora_alpha, self.lora_targets, self.virtual_tokens)
        for name in ("quantize", "lora_targets", "virtual_tokens"):
            if getattr(self, name):
                raise InputError(f"{name} is given, but no adapter: add --adapter {' or '.join(ADAPTERS)}")
        return None

    def check_objective(self) -> None:
        """Raise InputError for what does not go with an objective of one's own, which is a number from the host."""
        if self.maximize and not self.objective:
            raise InputError("maximize is for an objective of your own: give --objective, or leave it out")
        if not self.objective:
            return
        if self.graphs == "always":
            raise InputError("graphs always: an objective of your own runs on the host, which no CUDA graph repeats")
        if self.probing == "paired":
            raise InputError("probing paired makes one model call for both signs; an objective of your own may call "
                             "the model as it likes: use --probing scratch or inplace")
        if self.optimizer == "forward-grad" or self.set.get("estimator") == "slope":
            raise InputError("an exact derivative needs a loss made of differentiable operators; with an objective of "
                             "your own use a method that compares values, such as mezo or es")
        self.graphs = "never"

    def check_data(self, needed: str | None) -> None:
        """Raise InputError where it is not said what the rows are.  needed: a source of one's own, without a task."""
        if not (self.task or needed):
            raise InputError("task is missing: give --task, or --data with rows of your own")
        given = [name for name in ("columns", "dev_data", "test_data") if getattr(self, name)]
        if self.task and given:
            raise InputError(f"{given[0]} is for rows of your own, task {self.task} has its own: leave one of them out")

    def limits(self) -> Limits:
        return Limits(self.clip, self.explosion, self.max_skipped)

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field (booleans as --x / --no-x), and --config FILE."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of the settings below; flags override it")
    for option in dataclasses.fields(RunConfig):
        flag, text = "--" + option.name.replace("_", "-"), option.metadata["help"]
        if option.default not in (None, "", dataclasses.MISSING):
            text += f" (default: {option.default})"
        if option.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif option.type == "dict":
            add_settings_flag(parser, flag, text)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar=option.name.upper(), help=text)


def resolve(flags: dict[str, Any]) -> RunConfig:
    """Settings from `flags` (strings as argparse leaves them, "config" among them) over the YAML file over defaults.

    Raises InputError naming the file, the key or the flag."""
    flags = dict(flags)
    path = flags.pop("config", None)
    values = read_yaml(Path(path)) if path else {}
    kinds = typing.get_type_hints(RunConfig)
    for key in values:
        if key not in kinds:
            raise InputError(f'{path}: unknown key "{shown(key)}"{nearest(str(key)[:80], kinds)}')
    settings = typed(values, path)
    for name in ("set", "columns"):
        if name in flags:
            settings[name] = settings.get(name, {}) | parse_settings(flags.pop(name), f"--{name}")
    settings |= {k: _convert(v, kinds[k], f"--{k.replace('_', '-')}") for k, v in flags.items()}
    config = RunConfig(**settings)
    try:
        config.check()
    except InputError as error:
        raise InputError(f"{error} (settings of {path} and flags)") if path else error from None
    return config


def from_values(values: dict[str, Any], where: str) -> RunConfig:
    """Settings that were written down, as by `dataclasses.asdict`, not checked for sense, without those that this
    release does not know.  where: names them.  Raises InputError for a wrong type."""
    kinds = typing.get_type_hints(RunConfig)
    return RunConfig(**{k: _convert(v, kinds[k], f'{where}: "{k}"') for k, v in values.items() if k in kinds})


def typed(values: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Settings of a file with the types that they have here; others stay as they are.  Raises InputError."""
    kinds = typing.get_type_hints(RunConfig)
    return {k: _convert(v, kinds[k], f'{path}: key "{k}"') if k in kinds else v for k, v in values.items()}


def add_settings_flag(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, action="append", default=argparse.SUPPRESS, metavar="NAME=VALUE", help=text)


def parse_settings(texts: list[str], flag: str = "--set") -> dict[str, str]:
    """["beta=0.9", ...] -> {"beta": "0.9", ...}; the last of a name counts.  Raises InputError."""
    for text in texts:
        if not text.partition("=")[0] or "=" not in text:
            raise InputError(f"{flag} takes NAME=VALUE, got {text!r}")
    return dict(text.split("=", 1) for text in texts)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _convert(value: Any, kind: Any, where: str) -> Any:
    """YAML reads 1e-6 as a string (YAML 1.1 wants 1.0e-6), flags are strings: both are converted here."""
    options = [k for k in typing.get_args(kind) if k is not type(None)]
    if options:
        if value is None or value == "null":
            return None
        kind = options[0]
    try:
        if kind in (bool, dict):
            if not isinstance(value, kind):
                raise ValueError
            return value
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            raise ValueError
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        if kind is str and not is_plain(value):  # no path holds a NUL, and no line of a message a line break
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, OverflowError):
        names = {int: "an integer", float: "a number", str: "text in one line", bool: "true or false",
                 dict: "`name: value` lines"}
        raise InputError(f"{where} must be {names[kind]}, got {shown(repr(value))}") from None
