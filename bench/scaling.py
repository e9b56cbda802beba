"""How far data-parallel steps scale: simulated to 1,000 workers from measured step times and the bytes that travel.

    step of N workers = the slowest of N draws of a worker's own step + collectives
    ours              one all-gather of 8 bytes for every probe and micro-batch:
                      latency * log2 N + (N - 1) * bytes / bandwidth
    first order       for comparison, an all-reduce of bf16 gradients:
                      2 latency * log2 N + 2 (N - 1) / N * bytes / bandwidth,  nothing overlapped, after 1.5 times the
                      work (forward and backward are three forwards, ours are two)

Weak scaling: each worker keeps its batch.  Efficiency: the rate of a worker among N, against one alone.  Assumed and
not measured: the networks below, log-normal steps that are independent of each other, a spread of 3 % where a step is
itself predicted.  Measured: step times of a CPU and their spread (step.jsonl), and the gather between processes of this
machine.  Rows: `efficiency` (p20 .. p80: of simulated steps), `gather_s`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from bench.rows import append, machine, newest, read, spread

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
STEPS = 400  # simulated, per point
PROBES, MICRO_BATCHES = 2, 1  # MeZO
SPREAD = 0.03  # of a predicted step: standard deviation of its logarithm
BACKWARD = 1.5  # first-order work of a step, in units of two forwards
BETWEEN = 2 * 0.8416  # standard deviations from p20 to p80


class Network(NamedTuple):
    """latency: seconds of a message; bandwidth: bytes per second, of a worker."""

    latency: float
    bandwidth: float


NETWORKS = {
    "InfiniBand": Network(5e-6, 50e9),
    "10 Gb Ethernet": Network(50e-6, 1.25e9),
    "internet": Network(50e-3, 12.5e6),
}


class Job(NamedTuple):
    """A step of one worker: its seconds, the spread of their logarithm, parameters of the model."""

    seconds: float
    spread: float
    parameters: float


def step_seconds(job: Job, network: Network, workers: int, first_order: bool = False, steps: int = STEPS) -> Any:
    """(steps,) seconds of a step that `workers` take together.  The same draws for every network."""
    draws = numpy.random.default_rng(0).standard_normal((steps, workers))
    work = job.seconds * (BACKWARD if first_order else 1.0)
    slowest = work * numpy.exp(job.spread * draws).max(axis=1)
    return slowest + traffic_seconds(job, network, workers, first_order)


def traffic_seconds(job: Job, network: Network, workers: int, first_order: bool = False) -> float:
    hops = math.ceil(math.log2(workers))
    if first_order:
        share = 2 * (workers - 1) / workers
        return 2 * hops * network.latency + share * 2 * job.parameters / network.bandwidth
    return hops * network.latency + (workers - 1) * message_bytes() / network.bandwidth


def message_bytes(probes: int = PROBES, micro_batches: int = MICRO_BATCHES) -> int:
    """What a rank gives to a step's gather (`zo_finetuner.ranks`): a loss sum and a weight, fp32."""
    return 8 * probes * micro_batches


def efficiency(job: Job, network: Network, workers: int, first_order: bool = False) -> Any:
    """(steps,): the rate of a worker among so many, against one alone (its median step)."""
    alone = job.seconds * (BACKWARD if first_order else 1.0)
    return alone / step_seconds(job, network, workers, first_order)


def jobs(folder: Path) -> dict[str, Job]:
    """From the rows of `step` (this project's MeZO on a CPU) and of `plan` (predicted, an H100)."""
    found = {}
    for row in newest(read(folder / "step.jsonl")):
        if (row["provider"], row["metric"], row.get("task")) == ("zo_finetuner", "time_s", "sst2") and row["p50"] > 0:
            found["6M, SST-2, CPU"] = Job(row["p50"], math.log(row["p80"] / row["p20"]) / BETWEEN, 6e6)
    for row in newest(read(folder / "plan.jsonl")):
        if row["provider"] == "zo_finetuner" and row["metric"] == "time_s" and row["device"].startswith("H100"):
            tokens, model = row["tokens"], {"llama-1b": 1.24e9, "llama-8b": 8.03e9}.get(row["model"])
            if model and not row.get("phase"):
                size = f"{model / 1e9:.0f}B"
                found[f"{size}, {tokens:,.0f} tokens, H100 (predicted)"] = Job(row["p50"], SPREAD, model)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=Path, default=Path("bench/results"), help="folder of step.jsonl and plan.jsonl")


