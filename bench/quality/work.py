"""Jobs carried out: how long they will take, then those that are left, a few processes at a time, in their order.

A cell that first-order Adam cannot learn is listed, and no zeroth-order method is run on it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace

import torch

from bench.quality.bed import ADAM_STEPS, Bed
from bench.quality.cells import BATCH, EPS, TEXT_BATCH, Cell
from bench.quality.jobs import ADAM_RATES, Central, Deploy, Derive, Job, Learn, Place, learnable, work_on
from zo_finetuner.optim import MeZO

META_STEP = {"improved": 3.0, "paper": 2.0, "closed-form": 3.0}  # two-point steps that a step of learning takes
META_STEPS = {"improved": 300, "paper": 555, "closed-form": 16}
EVALUATING = 1.2  # times the steps' own time


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
    if not isinstance(job, Deploy):
        return []
    if job.provider == "adam":
        return [Derive(job.cell.base, job.cell.model)] if job.cell.base else []
    needs = [Central(job.cell.learned_for), Deploy(job.cell, "adam"), job.learns]
    return [need for need in needs if need is not None]


def _worth_it(job: Job, place: Place) -> bool:
    return not isinstance(job, Deploy) or job.provider == "adam" or learnable(Deploy(job.cell, "adam"), place)


def print_plan(jobs: list[Job], place: Place, workers: int) -> None:
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
            usual = [value for cell, value in seconds.items() if cell.learned_for == job.model]
            minutes = META_STEPS[job.recipe] * META_STEP[job.recipe] * sum(usual) / max(len(usual), 1) / 60
            total += minutes
            print(f"{job.name:<83}{minutes:>8.1f}")
    rates, seeds = len(place.multiples), len(place.seeds)
    print(f"each method and cell: {rates} to {rates + place.more} rates on dev rows, 1 seed, then {seeds} fresh seeds "
          f"on held-out rows; Adam {len(ADAM_RATES)} rates; batch {BATCH}, of text {TEXT_BATCH}; eps {EPS}, or the "
          "method's own; no other run where Adam learns nothing")
    print(f"about {total / workers:.0f} minutes with {workers} processes", flush=True)


def _step_seconds(cell: Cell, place: Place) -> float:
    """A step of MeZO at rate 0, the faster of two; of a derivative as of its base."""
    import warnings

    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = replace(cell, model=cell.learned_for)
        return Bed(base, place.shared, place.work).probe(lambda model, seed: MeZO())
    finally:
        torch.set_num_threads(threads)
