"""An objective of one's own: any callable that gives a number for a model and a batch; no gradient has to reach it.

    (model, batch) -> value,  or  (model, tokenizer, batch) -> value          a mean over the rows of the batch
    loss = value, or -value where it is maximised;  of several batches sum(rows * loss) / sum(rows)

It is called without gradients and in eval mode, in every probe of a step on the same batch.  What it draws from the
generators of torch, numpy and Python is the same in all of them (common random numbers): the difference of two probes
is then due to the weights.  What goes wrong in it is told in one line, with the line of its code.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import math
import random
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from numbers import Number
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from zo_finetuner.encoding import IGNORED, Encoded, pad_left
from zo_finetuner.errors import InputError, nearest

WRITE = "write FILE.py:NAME or MODULE:NAME"


class OwnObjective:
    """source: "my.py:reward" or "package.module:reward".  maximize: more is better.  Raises InputError."""

    def __init__(self, source: str, maximize: bool = False):
        self.source, self.maximize = source, maximize
        place, _, name = source.rpartition(":")
        if not place or not name:
            raise InputError(f'objective "{source}": {WRITE}')
        self.name = name.rpartition(".")[2]
        module = _file(source, Path(place).expanduser()) if place.endswith(".py") else _module(source, place)
        self._file = getattr(module, "__file__", None) or place
        self._call = _attribute(source, module, name)
        self._takes_tokenizer = _takes_tokenizer(source, self._call)

    def __call__(self, model: nn.Module, tokenizer: Any, batch: dict[str, Any]) -> Tensor | float:
        """The value for a batch of `collate_rows`.  Raises InputError for whatever the callable raises, and for what is
        no number; infinite and NaN are numbers."""
        arguments = (model, tokenizer, batch) if self._takes_tokenizer else (model, batch)
        try:
            with same_draws(batch["seed"]):
                value = self._call(*arguments)
        except Exception as error:
            raise InputError(f"{self._line_of(error)}: {self.name} raised {_told(error)}") from error
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            return value.detach().reshape(())
        if isinstance(value, Number | np.generic) and not isinstance(value, complex):
            return float(value)
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        what = "None" if value is None else f"a {type(value).__name__}{shape}"
        raise InputError(f"{self.source}: returned {what}; it must return one number, the mean over the batch's rows")

    def loss(self, value: Tensor | float) -> Tensor | float:
        return -value if self.maximize else value

    def require_finite(self, value: Tensor | float) -> None:
        if not math.isfinite(float(value)):
            raise InputError(f"{self.source}: returned {float(value)} for the first batch, before any step; it must be "
                             f"finite there")

    def _line_of(self, error: Exception) -> str:
        """file:line in its own code, or where it was raised."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == self._file]
        return f"{(own or frames)[-1].filename}:{(own or frames)[-1].lineno}"


def collate_rows(encodeds: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """A batch of B rows for an objective, int64 on the CPU:

    input_ids, attention_mask (B, T)   prompt and right answer, padded behind
    labels (B, T)                      the answer's tokens, -100 elsewhere
    prompt_ids, prompt_mask (B, P)     the prompt alone, padded in front, as `generate` takes it
    rows                               the rows as they were read, a list of B dicts
    seed                               of what the objective draws, from the tokens
    """
    sequences, targets = zip(*(e.candidate(e.labels[0]) for e in encodeds), strict=True)
    shape = (len(encodeds), max(map(len, sequences)))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for i, (sequence, target) in enumerate(zip(sequences, targets, strict=True)):
        input_ids[i, : len(sequence)] = torch.tensor(sequence)
        attention_mask[i, : len(sequence)] = 1
        labels[i, len(sequence) - len(target) : len(sequence)] = torch.tensor(target, dtype=torch.int64)
    prompts = pad_left([e.prompt for e in encodeds], pad_id, multiple_of=1)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "prompt_ids": prompts["input_ids"],
        "prompt_mask": prompts["attention_mask"],
        "rows": [e.row for e in encodeds],
        "seed": zlib.crc32(repr(sequences).encode()),
    }


@contextlib.contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """Within the context the generators of Python, numpy and torch start from the seed; then they are as before."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            set_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _file(source: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f'objective "{source}": no file {path}; {WRITE}')
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # what lies beside it may be imported, as by `python my.py`
    spec = importlib.util.spec_from_file_location(f"zo_objective_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _imported(source, lambda: spec.loader.exec_module(module))
    return module


def _module(source: str, name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.append("")  # the current folder, which a console script leaves out
    return _imported(source, lambda: importlib.import_module(name))


def _imported(source: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        at = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (frame.filename, frame.lineno)
        where = "" if "importlib" in str(at[0]) else f" ({at[0]}:{at[1]})"
        raise InputError(f'objective "{source}": cannot be imported: {_told(error)}{where}') from error


def _attribute(source: str, module: ModuleType, name: str) -> Callable[..., Any]:
    try:
        found = reduce(getattr, name.split("."), module)
    except AttributeError:
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise InputError(f'objective "{source}": there is no "{name}"{nearest(name, names)}; {WRITE}') from None
    if not callable(found):
        raise InputError(f'objective "{source}": "{name}" is a {type(found).__name__}, not a function')
    return found


def _takes_tokenizer(source: str, call: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in places and p.default is p.empty]
    if len(needed) not in (2, 3):
        raise InputError(f'objective "{source}": takes {len(needed)} arguments; it must take (model, batch) or '
                         f"(model, tokenizer, batch)")
    return len(needed) == 3


def _told(error: BaseException) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
