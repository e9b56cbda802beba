"""`python -m bench.profile`: where each kernel's time goes, as a table and as a trace for Perfetto or chrome://tracing.

    on a GPU    measured time, bytes, share of copy bandwidth; registers, spills, instructions per element of the same
                kernels compiled for sm_90; torch's table by kernel; with ncu in PATH, the command that looks deeper
    without     the cpu backend, measured and traced; the Triton kernels on sm_90, PREDICTED from their machine code
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.kernels import keep_pages
from bench.operations import Call, Tensors, list_calls, tensor_calls
from bench.passes import weights
from bench.rows import spread, version
from bench.shapes import CONFIGS, Shapes, numel, shapes
from bench.timing import clock
from zo_kernels import Blocks, use_backend, why_unavailable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPEATS = 11
CUDA_STATS = "stats (cuda)"


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--model-like", choices=CONFIGS, help="the parameter list of a real model")
    size.add_argument("--numel", type=int, default=1 << 22, help="one tensor of so many elements (default 2^22)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--only", nargs="+", metavar="OP", help="some of the ops, by their names in the table")
    parser.add_argument("--once", action="store_true", help="run every op twice and measure nothing: for ncu")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"), help="where trace.json goes")
    return parser.parse_args(words)


def calls(named: Shapes, dtype: torch.dtype, device: torch.device, only: Iterable[str] | None) -> dict[str, Call]:
    """The passes over the whole list, and those of one tensor on its largest.  ValueError for an unknown op."""
    held = weights(named, dtype, device)
    largest = max((tensor for _, tensor in held), key=torch.numel)
    found = list_calls(Blocks(held))
    found |= tensor_calls([Tensors(largest, torch.empty_like(largest), torch.empty_like(largest))])
    if device.type == "cuda" and why_unavailable("cuda") is None:

        def stats() -> None:
            with use_backend("cuda"):
                found["stats"].run()

        found[CUDA_STATS] = Call(stats, 1)
    for name in only or ():
        if name not in found:
            raise ValueError(f"there is no op {name!r}; there are: {', '.join(found)}")
    return {name: call for name, call in found.items() if not only or name in only}


def main(words: list[str]) -> int:
    args = arguments(words)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend = "triton" if device.type == "cuda" else "cpu" if why_unavailable("cpu") is None else "reference"
    if device.type == "cpu":
        keep_pages()
    dtype = DTYPES[args.dtype]
    named = shapes(args.model_like) if args.model_like else [("theta", (args.numel,))]
    try:
        ops = calls(named, dtype, device, args.only)
    except ValueError as error:
        print(f"bench.profile: {error}", file=sys.stderr)
        return 2
    with use_backend(backend):
        if args.once:
            for call in ops.values():
                call.run(), call.run()
            return 0
        sizes = {"list": numel(named), "tensor": max(math.prod(shape) for _, shape in named)}
        _measured(ops, sizes, dtype, device, backend)
        trace = _trace(ops, args.out, device)
    print(f"trace: {trace}   (open in https://ui.perfetto.dev or chrome://tracing)")
    if shutil.which("ncu"):
        print(f"ncu:   {ncu(words)}")
    _predicted(ops, sizes, dtype)
    return 0


def _size(name: str, sizes: dict[str, int]) -> int:
    """Elements of an op: those of one tensor write a scratch."""
    return sizes["tensor" if "scratch" in name or "mirror" in name else "list"]


def _measured(
    ops: dict[str, Call], sizes: dict[str, int], dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    """Medians, and the bytes of each op as a share of a copy's bandwidth."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    timer, bandwidth = clock(device), _bandwidth(min(sizes["list"], (1 << 30) // dtype.itemsize), dtype, device)
    print(f"MEASURED: {backend} backend, {name}, copy {bandwidth / 1e9:.1f} GB/s")
    print(f"{'op':<22}{'time ms':>10}{'p20..p80':>18}{'MB moved':>10}{'ps/element':>12}{'of copy':>9}")
    for op, call in ops.items():
        n = _size(op, sizes)
        times, moved = spread(timer.measure(call.run, REPEATS)), call.accesses * n * dtype.itemsize
        between = f"{times['p20'] * 1e3:.3f}..{times['p80'] * 1e3:.3f}"
        print(f"{op:<22}{times['p50'] * 1e3:>10.3f}{between:>18}{moved / 1e6:>10.1f}{times['p50'] / n * 1e12:>12.2f}"
              f"{moved / times['p50'] / bandwidth:>9.2f}", flush=True)  # fmt: skip


def _bandwidth(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes per second of a copy of n elements, read and written."""
    source = torch.empty(n, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / spread(clock(device).measure(lambda: target.copy_(source), REPEATS))["p50"]


def _trace(ops: dict[str, Call], out: Path, device: torch.device) -> Path:
    """Three rounds of every op, each under its name."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as recorded:
        for op, call in ops.items():
            for _ in range(3):
                with record_function(f"zo.{op}"):
                    call.run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=40))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "trace.json"
    recorded.export_chrome_trace(str(path))
    return path


def _predicted(ops: dict[str, Call], sizes: dict[str, int], dtype: torch.dtype) -> None:
    """Every kernel of the ops on sm_90; the second stages of reductions have no bytes of their own."""
    if not version("triton"):
        print("no Triton, so no machine code for sm_90: pip install triton")
        return
    from bench.predict import CLOCK, COPY, CUOBJDUMP, compile_calls, native_kernels

    if not CUOBJDUMP.exists():
        print(f"no machine code for sm_90: this triton wheel has no disassembler at {CUOBJDUMP}")
        return
    print(f"PREDICTED from machine code for sm_90 (H200: {CLOCK / 1e9:.0f} G clocks/s over 132 multiprocessors, copy "
          f"{COPY / 1e12:.1f} TB/s, units overlapping perfectly), not measured:")  # fmt: skip
    head = f"{'op':<22}{'kernel':<20}{'registers':>10}{'spills':>8}{'instr/element':>14}"
    print(f"{head}{'time ms':>10}{'of copy':>9}  busiest unit")
    for op, codes in compile_calls(dtype, ops).items():
        moved = ops[op].accesses * dtype.itemsize
        for i, code in enumerate(codes):
            unit, load = code.busiest(moved)
            milliseconds = code.seconds(moved) * _size(op, sizes) * 1e3
            line = f"{'' if i else op:<22}{code.kernel:<20}{code.registers:>10}{code.spills:>8}"
            if i == 0:
                line += f"{code.per_element:>14.1f}{milliseconds:>10.3f}{code.share(moved):>9.2f}  {unit} {load:.2f}"
            print(line, flush=True)
    for kernel, registers, local in native_kernels() if "stats" in ops else ():
        print(f"{CUDA_STATS:<22}{kernel:<20}{registers:>10}{local:>8}   (bytes of local memory)")


def ncu(words: list[str]) -> str:
    """The command line that reads the hardware counters of the same ops."""
    return " ".join(["ncu --set full --clock-control none --target-processes all -o profile", sys.executable,
                     "-m bench.profile --once", *words])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