def run(arguments: argparse.Namespace) -> int:
    facts, path = machine("cpu"), arguments.out / "scaling.jsonl"
    common = {"case": "scaling", "dtype": "", **facts}
    for size in (2,) if arguments.quick else (2, 4):
        row = {"provider": "gloo", "n": size, "metric": "gather_s", "unit": "s", **spread(gather_seconds(size))}
        append(path, common | row)
    simulated = jobs(arguments.rows)
    for name, job in simulated.items():
        for kind in ("zo_finetuner", "first order"):
            for network_name, network in NETWORKS.items():
                for workers in WORKERS[:4] if arguments.quick else WORKERS:
                    values = efficiency(job, network, workers, kind == "first order")
                    row = {"provider": kind, "model": name, "network": network_name, "n": workers,
                           "metric": "efficiency", "unit": "1", **spread(list(values))}  # fmt: skip
                    append(path, common | row)
    draw(simulated, arguments.out / "scaling.png")
    return 0


def draw(simulated: dict[str, Job], path: Path) -> None:
    """Left: the job of most parameters and fewest tokens on every network; right: what stragglers cost any job."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(1.3, 1))
    name, job = max(simulated.items(), key=lambda item: (item[1].parameters, -item[1].seconds))
    for number, (network_name, network) in enumerate(NETWORKS.items()):
        for first_order, style in ((False, "-"), (True, "--")):
            medians = [float(numpy.median(efficiency(job, network, n, first_order))) for n in WORKERS]
            label = f"{network_name}{', first order' if first_order else ''}"
            left.plot(WORKERS, medians, style, color=f"C{number}", marker=".", label=label)
    speeds = ", ".join(f"{n} {w.latency * 1e6:g} us, {w.bandwidth / 1e9:g} GB/s" for n, w in NETWORKS.items())
    left.set_title(f"{name}, a step of {job.seconds * 1e3:.0f} ms", fontsize=10)
    left.set_xlabel(f"workers\nassumed: {speeds}", fontsize=8)
    gradient = 2 * job.parameters
    left.set_ylabel(f"efficiency ({message_bytes()} bytes a step; gradients {gradient / 1e9:.0f} GB)", fontsize=8)
    spreads = {f"{100 * s:.0f} %": Job(0.1, s, 0) for s in (0.01, 0.03, 0.1)}
    spreads |= {f"{100 * j.spread:.0f} %, measured ({n})": j for n, j in simulated.items() if j.spread != SPREAD}
    for label, spread_job in spreads.items():
        free = Network(0.0, math.inf)
        right.plot(WORKERS, [float(numpy.median(efficiency(spread_job, free, n))) for n in WORKERS], marker=".",
                   label=label)  # fmt: skip
    right.set_title("steps that vary, nothing else: all wait for the slowest", fontsize=10)
    right.set_xlabel("workers\nassumed: log-normal, independent", fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        axes.set_ylim(0, 1.05)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gather_seconds(size: int, repeats: int = 200) -> list[float]:
    """Seconds of one gather of a step's message between so many processes of this machine (gloo), on rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_gather, (size, folder, repeats), nprocs=size)
        return torch.load(Path(folder) / "seconds.pt").tolist()


def _gather(rank: int, size: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    message, seconds = torch.zeros(message_bytes() // 4), []
    parts = [torch.empty_like(message) for _ in range(size)]
    for _ in range(repeats + 10):
        began = time.perf_counter()
        dist.all_gather(parts, message)
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        torch.save(torch.tensor(seconds[10:], dtype=torch.float64), Path(folder) / "seconds.pt")
    dist.destroy_process_group()
