"""The command: prints its plan, then does the jobs that are left, two processes at a time, most telling ones first.

A cell that first-order Adam cannot learn is listed, and no zeroth-order method is run on it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from bench.quality.artefacts import overhead
from bench.quality.bed import ADAM_STEPS, Bed
from bench.quality.cells import BATCH, EPS, TEXT_BATCH, Cell, grid
from bench.quality.jobs import (
    ABLATIONS,
    ADAM_RATES,
    Central,
    Deploy,
    Learn,
    Place,
    check_provider,
    learnable,
    rounds,
    work_on,
)
from bench.quality.picture import draw
from bench.quality.pretrain import add_pretrain_arguments, pretrain
from bench.quality.verdict import report
from bench.rows import append, machine, newest, read, spread
from bench.shapes import shapes
from zo_finetuner.errors import InputError
from zo_finetuner.optim import MeZO

Job = Central | Learn | Deploy
META_STEP = {"improved": 3.0, "paper": 2.0, "closed-form": 3.0}  # two-point steps that a step of learning takes
META_STEPS = {"improved": 300, "paper": 555, "closed-form": 16}
EVALUATING = 1.2  # times the steps' own time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("ZO_DATA", "../shared"))
    add = parser.add_argument
    add("--shared", type=Path, default=shared, help="development data (models, rows, texts, published nets)")
    add("--work", type=Path, default=Path("runs/quality"), help="finished runs, which are not repeated")
    add("--model", action="append", default=[], help="folder of a model; default: the small ones of --shared")
    add("--task", action="append", default=[], help="only these deployments (sst2, copa, squad-text, ...)")
    add("--provider", action="append", default=[], help="only these methods; any optimizer of the library")
    add("--steps", type=int, help="steps per run, instead of each cell's own; of --pretrain, instead of minutes")
    add("--ablations", action="store_true", help="also: several learning sets, one scale per layer, no normalisation")
    add("--workers", type=int, help="processes (default: 2, on a GPU 1)")
    add("--budget", type=float, metavar="MINUTES", help="no job is begun after these")
    add("--plan", action="store_true", help="print the plan and end")
    add_pretrain_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes of the jobs
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        print("quality: torch sees no CUDA device; --device cpu measures this machine")
        return 1
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if arguments.pretrain:
            return pretrain(arguments)
        place = Place(arguments.shared, arguments.work, arguments.out, arguments.quick, device)
        cells = grid(arguments.shared, arguments.model, arguments.task, arguments.quick, arguments.steps)
        jobs = plan(cells, arguments.provider, arguments.ablations)
    except InputError as error:
        print(f"quality: {error}")
        return 1
    workers = arguments.workers or (1 if device == "cuda" else 2)
    _print_plan(jobs, place, workers)
    if arguments.plan:
        return 0
    end = None if arguments.budget is None else started + 60 * arguments.budget
    failed = work(jobs, place, workers, end)
    _overhead(place)
    rows = newest(read(place.out / "quality.jsonl"))
    print(report(rows))
    draw(rows, place.out / "quality.png")
    return int(failed > 0)


def plan(cells: list[Cell], providers: list[str], ablations: bool) -> list[Job]:
    """All jobs in the order in which they are begun, what is learned before what needs it.  Raises InputError."""
    for name in providers:
        check_provider(name)
    models = list(dict.fromkeys(cell.model for cell in cells))
    turns = [[cell for cell in cells if cell.model == model] for model in models]
    ordered = [cells[i] for i in range(max(map(len, turns))) for cells in turns if i < len(cells)]
    asked = [("adam", *providers)] if providers else rounds()
    deploys = [Deploy(cell, name) for names in asked for cell in ordered for name in names]
    if ablations:
        deploys += [Deploy(cell, name) for turn in turns for cell in turn[:2] for name in ABLATIONS]
    jobs: list[Job] = [Central(model) for model in models]
    for deploy in dict.fromkeys(deploys):
        if deploy.learns is not None and deploy.learns not in jobs:
            jobs.append(deploy.learns)
        jobs.append(deploy)
    return jobs


def work(jobs: list[Job], place: Place, workers: int, end: float | None) -> int:
    """Do what is left; the number of jobs that failed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # models of a few million parameters: more processes, not more threads
    waiting = [job for job in jobs if not job.result(place).is_file()]
    running: dict[Future, Job] = {}
    failed: list[Job] = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            late = end is not None and time.monotonic() > end
            for job in [] if late else list(waiting):
                if len(running) < workers and all(need.result(place).is_file() for need in _needs(job)):
                    waiting.remove(job)
                    if _worth_it(job, place):
                        running[pool.submit(work_on, job, place)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                if error is not None:
                    failed.append(job)
                    print(f"FAILED {job.name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
                else:
                    print(f"{time.strftime('%H:%M:%S')} {job.name}; {len(waiting)} jobs wait", flush=True)
    if waiting:
        print(f"left out: {len(waiting)} jobs, {waiting[0].name} among them; the same command goes on with them")
    return len(failed)


def _needs(job: Job) -> list[Job]:
    """The jobs whose results this one reads."""
    if not isinstance(job, Deploy) or job.provider == "adam":
        return []
    needs = [Central(job.cell.model), Deploy(job.cell, "adam"), job.learns]
    return [need for need in needs if need is not None]


def _worth_it(job: Job, place: Place) -> bool:
    return not isinstance(job, Deploy) or job.provider == "adam" or learnable(Deploy(job.cell, "adam"), place)


def _print_plan(jobs: list[Job], place: Place, workers: int) -> None:
    """Runs and minutes that are left, from a probe step per cell."""
    deploys = [job for job in jobs if isinstance(job, Deploy)]
    cells = list(dict.fromkeys(job.cell for job in deploys if job.left(place)))
    seconds = {cell: _step_seconds(cell, place) for cell in cells}
    total = 0.0
    print(f"{'cell':<32}{'learned on':<14}{'steps':>6}{'ms/step':>9}{'runs left':>11}{'minutes':>9}")
    for cell in cells:
        mine = [job for job in deploys if job.cell == cell]
        runs = sum(job.left(place) for job in mine)
        minutes = sum(
            job.left(place) * (1.5 * ADAM_STEPS if job.provider == "adam" else cell.steps) for job in mine
        ) * seconds[cell] * EVALUATING / 60  # fmt: skip
        total += minutes
        print(f"{cell.name:<32}{cell.learn_on:<14}{cell.steps:>6}{seconds[cell] * 1e3:>9.0f}{runs:>11}{minutes:>9.1f}")
    for job in jobs:
        if isinstance(job, Learn) and not job.result(place).is_file():
            usual = [value for cell, value in seconds.items() if cell.model == job.model]
            minutes = META_STEPS[job.recipe] * META_STEP[job.recipe] * sum(usual) / max(len(usual), 1) / 60
            total += minutes
            print(f"{job.name:<83}{minutes:>8.1f}")
    rates, seeds = len(place.multiples), len(place.seeds)
    print(f"each method and cell: {rates} rates on dev rows, 1 seed, then {seeds} fresh seeds on held-out rows; "
          f"Adam {len(ADAM_RATES)} rates; batch {BATCH}, of text {TEXT_BATCH}; eps {EPS}; no other run where "
          "Adam learns nothing")
    print(f"about {total / workers:.0f} minutes with {workers} processes", flush=True)


def _step_seconds(cell: Cell, place: Place) -> float:
    """A step of MeZO at rate 0, the faster of two."""
    import warnings

    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Bed(cell, place.shared, place.work).probe(lambda model, seed: MeZO())
    finally:
        torch.set_num_threads(threads)


def _overhead(place: Place) -> None:
    """Bytes of the scales' policies for OPT-30B's 772 blocks; once."""
    named, path = shapes("opt-30b"), place.out / "quality.jsonl"
    known = {(row["provider"], row["p50"]) for row in read(path) if row["metric"] == "overhead_bytes"}
    for provider, size in overhead([name for name, _ in named], [math.prod(shape) for _, shape in named]).items():
        if (provider, size) in known:
            continue
        row = {"case": "quality", "provider": provider, "dtype": "float32", "n": len(named), "model": "opt-30b",
               "metric": "overhead_bytes", "unit": "bytes", **spread([size]), **machine("cpu")}  # fmt: skip
        append(path, row)
