"""`zo replay` and `zo diff`: the weights of any step of a run, and where two runs part."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zo_finetuner.errors import InputError


def add_commands(verbs: Any) -> None:
    """verbs: what `ArgumentParser.add_subparsers` gives."""

    def verb(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    replay = verb("replay", _replay, "rebuild the weights of any step of a run from its base model and its journal")
    replay.add_argument("base", help="folder of the model that the run began with, or its Hub id")
    replay.add_argument("journal", help="journal.zoj of the run")
    replay.add_argument("--to", type=int, metavar="STEP", help="after so many steps (default: all)")
    replay.add_argument("--out", required=True, metavar="DIR", help="new folder for the model")

    diff = verb("diff", _diff, "say where two journals part")
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")


def _replay(arguments: dict[str, Any]) -> None:
    from zo_finetuner.journal import read_journal
    from zo_finetuner.replay import differences, replay
    from zo_finetuner.training import load_base

    out = Path(arguments["out"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: is there already; choose another folder")
    journal = read_journal(arguments["journal"])
    journal.upto(arguments["to"])
    model, tokenizer = load_base(dataclasses.replace(journal_config(journal), model=arguments["base"]))
    started = time.perf_counter()
    step = replay(model, journal, arguments["to"])
    seconds = time.perf_counter() - started
    with new_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    other = differences(journal.header, next(model.parameters()).device)
    print(f"{out}: the weights after step {step} of {journal.path}, in {seconds:.1f} s; "
          + (f"the run's but for rounding ({'; '.join(other)})" if other else "the run's to the bit"))


def journal_config(journal: Any) -> Any:
    """The `RunConfig` of a journal's run; of one that `zo train` did not start, what its tensors tell.  InputError."""
    from zo_finetuner.config import RunConfig, from_values

    saved = journal.header.run.get("config")
    if isinstance(saved, dict):
        return from_values(saved, f"{journal.path}: the run's config")
    dtypes = {tensor[3] for tensor in journal.header.tensors}
    return RunConfig(dtype=dtypes.pop() if len(dtypes) == 1 else "auto")


def _diff(arguments: dict[str, Any]) -> int:
    from zo_finetuner.journal import read_journal
    from zo_finetuner.journal_diff import compared

    text, same = compared(read_journal(arguments["a"]), read_journal(arguments["b"]))
    print(text)
    return 0 if same else 1


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` (new, or empty) when all is written, or is taken away."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
