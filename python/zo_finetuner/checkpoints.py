"""Checkpoints of the Trainer that are there whole or not at all: written beside, synced, then renamed.

A kill or a full disk while one is saved leaves the one before; older ones go only when the new one stands.
"""

from __future__ import annotations

import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from zo_finetuner.errors import InputError
from zo_finetuner.files import whole_folder, write_json
from zo_finetuner.loading import check_safetensors
from zo_finetuner.reading import open_file, read_object, require_file

STATE, SUMS = "trainer_state.json", "sums.json"
CHUNK = 1 << 20


class WholeCheckpoints:
    """A mixin over any Trainer: `_save_checkpoint` writes into a folder that becomes checkpoint-N at once, and a run
    that is resumed from its last step takes no other."""

    _unfinished: str | None = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # the Trainer would look at this after a step only
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        return self._unfinished or super()._get_output_dir(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any = None, **kwargs: Any) -> None:
        if self.args.world_size > 1 or trial is not None:
            return super()._save_checkpoint(model, trial, **kwargs)
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with whole_folder(run / name) as folder:
            self._unfinished = str(folder)
            try:
                super()._save_checkpoint(model, trial, **kwargs)
            finally:
                self._unfinished = None
            for path in (folder / name).iterdir():
                path.rename(folder / path.name)
            (folder / name).rmdir()
            if self.state.best_model_checkpoint == str(folder / name):  # the state has the place where it was made
                self.state.best_model_checkpoint = str(run / name)
                self.state.save_to_json(str(folder / STATE))
            write_json(folder / SUMS, sums(folder))
        self._remove_old(run)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied parameter is saved under one of its names: the others are not missing."""
        names = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, set()).add(name)
        missing = set(load_result.missing_keys)
        tied = {name for tied in names.values() if not tied <= missing for name in tied}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _remove_old(self, run: Path) -> None:
        """All but the last `save_total_limit`, the best one and the last."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if not limit or limit < 0:
            return
        found = checkpoints(run)
        kept = {found[-1], *([Path(best)] if best else [])}
        rest = [path for path in found if path not in kept]
        for path in rest[: max(0, len(found) - max(limit, len(kept)))]:
            going = path.with_name(f".{path.name}.old")  # half removed, it must not look like a checkpoint
            path.rename(going)
            shutil.rmtree(going, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N of a run, in the order of N."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*")
             if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]  # fmt: skip
    return [path for _, path in sorted(found)]


def sums(folder: Path) -> dict[str, list[int]]:
    """Bytes and CRC-32 of every file of a checkpoint, by name.  Raises InputError."""
    return {path.name: _sum(path) for path in sorted(folder.iterdir()) if path.name != SUMS}


def _sum(path: Path) -> list[int]:
    size = total = 0
    with open_file(path) as stream:
        while piece := stream.read(CHUNK):
            size, total = size + len(piece), zlib.crc32(piece, total)
    return [size, total]


def is_whole(checkpoint: Path) -> bool:
    """Whether everything that a resume reads is there, as it was written.  The Trainer reads its own files with
    `weights_only`, which runs no code; that no bit of them has changed since is what their sums say, which only
    checkpoints of another Trainer lack."""
    weights = [*checkpoint.glob("*.safetensors")]
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    try:
        for file in weights:
            check_safetensors(file)
        for file in states:
            require_file(file)
        step = read_object(checkpoint / STATE, "", finite=False).get("global_step")
        same = not (checkpoint / SUMS).exists() or read_object(checkpoint / SUMS, "") == sums(checkpoint)
        readable = all(map(zipfile.is_zipfile, states))
    except (OSError, InputError, zipfile.BadZipFile):
        return False
    return bool(weights) and len(states) > 2 and readable and type(step) is int and same
