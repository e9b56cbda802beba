"""What a step leaves for the journal, on its way from the device to the file.

    in the step     everything is packed into one row on the device (a few operators, part of a CUDA graph)
    after it        the row is sent to pinned memory without waiting
    a step later    the row has arrived; it gets the step's number, its checksum, and is appended

On a CPU there is nothing to wait for, and a step's record is in the file when the step ends.
"""

from __future__ import annotations

import os
import platform
from collections import deque
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_finetuner.cards import fingerprint
from zo_finetuner.errors import InputError
from zo_finetuner.journal import FINITE, FLUSHED, Header, Layout
from zo_finetuner.journal_writer import JournalWriter
from zo_finetuner.optim.base import Probe, Slope, Update
from zo_finetuner.optim.directions import Direction
from zo_finetuner.optim.scales import Constant
from zo_kernels import NOISE_VERSION, backend_name

IN_FLIGHT = 64  # rows on their way from a GPU, before the oldest is waited for


class Recorder:
    """The journal of one engine.  path: a new file, or that of a run which is gone on with at the engine's step.  run:
    what the header says of data and schedule (JSON).  InputError for a path that cannot be a new journal's."""

    def __init__(self, path: str | os.PathLike, run: dict[str, Any] | None = None):
        self.path, self.run = Path(path), run or {}
        if not self.path.parent.is_dir():
            raise InputError(f"{self.path}: there is no folder {self.path.parent} for the journal; make it first")
        self._writer: JournalWriter | None = None
        self._fingerprint = ""
        self._row: _Row | None = None
        self._sent: deque[tuple[int, int, Tensor, Any]] = deque()
        self._free: list[Tensor] = []
        self._merges: int | None = None

    def before(self, engine: Any) -> None:
        """Before a step of the engine; the weights are still those of the step before."""
        if self._writer is None and not self._fingerprint:
            if engine.step_count == 0 and self.path.exists():
                raise InputError(f"{self.path}: is there already; choose another journal, or go on with that run")
            self._fingerprint = fingerprint(engine.model)
        merges = getattr(engine.probing, "merges", None)  # of low rank
        if self._merges is None:  # taken up from a checkpoint, whose state was merged when it was saved
            self._flushed = merges is not None and engine.step_count > 0
        else:
            self._flushed = merges != self._merges

    def take(
        self, engine: Any, asked: list[Probe | Slope], losses: list[Tensor], update: Update, finite: Tensor,
        decay: Tensor | None,
    ) -> None:  # fmt: skip
        """In a step, after its update: pack what was asked, told and done."""
        if self._row is None:
            self._row = _Row(_Plan(engine, asked, losses, update, decay), engine.device)
        self._row.pack(engine, asked, losses, update, finite, decay)

    def after(self, engine: Any) -> None:
        """After a step, which has the number engine.step_count: send its row, and write those that have arrived."""
        if self._writer is None:
            self._open(engine)
        flags = FLUSHED if self._flushed else 0
        if engine.device.type == "cuda":
            slot = self._free.pop() if self._free else torch.empty_like(self._row.bytes, device="cpu").pin_memory()
            slot.copy_(self._row.bytes, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(engine.device))
            self.expect(engine.step_count, flags, slot, arrived)
        else:
            self._write(engine.step_count, flags, self._row.bytes)
        self._merges = getattr(engine.probing, "merges", None)

    def goes_on(self, engine: Any) -> None:
        """An engine was brought to the step where this journal ends: merges from now on belong to the next step."""
        self._merges = getattr(engine.probing, "merges", None)

    def expect(self, step: int, flags: int, row: Tensor, arrived: Any) -> None:
        """A row is on its way to the host; arrived: its event.  Those that have arrived are written, in order, and the
        oldest is waited for when too many have not."""
        self._sent.append((step, flags, row, arrived))
        self._write_arrived(IN_FLIGHT)

    def sync(self) -> None:
        """Every step so far on the disk: waits for the device, and for the disk."""
        self._write_arrived(0)
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """`sync`, and no step can follow."""
        self._write_arrived(0)
        if self._writer is not None:
            self._writer.close()

    def _write_arrived(self, most: int) -> None:
        while self._sent and (len(self._sent) > most or self._sent[0][3].query()):
            step, flags, slot, arrived = self._sent.popleft()
            arrived.synchronize()
            self._write(step, flags, slot)
            self._free.append(slot)

    def _write(self, step: int, flags: int, row: Tensor) -> None:
        self._writer.append(self._row.record(step, flags, row.numpy().tobytes()))

    def _open(self, engine: Any) -> None:
        if engine.step_count and self.path.exists():
            self._writer, header = JournalWriter.reopen(self.path, engine.step_count)
            if header.layout != asdict(self._row.plan.layout):
                raise InputError(f"{self.path}: is the journal of another run (its records have {header.layout})")
        else:
            self._writer = JournalWriter(self.path, self._header(engine))

    def _header(self, engine: Any) -> Header:
        plan, blocks = self._row.plan, engine.blocks
        tensors = [[name, number, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
                   for name, number, tensor in zip(blocks.names, blocks.ids, blocks.tensors, strict=True)]
        return Header(
            kind=plan.kind, layout=asdict(plan.layout), seed=engine.seed, eps=float(engine.eps),
            weight_decay=float(engine.weight_decay), dist=plan.dist, probing=engine.probing.mode,
            **here(engine.device), noise_contract=NOISE_VERSION, fingerprint=self._fingerprint, tensors=tensors,
            method_name=engine.method.name, terms=plan.terms, trail=plan.trail, fixed_scales=plan.fixed_scales,
            first_step=engine.step_count, limits=asdict(engine.guard.limits), method=engine.method.recipe, run=self.run,
        )  # fmt: skip


def here(device: torch.device) -> dict[str, Any]:
    """What bits may depend on: backend, kind of device, versions."""
    found = {"python": platform.python_version()}
    for package in ("zo-finetuner", "torch", "transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"backend": backend_name(device.type), "device": kind, "versions": found}


class _Plan:
    """What the records of a run hold, seen from its first step (methods whose steps are `uniform` are all like it)."""

    def __init__(
        self, engine: Any, asked: list[Probe | Slope], losses: list[Tensor], update: Update, decay: Tensor | None
    ):
        numbers = {id(seed): k for k, seed in enumerate(engine.inputs.seeds)}
        directions = [direction for direction, _ in update.terms]
        in_place = engine.probing.mode == "inplace"
        probed = [probe.direction for probe in asked if isinstance(probe, Probe)] if in_place else []
        scales = {id(d.scale): d.scale for d in [*directions, *probed] if isinstance(d, Direction)}
        self.terms = [numbers.get(id(d.seed), -1) for d in directions if isinstance(d, Direction)]
        derived = all(number >= 0 for number in self.terms)
        self.trail = _trail(probed, numbers)
        plain = (
            engine.method.uniform and directions and update.by is None and update.mean is None
            and update.anchored is None and len(scales) == 1
            and all(_plain(d, directions[0].dist) for d in directions)
            and (not probed or self.trail)
        )  # fmt: skip
        self.kind = "sum" if plain else "rerun"
        self.scale = next(iter(scales.values())) if len(scales) == 1 else None
        policy = getattr(engine.method, "scales", None)
        fixed = isinstance(policy, Constant) and self.scale is policy.fixed
        self.fixed_scales = policy.fixed.half().cpu().numpy().tobytes().hex() if plain and fixed else ""
        self.dist = directions[0].dist if plain else getattr(engine.method, "dist", "")
        if not plain:
            self.terms, self.trail = [], []
        elif not derived:
            self.terms = []
        count = sum(loss.numel() for loss in losses)
        self.layout = Layout(
            losses=count if engine.method.uniform else max(count, 2, engine.method.forwards),
            coefs=len(directions) if plain else 0,
            seeds=len(directions) if plain and not derived else 0,
            probes=len(self.trail),
            decay=int(decay is not None),
            scales=0 if not plain or self.scale is None or fixed else len(engine.blocks),
            scale_bytes=2 if getattr(policy, "halves", False) else 4,
        )


def _plain(direction: Any, dist: str) -> bool:
    """Dense noise of a seed, and nothing else."""
    return (isinstance(direction, Direction) and direction.form is None and direction.subspace is None
            and direction.dist == dist)


def _trail(probed: list[Any], numbers: dict[int, int]) -> list[list[int]]:
    """(which direction, its number) of probes; empty where one is no direction whose seed follows from the run's."""
    trail, met = [], {}
    for direction in probed:
        if direction is None:
            trail.append([-1, -1])
        elif _plain(direction, getattr(direction, "dist", "")) and id(direction.seed) in numbers:
            trail.append([met.setdefault(id(direction), len(met)), numbers[id(direction.seed)]])
        else:
            return []
    return trail


class _Row:
    """The part of a record that the device knows: seeds, a word for the flags, fp32 numbers, scales."""

    def __init__(self, plan: _Plan, device: torch.device):
        self.plan, layout = plan, plan.layout
        numbers = 1 + layout.decay + layout.losses + layout.coefs + layout.probes
        ends = [8 * layout.seeds]
        for size in (4, 4 * numbers, layout.scale_bytes * layout.scales):
            ends.append(ends[-1] + size)
        self.flag_at = ends[0]
        self.bytes = torch.zeros(ends[-1] + -ends[-1] % 8, dtype=torch.uint8, device=device)
        self._end = ends[-1]
        self._seeds = self.bytes[: ends[0]].view(torch.int64)
        self._finite = self.bytes[ends[0] : ends[1]].view(torch.int32)
        self._numbers = self.bytes[ends[1] : ends[2]].view(torch.float32)
        half = torch.float16 if layout.scale_bytes == 2 else torch.float32
        self._scales = self.bytes[ends[2] : ends[3]].view(half)
        self._padding = torch.full((layout.losses,), torch.nan, dtype=torch.float32, device=device)

    def pack(
        self, engine: Any, asked: list[Probe | Slope], losses: list[Tensor], update: Update, finite: Tensor,
        decay: Tensor | None,
    ) -> None:  # fmt: skip
        layout = self.plan.layout
        parts = [engine.inputs.lr.reshape(1), *([decay.reshape(1)] if layout.decay else []), *losses]
        missing = layout.losses - sum(loss.numel() for loss in losses)
        if missing:
            parts.append(self._padding[:missing])
        if layout.coefs:
            parts += [coef.reshape(1) for _, coef in update.terms]
        if layout.probes:
            zero = self._padding.new_zeros(1)
            parts += [zero if probe.coef is None else probe.coef.reshape(1) for probe in asked]
        torch.cat(parts, out=self._numbers)
        self._finite.copy_(finite.reshape(1))
        if layout.seeds:
            torch.stack([direction.seed for direction, _ in update.terms], out=self._seeds)
        if layout.scales:
            self._scales.copy_(update.terms[0][0].scale)

    def record(self, step: int, flags: int, row: bytes) -> bytes:
        """A record without its checksum, of a row on the host."""
        finite = FINITE if row[self.flag_at] else 0
        flags_word = (flags | finite).to_bytes(4, "little")
        return b"".join((step.to_bytes(8, "little"), row[: self.flag_at], flags_word,
                         row[self.flag_at + 4 : self._end]))  # fmt: skip
