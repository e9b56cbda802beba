"""What the machine code of the Triton kernels allows on an H100/H200, where there is none: case `sass`.

Every op is launched as in `operations`, compiled for sm_90 instead of run, and the instructions of its hot loop are
sorted by the unit that executes them.  An element takes at least the time of the busiest unit; a memory-bound pass
takes the time of its bytes.  The prediction assumes that the units overlap perfectly, so it is an upper bound of the
share.  Second stages of reductions are left out: they read one value per 65,536 elements.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from bench.operations import PAIRS, Call, Tensors, list_calls, tensor_calls
from bench.rows import append, machine, spread
from bench.sass import CUOBJDUMP, Instruction, Kernel, accesses, offline
from zo_kernels import Blocks, use_backend, why_unavailable

# H200: 132 multiprocessors at 1.98 GHz; a device copy was measured at 4.3 TB/s.  Lanes a clock of a multiprocessor by
# unit; 32-bit products with 64-bit results at half the rate of the others is the pessimistic reading of public notes.
CLOCK, COPY = 132 * 1.98e9, 4.3e12
LANES = {"issue": 128, "alu": 64, "fma": 128, "imad": 64, "xu": 16, "lsu": 32}
XU = {"MUFU", "POPC", "I2F", "F2I", "F2F", "FRND", "BREV", "FLO"}
FMA = {"FFMA", "FADD", "FMUL", "HADD2", "HMUL2", "HFMA2"}
LSU = {"LDG", "STG", "LDS", "STS", "LDSM", "LDL", "STL", "SHFL", "ATOMG", "RED"}
ELSEWHERE = {"NOP", "BRA", "BAR", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "LDC", "ULDC", "S2R", "S2UR", "R2UR", "CS2R"}
DEVICE = "sm_90 (predicted)"
ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Code:
    """One kernel's machine code.  per_element: instructions of a lane in the costliest loop; load: seconds per element
    and lane of each unit, at full occupancy of the machine."""

    kernel: str
    registers: int
    spills: int
    per_element: float
    load: dict[str, float]

    def busiest(self, moved: float) -> tuple[str, float]:
        """The unit that takes longest, and its time over that of the bytes that an element moves."""
        unit = max(self.load, key=self.load.__getitem__)
        return unit, self.load[unit] * COPY / moved

    def share(self, moved: float) -> float:
        """Predicted share of copy bandwidth."""
        return min(1.0, 1 / self.busiest(moved)[1])

    def seconds(self, moved: float) -> float:
        """Predicted seconds per element."""
        return max(moved / COPY, *self.load.values())


def units(instruction: Instruction) -> Iterable[tuple[str, float]]:
    """(unit, lane slots) that an instruction takes."""
    parts = instruction.opcode.split(".")
    name = parts[0]
    if name != "NOP":
        yield "issue", 1
    if name in XU:
        yield "xu", 1
    elif name in FMA:
        yield "fma", 1
    elif name == "IMAD":
        wide = 2 if {"WIDE", "HI"} & set(parts) else 1
        yield "imad", wide
        yield "fma", wide
    elif name in LSU:
        yield "lsu", 1
    elif name not in ELSEWHERE and not (name.startswith("U") and name != "UNPACK"):
        yield "alu", 1


def read_code(name: str, kernel: Kernel, itemsize: int) -> Code:
    """The costliest of the innermost loops with the widest loads: 16 bytes in every body that is not masked, and its
    elements are counted by them."""

    def widest(code: list[Instruction]) -> int:
        return max(accesses(code, "LDG"), default=0)

    loops = [loop for loop in kernel.loops if widest(loop)] or [kernel.instructions]
    width = max(map(widest, loops))
    bodies = [loop for loop in loops if widest(loop) == width]
    inner = [a for a in bodies if not any(b is not a and _within(b, a) for b in bodies)]

    def elements(code: list[Instruction]) -> float:
        return accesses(code, "LDG")[width] * width / itemsize

    body = max(inner, key=lambda loop: len(loop) / elements(loop))
    slots = dict.fromkeys(LANES, 0.0)
    for instruction in body:
        for unit, count in units(instruction):
            slots[unit] += count
    load = {unit: slots[unit] / elements(body) / LANES[unit] / CLOCK for unit in LANES}
    return Code(name, kernel.registers, len(kernel.spills()), slots["issue"] / elements(body), load)


def _within(loop: list[Instruction], other: list[Instruction]) -> bool:
    return other[0].address <= loop[0].address and loop[-1].address <= other[-1].address


def calls(dtype: torch.dtype, numel: int = ELEMENTS) -> dict[str, Call]:
    """Every op on tensors of the host, whose addresses are aligned like a GPU's."""
    sets = Tensors(*(torch.empty(numel, dtype=dtype) for _ in range(3)))
    return list_calls(Blocks([("theta", torch.empty(numel, dtype=dtype))])) | tensor_calls([sets])


