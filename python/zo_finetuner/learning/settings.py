"""What `zo learn` can be told, with the recipes' own defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from zo_finetuner.cards import RECIPES
from zo_finetuner.errors import InputError, nearest, require_not_negative, require_positive

#: Published settings (trainer_l2l.py, trainer_l2l_multi_dataset.py) where the recipe is the paper's.
_DEFAULTS = {
    "paper": {"batch_size": 8, "windows": 3, "window": 0, "lr_mlp": 0.1, "lr_llm": 0.01},
    "improved": {"batch_size": 16, "windows": 5, "window": 60, "lr_mlp": 0.03, "lr_llm": 0.0},
    "closed-form": {"batch_size": 16, "windows": 0, "window": 8, "lr_mlp": 0.0, "lr_llm": 0.0},
    "forward": {"batch_size": 16, "windows": 0, "window": 0, "lr_mlp": 0.0, "lr_llm": 0.0},
}
_SEVERAL_TASKS = {"paper": {"lr_mlp": 0.05, "lr_llm": 0.05}}
EPOCHS_PER_WINDOW = 5  # of the paper's single-data-set script; 2 with several
EPOCHS_OF_SEVERAL = 2


@dataclass(frozen=True)
class LearnSettings:
    """Settings of `zo learn`; None where the recipe decides (`resolved`)."""

    model: str
    output_dir: str
    recipe: str = "improved"
    tasks: tuple[str, ...] = ()
    data: tuple[str, ...] = ()  # none, one for all tasks, or one per task
    texts: tuple[str, ...] = ()
    batch_size: int | None = None
    windows: int | None = None  # restarts of the base model
    window: int | None = None  # steps per task and window; closed form: batches
    horizon: int = 1000  # improved: two-point steps to learn for
    eps: float = 1e-3
    lr_mlp: float | None = None
    lr_update: float = 1e-6  # paper: of theta' in the meta loss
    lr_llm: float | None = None  # paper: of the base model's trajectory
    zeroth_order: bool = False  # paper: move the base model by two-point steps
    keep_gradients: bool | None = None  # paper: see trajectory.py
    forwards: int = 1000  # forward: passes per learning set
    power: float = 0.5  # closed form, forward
    prune: float = 0.0  # improved, closed form, forward: blocks with s below this are given scale 0, and are skipped
    num_train: int | None = None  # rows per task; windows of a text: 1000
    num_held_out: int | None = None  # rows per task; windows of a text: 128
    max_length: int = 2048
    text_length: int = 128
    seed: int = 0
    data_seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def resolved(self) -> LearnSettings:
        """With the recipe's defaults filled in.  Raises InputError for the first setting that cannot work."""
        if self.recipe not in RECIPES:
            raise InputError(
                f'unknown recipe "{self.recipe}"{nearest(self.recipe, RECIPES)}; there are: {", ".join(RECIPES)}'
            )
        defaults = dict(_DEFAULTS[self.recipe])
        if len(self.tasks) + len(self.texts) > 1:
            defaults |= _SEVERAL_TASKS.get(self.recipe, {})
        unset = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        settings = replace(self, **unset)
        settings._check()
        return settings

    def _check(self) -> None:
        for name in ("model", "output_dir"):
            if not getattr(self, name):
                raise InputError(f"{name} is missing: give --{name.replace('_', '-')}")
        if not self.tasks and not self.texts:
            raise InputError("nothing to learn on: give --task or --text, each as often as you like")
        if len(set(self.tasks)) < len(self.tasks):
            raise InputError("a task is given twice; once is enough")
        if len(self.data) not in (0, 1, len(self.tasks)):
            raise InputError(
                f"{len(self.data)} --data folders for {len(self.tasks)} tasks: give one that holds a folder per task, "
                f"or one for each --task in the same order"
            )
        for name in ("eps", "lr_update", "power"):
            require_positive(name, getattr(self, name))
        for name in ("lr_mlp", "lr_llm", "prune"):
            require_not_negative(name, getattr(self, name))
        for name in ("batch_size", "horizon", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.text_length < 2:
            raise InputError(f"text_length must be at least 2, got {self.text_length}: a token is predicted by others")
        if self.recipe in ("paper", "improved") and self.windows < 1:
            raise InputError(f"windows must be at least 1, got {self.windows}")
        least = {"paper": 0, "improved": 10, "closed-form": 1, "forward": 0}[self.recipe]
        if self.window < least:
            raise InputError(f"window must be at least {least} with recipe {self.recipe}, got {self.window}")
        if not 0 <= self.seed < 1 << 32 or not 0 <= self.data_seed < 1 << 32:
            raise InputError("seed and data_seed must be between 0 and 2^32 - 1")

    def outcome(self) -> dict[str, Any]:
        """The settings that the result depends on: what a resumed run has to share."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in _FREE}


_FREE = ("output_dir", "resume", "overwrite", "windows")  # no window depends on how many follow
