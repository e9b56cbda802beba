"""The machine code of csrc/cuda, compiled without a GPU for an A100 (sm_80), an H100/H200 (sm_90) and, from the PTX
that ships, for what came later: registers, spills, 16-byte loads, instructions per element, no atomics.  The module."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
import torch

import zo_kernels as zk

pytest.importorskip("triton")  # its wheel has the disassembler

from bench.sass import CUOBJDUMP, Instruction, Kernel, accesses  # noqa: E402

CSRC = Path(__file__).resolve().parent.parent / "csrc"
TARGETS = {"sm_80": "compute_80", "sm_90": "compute_90", "sm_120": "compute_90"}


@pytest.fixture(scope="module")
def nvcc():
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    found = next(filter(None, (shutil.which(place) for place in places if place)), None)
    if found is None:
        pytest.skip("no nvcc in CUDACXX, PATH, CUDA_HOME or /usr/local/cuda")
    return found


class Compiled(Kernel):
    """One kernel of a cubin."""

    def __init__(self, cubin: Path, name: str, log: str):
        self._cubin, self.name = cubin, name
        # ptxas writes three lines on a kernel: its name, its stack and spills, its registers.
        self.resources = re.search(rf"Function properties for \w*{name}\w*\n(.*\n.*)", log)[1]
        self.frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)

    @cached_property
    def instructions(self) -> list[Instruction]:
        (code,) = (part for part in self._dump("--dump-sass").split("Function : ") if self.name in part.split()[0])
        found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ +)?([^;]+?)\s*;", code)
        return [Instruction(int(address, 16), text) for address, text in found]

    @cached_property
    def registers(self) -> int:
        return int(re.search(r"Used (\d+) registers", self.resources)[1])


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request, nvcc, tmp_path_factory):
    """The chunk kernel and the block kernel for one target, with the options of CMakeLists.txt."""
    if not CUOBJDUMP.exists():
        pytest.skip("this triton wheel has no cuobjdump")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if request.param not in known:
        pytest.skip(f"this nvcc has no {request.param}")
    cubin = tmp_path_factory.mktemp("cuda") / "block_stats.cubin"
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", f"-I{CSRC}", "-cubin", "-o", str(cubin)]
    command += ["-gencode", f"arch={TARGETS[request.param]},code={request.param}", str(CSRC / "cuda/block_stats.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Compiled(cubin, name, done.stderr) for name in ("chunk_kernel", "block_kernel")]


def test_registers_fit_and_none_is_spilled(kernels):
    chunk, block = kernels
    assert chunk.registers <= 40  # 6 thread blocks of 256 on a processor of 65,536 registers
    assert block.registers <= 48  # counted: 32, 32, 40
    assert len(chunk.frames) == 2 and set(chunk.frames) == {("0", "0", "0")}
    assert not chunk.spills() and not block.spills()


def test_the_body_reads_16_bytes_at_a_time(kernels):
    """Of each dtype a loop of 4 or more loads, all of 16 bytes, in 4.7 (16-bit) or 4.2 instructions per element."""
    bodies = {}
    for loop in kernels[0].loops:
        opcodes = collections.Counter(instruction.opcode for instruction in loop)
        loads = accesses(loop, "LDG")
        if set(loads) == {16} and loads[16] >= 4:
            elements = opcodes["FFMA"] + opcodes["FMUL"]  # a square each
            bodies.setdefault(elements // loads[16], []).append((len(loop) / elements, loop))
    assert sorted(bodies) == [4, 8]
    assert len(bodies[8]) == 2 and len(bodies[4]) >= 1
    assert max(count for count, _ in bodies[8]) <= 4.8, bodies[8]
    assert max(count for count, _ in bodies[4]) <= 4.4, bodies[4]
    for _, loop in bodies[8]:
        last_load = max(i for i, instruction in enumerate(loop) if instruction.opcode.startswith("LDG"))
        first_use = min(i for i, instruction in enumerate(loop) if instruction.opcode in ("FADD", "FFMA", "FMUL"))
        assert last_load < first_use  # all four go out before anything waits


def test_no_atomics_and_no_contraction(kernels):
    for kernel in kernels:
        opcodes = {instruction.opcode.split(".")[0] for instruction in kernel.instructions}
        assert not opcodes & {"RED", "ATOM", "ATOMG", "ATOMS"}
    # The block kernel's divisions and root are made of DFMA.
    assert "DFMA" not in {instruction.opcode for instruction in kernels[0].instructions}


def test_the_module_has_the_cuda_runtime_inside_and_names_its_errors():
    reason = zk.why_unavailable("cuda")
    if reason:
        pytest.skip(reason)
    binary = importlib.util.find_spec("zo_kernels._cuda").origin
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cuda", {binary!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "libcud" not in open("/proc/self/maps").read()
assert module.CHUNK == 65536
module.load_kernels(12345)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"^RuntimeError: block_stats: cudaError\w+: .+", done.stderr, re.MULTILINE), done.stderr


def test_a_machine_without_a_gpu_gets_a_cuda_error_not_a_crash():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = zk.why_unavailable("cuda")
    if reason:
        pytest.skip(reason)
    from zo_kernels import _cuda

    with pytest.raises(RuntimeError, match="cudaError"):
        _cuda.block_stats(0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0)
