"""Compile Triton launches for a GPU that is not there, and read the machine code (SASS).

`offline(capability)` makes launches compile instead of run, exactly as they are written (types,
specialisation, options).  `Kernel` disassembles one with the cuobjdump of the triton wheel and finds its hot
loop.
"""

from __future__ import annotations

import collections
import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BYTES = {
    "U8": 1,
    "S8": 1,
    "U16": 2,
    "S16": 2,
    "64": 8,
    "128": 16,
}  # per thread; 4 where the name has no width


@contextlib.contextmanager
def offline(capability: int = 90) -> Iterator[list]:
    """Inside, `kernel[grid](...)` compiles for this compute capability and does not run; tensors may be
    anywhere.  Yields the list that collects a (kernel name, triton CompiledKernel) per launch."""
    name = f"sm_{capability}"  # stands for the device number: compiled kernels are cached per device
    driver = SimpleNamespace(
        get_current_device=lambda: name,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    launches: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launches.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield launches


@dataclass
class Instruction:
    address: int
    text: str  # without the guard predicate

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        jump = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", self.text)
        return int(jump[1], 16) if jump else None


class Kernel:
    """The machine code of one compiled kernel."""

    def __init__(self, compiled, folder: Path):
        self.ptx: str = compiled.asm["ptx"]
        self._cubin = folder / f"{compiled.hash}.cubin"
        self._cubin.write_bytes(compiled.asm["cubin"])

    def _dump(self, option: str) -> str:
        command = [str(CUOBJDUMP), option, str(self._cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @cached_property
    def instructions(self) -> list[Instruction]:
        found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ +)?([^;]+?)\s*;", self._dump("--dump-sass"))
        return [Instruction(int(address, 16), text) for address, text in found]

    @cached_property
    def registers(self) -> int:
        return int(re.search(r"REG:(\d+)", self._dump("--dump-resource-usage"))[1])

    @cached_property
    def loops(self) -> list[list[Instruction]]:
        """What lies between a backward branch and where it jumps to, largest first."""
        place = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        spans = [
            self.instructions[place[instruction.target] : i + 1]
            for i, instruction in enumerate(self.instructions)
            if instruction.target is not None and instruction.target < instruction.address
        ]
        return sorted(spans, key=len, reverse=True)

    def spills(self) -> list[str]:
        """Accesses to local memory: registers that did not fit, or arrays that are indexed at run time."""
        return [i.text for i in self.instructions if i.opcode.split(".")[0] in ("LDL", "STL")]


def accesses(code: list[Instruction], kind: str) -> collections.Counter:
    """Global accesses in a piece of code, kind LDG or STG: bytes per access -> how many."""
    found = [i.opcode.split(".") for i in code]
    return collections.Counter(
        next((BYTES[part] for part in parts if part in BYTES), 4) for parts in found if parts[0] == kind
    )


def per_element(code: list[Instruction], itemsize: int, kind: str = "STG") -> float:
    """Instructions per element of a loop that stores (kind LDG: loads) every element once."""
    moved = sum(size * count for size, count in accesses(code, kind).items())
    return sum(i.opcode != "NOP" for i in code) / (moved / itemsize)