def compile_calls(dtype: torch.dtype, only: Iterable[str] | None = None) -> dict[str, list[Code]]:
    """Op -> the code of its launches on sm_90, the one over the elements first."""
    from zo_kernels.backends import triton as backend

    found: dict[str, list[Code]] = {}
    anywhere = mock.patch.object(backend.launch, "on", lambda device: contextlib.nullcontext())
    with offline(90) as launches, use_backend("triton"), anywhere, tempfile.TemporaryDirectory() as folder:
        for name, call in calls(dtype).items():
            if only is not None and name not in only:
                continue
            launches.clear()
            call.run()
            kernels = {id(kernel): (title, kernel) for title, kernel in launches}.values()
            found[name] = [read_code(title, Kernel(kernel, Path(folder)), dtype.itemsize) for title, kernel in kernels]
    return found


def native_kernels() -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes of local memory) of zo_kernels._cuda for sm_90; none where it is not built."""
    if why_unavailable("cuda"):
        return []
    module = importlib.util.find_spec("zo_kernels._cuda").origin
    command = [str(CUOBJDUMP), "--dump-resource-usage", module]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [part for part in told.split("arch = ") if part.startswith("sm_90") and "Resource usage" in part]
    pattern = r"Function \S*?\d([a-z]+_kernel)E\S*:\s+REG:(\d+) .*?LOCAL:(\d+)"
    return [(name, int(regs), int(local)) for part in found for name, regs, local in re.findall(pattern, part)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="OP", help="some of the ops, by their names in operations.py")


def run(arguments: argparse.Namespace) -> int:
    """A row per op of one launch and dtype: instructions per element, registers, spills, predicted share of copy."""
    if not CUOBJDUMP.exists():
        print(f"sass: this triton wheel has no disassembler at {CUOBJDUMP}")
        return 1
    common = machine("cpu") | {"device": DEVICE}
    del common["threads"]
    dtypes = (torch.bfloat16,) if arguments.quick else (torch.bfloat16, torch.float16, torch.float32)
    head = f"{'op':<22}{'dtype':<10}{'kernel':<18}{'instr/element':>14}{'regs':>6}{'spills':>8}"
    print(f"{head}{'share':>7}  busiest unit")
    for dtype in dtypes:
        ops = calls(dtype, 128)
        for case, codes in compile_calls(dtype, arguments.only or set(ops) - set(PAIRS)).items():
            code, moved = codes[0], ops[case].accesses * dtype.itemsize
            unit, load = code.busiest(moved)
            name = str(dtype).removeprefix("torch.")
            print(f"{case:<22}{name:<10}{code.kernel:<18}{code.per_element:>14.1f}{code.registers:>6}{code.spills:>8}"
                  f"{code.share(moved):>7.2f}  {unit} {load:.2f} of the bytes' time", flush=True)  # fmt: skip
            row = {"case": case, "provider": "triton", "dtype": name, "n": ELEMENTS, "kernel": code.kernel, "unit": ""}
            row |= common | {"busiest": unit, "load": load}
            for metric, value in (
                ("instructions_per_element", code.per_element),
                ("registers", code.registers),
                ("spills", code.spills),
                ("predicted_share", code.share(moved)),
            ):
                append(arguments.out / "sass.jsonl", row | {"metric": metric} | spread([value]))
    return 0
