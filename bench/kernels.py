"""Kernels on the CPU against the torch operators that MeZO's code runs, side by side in one process.

    perturb   theta += eps * z               torch: normal, mul, add as in `p.data + scale * z * eps`
    update    theta -= lr * g * z, rounded   torch: normal, mul, sub in the storage dtype
    stats     mean and unbiased variance     torch: mean() and var()
    copy      the same bytes, moved only
    changed   share of bf16 weights N(0, .02^2) that a pair of probes at eps 1e-3 leaves changed
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable

import torch

from bench.rows import append, machine, spread
from zo_kernels import Blocks, block_stats, perturb_, scratch, seed_tensor, update_, use_backend

ELEMENTS = 1 << 24


def _keep_pages() -> None:
    """No mmap for large buffers (glibc's M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1): torch's temporaries then cost no page
    faults, which on this machine double its time.  The comparison is with torch at its best."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)
    mallopt(-1, 2**31 - 1)


def _timed(run: Callable[[], object], repeats: int) -> list[float]:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def _torch_perturb(theta: torch.Tensor) -> None:
    z = torch.normal(mean=0, std=1, size=theta.size(), dtype=theta.dtype)
    theta.data = theta.data + 1.0 * z * 1e-3


def _torch_update(theta: torch.Tensor) -> None:
    z = torch.normal(mean=0, std=1, size=theta.size(), dtype=theta.dtype)
    theta.data = theta.data - 1e-6 * (0.3 * z)


def _cases(theta: torch.Tensor) -> dict[tuple[str, str], Callable[[], object]]:
    blocks, out = Blocks([("theta", theta)]), torch.empty_like(theta)
    seed, seeds = seed_tensor(5), seed_tensor([5])
    eps, coefs, rounding = torch.tensor(1e-3), torch.tensor([-3e-7]), seed_tensor(6)
    above = torch.tensor(1.0)
    ours = {
        "perturb": lambda: perturb_(blocks, seed, eps),
        "perturb rademacher": lambda: perturb_(blocks, seed, eps, dist="rademacher"),
        "scratch": lambda: scratch(theta, out, 7, seed, eps),
        "scratch stochastic": lambda: scratch(theta, out, 7, seed, eps, nearest_above=above),
        "update": lambda: update_(blocks, seeds, coefs, rounding_seed=rounding),
        "stats": lambda: block_stats(blocks),
    }
    foreign = torch.nn.Parameter(theta.clone(), requires_grad=False)
    theirs = {
        "perturb": lambda: _torch_perturb(foreign),
        "update": lambda: _torch_update(foreign),
        "stats": lambda: (foreign.mean(), foreign.var()),
    }
    return (
        {(name, "cpu"): run for name, run in ours.items()}
        | {(name, "torch"): run for name, run in theirs.items()}
        | {("copy", "copy"): lambda: out.copy_(theta)}
    )


def _changed(count: int) -> dict[str, float]:
    """MeZO's +eps, -2 eps, +eps in the storage dtype, and a pair of scratch probes, which write another tensor."""
    before = (torch.randn(count) * 0.02).to(torch.bfloat16)
    theirs, ours, out = before.clone(), before.clone(), torch.empty_like(before)
    z = torch.normal(mean=0, std=1, size=before.size(), dtype=before.dtype)
    for sign in (1, -2, 1):
        theirs = theirs + sign * z * 1e-3
    for sign in (1, -1):
        scratch(ours, out, 7, seed_tensor(5), torch.tensor(sign * 1e-3), nearest_above=torch.tensor(1.0))
    return {name: (end != before).float().mean().item() for name, end in (("torch", theirs), ("cpu", ours))}


def run(arguments: argparse.Namespace) -> None:
    count, repeats = (1 << 20, 5) if arguments.quick else (ELEMENTS, 11)
    _keep_pages()
    common = machine()
    print(f"{common['device']}, {common['threads']} threads, {count / 2**20:.0f} Mi elements")
    print(f"{'op':<20}{'dtype':<10}{'ours ms':>9}{'torch ms':>10}{'ratio':>7}{'copy ms':>9}")
    for dtype in (torch.float32, torch.bfloat16):
        theta = (torch.randn(count) * 0.02).to(dtype)
        name = str(dtype).removeprefix("torch.")
        median = {}
        with use_backend("cpu"):
            for (case, provider), timed in _cases(theta).items():
                values = spread(_timed(timed, repeats))
                median[case, provider] = values["p50"] * 1e3
                row = {"case": case, "provider": provider, "dtype": name, "n": count, "metric": "time_s", "unit": "s"}
                append(arguments.out / "kernels.jsonl", row | values | common)
        for case, provider in median:
            if provider == "cpu":
                torch_ms = median.get((case, "torch"))
                ratio = f"{torch_ms / median[case, 'cpu']:>7.1f}" if torch_ms else f"{'':>7}"
                print(f"{case:<20}{name:<10}{median[case, 'cpu']:>9.1f}"
                      f"{torch_ms or float('nan'):>10.1f}{ratio}{median['copy', 'copy']:>9.1f}")
    with use_backend("cpu"):
        shares = _changed(count)
    for provider, share in shares.items():
        row = {"case": "changed", "provider": provider, "dtype": "bfloat16", "n": count, "metric": "share", "unit": ""}
        append(arguments.out / "kernels.jsonl", row | spread([share]) | common)
    print(f"bf16 weights changed by a pair of probes: ours {shares['cpu']:.1%}, torch {shares['torch']:.1%}")
