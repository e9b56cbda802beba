"""What runs leave and take up again, fuzzed: journals, logs, folders, checkpoints, the state of `zo learn`."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from bounded import contents
from fuzzed_tensors import HEADER, safetensors_like, taken_apart
from fuzzed_texts import SETTINGS, lines_like, yaml_like
from hypothesis import strategies as st
from mutations import edited, encoded, mangled, sometimes_mangled

from zo_finetuner.checkpoints import SUMS, is_whole, sums
from zo_finetuner.errors import InputError
from zo_finetuner.journal import FORMAT_VERSION, MAGIC, Header, Layout, read_journal
from zo_finetuner.learning.checkpoint import STATE, saved_state
from zo_finetuner.positions import best_of, read_log
from zo_finetuner.report_page import html_page
from zo_finetuner.runs import grouped, read_run
from zo_finetuner.state_files import digest, write_state

# --- journals ---

RECORDS = 3


def journal() -> Header:
    """Of MeZO in place with decay, on two tensors with learned scales."""
    return Header(
        kind="sum", layout=asdict(Layout(losses=2, coefs=1, probes=3, decay=1, scales=2)), seed=7, eps=1e-3,
        weight_decay=0.1, dist="normal", probing="inplace", backend="cpu", device="cpu", versions={"torch": "2"},
        noise_contract=1, fingerprint="shapes:0123456789abcdef weights:0123456789abcdef",
        tensors=[["a", 1, [2, 3], "float32"], ["b", 2, [4], "float32"]], method_name="mezo", terms=[0],
        trail=[[0, 0], [0, 0], [0, 0]], method={"name": "mezo"}, run={"steps": 3},
    )  # fmt: skip


@st.composite
def journals(draw: Any) -> bytes:
    """A journal whose header, records or bytes may be broken; sums are made anew but for the last."""
    header = journal()
    text = encoded(draw(edited(asdict(header)))) if draw(st.booleans()) else encoded(json.dumps(asdict(header)))
    records = numpy.zeros(RECORDS, header.record.dtype)
    records["step"] = range(RECORDS)
    body = records.tobytes()
    if draw(st.integers(0, 2)) == 2:
        body = draw(mangled(body, 2))
    size = header.record.size
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    parts = [part[:-4] + zlib.crc32(part[:-4]).to_bytes(4, "little") if len(part) == size else part for part in parts]
    start = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    whole = start + zlib.crc32(start).to_bytes(4, "little") + b"".join(parts)
    return draw(mangled(whole)) if draw(st.integers(0, 3)) == 3 else whole


def read_all_of_a_journal(folder: Path) -> None:
    found = read_journal(folder / "x.zoj")
    assert len(found.upto(None)) == found.steps - found.header.first_step and len(found.header.names) >= 0


# --- the state of `zo learn` ---

STATE_TREE = {
    "settings": {"eps": 0.1, "tasks": ["sst2"]}, "window": 1, "points": [torch.ones(3)], "adam": {0: torch.ones(())},
}  # fmt: skip


@lru_cache  # of two texts of metadata safetensors writes either first
def state_file() -> bytes:
    with TemporaryDirectory() as folder:
        write_state(Path(folder) / STATE, STATE_TREE)
        return (Path(folder) / STATE).read_bytes()


@st.composite
def states(draw: Any) -> bytes:
    """A state whose tree, header or bytes may be broken; the digest is made anew after the tree is."""
    data = state_file()
    if draw(st.booleans()):
        return draw(safetensors_like(data))
    header, tensors = taken_apart(data)
    text = draw(edited(json.loads(header["__metadata__"]["tree"])))
    header["__metadata__"] |= {"tree": text, "digest": digest(text, [torch.ones(3), torch.ones(())])}
    raw = encoded(json.dumps(header))
    return len(raw).to_bytes(8, "little") + raw + tensors


def read_saved(folder: Path) -> None:
    saved_state(folder, STATE_TREE["settings"], resume=True, overwrite=False)


# --- checkpoints of the Trainer ---


@lru_cache
def checkpoint_files() -> dict[str, bytes]:
    """What a checkpoint has, and its sums."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": {0: torch.ones(3)}}, folder / file)
        (folder / "model.safetensors").write_bytes(HEADER)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": [{"loss": 1.5}]}))
        (folder / SUMS).write_text(json.dumps(sums(folder)))
        return contents(folder)


@st.composite
def checkpoint_folders(draw: Any) -> dict[str, bytes]:
    """One file of a checkpoint broken, or none."""
    files = checkpoint_files()
    name = draw(st.sampled_from(sorted(files)))
    return files | {name: draw(mangled(files[name]) | st.just(files[name]))}


def read_checkpoint(folder: Path) -> None:
    if not is_whole(folder):
        raise InputError(f"{folder}: is not whole")
    same = {name: data for name, data in contents(folder).items() if name != SUMS}  # whose spelling may be another
    assert same.items() <= checkpoint_files().items(), "a checkpoint that was changed is taken for a whole one"


# --- logs and folders of runs ---


@st.composite
def logs(draw: Any) -> dict[str, bytes]:
    entry = {"loss": 1.5, "step": 2, "epoch": 0.1} if draw(st.booleans()) else {"eval_loss": 2.5, "step": 2}
    return {"log.jsonl": draw(sometimes_mangled(lines_like(entry)))}


def read_a_log(folder: Path) -> None:
    """It is never refused, but no more is believed than can be."""
    entries = read_log(folder / "log.jsonl")
    best_of(entries)
    if len(entries) < 3:
        raise InputError(f"{folder}: {len(entries)} entries are left")


RESULT = {"steps": 20, "forwards": 40, "seconds": 1.5, "metric": "accuracy", "eval_loss_before": 0.7, "eval_rows": 8,
          "eval_loss_after": 0.5, "eval_metric_before": 0.5, "eval_metric_after": 0.75, "skipped_steps": 0,
          "peak_bytes": {"training": None}, "data": {"origin": {"train": "a"}}}  # fmt: skip


@st.composite
def run_folders(draw: Any) -> dict[str, bytes]:
    """What `zo train` leaves: settings, log and result, one of them broken."""
    log = {"loss": 1.5, "eval_loss": 2.5, "zo/seconds_per_step": 0.1, "step": 2}
    files = {"config.yaml": encoded(json.dumps(SETTINGS)), "log.jsonl": encoded(json.dumps(log) + "\n"),
             "result.json": encoded(json.dumps(RESULT))}  # fmt: skip
    broken = {"config.yaml": yaml_like(), "log.jsonl": lines_like(log), "result.json": edited(RESULT).map(encoded)}
    name = draw(st.sampled_from(sorted(files)))
    return files | {name: draw(sometimes_mangled(broken[name]))}


def read_a_run(folder: Path) -> None:
    runs = [read_run(folder)]
    html_page(runs, grouped(runs)).encode()
