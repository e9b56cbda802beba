"""Jobs of the comparison, each run in a process of its own: learn something once, or put one method on one cell.

A method on a cell: rates a factor of 2 apart around a centre, one run each on seed 0, scored on dev rows, and further
ones while the best is at an end; then the best one with fresh seeds, on held-out rows.  A run that has its JSON in the
work folder is not repeated; its row is appended when it ends.

The centre is the model's central rate, made for two-point steps along scaled noise.  Of another method (Adam's, signs,
normalised steps: rates of other orders) it is where the weights are as far from the base as MeZO's are at the central
rate, after PROBED forwards.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.quality.artefacts import DERIVED, artefact_path, central_rate, derive, make_artefact, per_layer
from bench.quality.bed import Bed, Make, Run
from bench.quality.cells import Cell
from bench.rows import append, machine, spread, version
from zo_finetuner.cli import keep_large_buffers
from zo_finetuner.files import make_folder, write_json
from zo_finetuner.optim import PRESETS, check_method, make_method

MULTIPLES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # of the centre
PROBED = 120  # forwards
ADAM_RATES = (2e-4, 7e-4, 2e-3)
TUNING_SEED, SEEDS = 0, (1, 2, 3)
PUBLISHED = "llama1B_finetuner.pth"

#: provider -> (recipe that its scales come from, whether from several sets).  Names that are not here are optimizers
#: of the library's own that need nothing.
TRANSFERRED = "improved, transferred"
LEARNED = {
    "paper": ("paper", False),
    "closed-form": ("closed-form", False),
    "improved": ("improved", False),
    "improved, not normalised": ("improved", False),
    "improved, per layer": ("improved", False),
    "improved, several sets": ("improved", True),
    "improved, transferred": ("improved", False),
    "es, improved scales": ("improved", False),
    "fzoo, improved scales": ("improved", False),
}
ON_SCALES = {"es, improved scales": "es", "fzoo, improved scales": "fzoo"}  # other estimators along the scaled noise
#: The providers of the main table: what all cells get first, and then.
ROUNDS = ("adam", "mezo", "improved", "closed-form", "random"), ("paper", "published", "self-calibrated")
ABLATIONS = ("improved, several sets", "improved, per layer", "improved, not normalised")
#: What another model of the family has learned, mapped block by block (`--transfer`): 5 layers of 64, 6 of 256.
DONORS = {"stories260k-llama": "imdb-llama-6m", "imdb-llama-6m": "stories260k-llama"}
TWO_POINT = {"mezo", "random", "published", "sigma-one", *LEARNED, "self-calibrated"} - set(ON_SCALES)  # MeZO's rates


def check_provider(name: str) -> None:
    """Raises InputError for a name that is neither here nor in the library."""
    if name not in ("adam", "random", "published", *LEARNED):
        check_method(name)


@dataclass(frozen=True)
class Place:
    """Folders and sizes that all jobs share.  case: of the rows.  multiples: rates that are always tried; more: how
    many beyond their ends at most."""

    shared: Path
    work: Path
    out: Path
    quick: bool = False
    device: str = "cpu"
    case: str = "quality"
    multiples: tuple[float, ...] = MULTIPLES
    more: int = 3

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS[:2] if self.quick else SEEDS

    @property
    def rows(self) -> Path:
        return self.out / f"{self.case}.jsonl"


@dataclass(frozen=True)
class Central:
    """The central rate of a model."""

    model: str

    @property
    def name(self) -> str:
        return f"central rate of {Path(self.model).name}"

    def result(self, place: Place) -> Path:
        return place.work / "central" / f"{Path(self.model).name}.json"

    def run(self, place: Place) -> None:
        _write(self.result(place), {"lr": central_rate(place.work, place.shared, self.model)})


@dataclass(frozen=True)
class Learn:
    """One recipe on one or several sets."""

    model: str
    recipe: str
    sets: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"learn {self.recipe} for {Path(self.model).name} on {', '.join(self.sets)}"

    def result(self, place: Place) -> Path:
        return artefact_path(place.work, self.model, self.recipe, self.sets).parent / "result.json"

    def run(self, place: Place) -> None:
        make_artefact(place.work, place.shared, self.model, self.recipe, self.sets, place.quick)


@dataclass(frozen=True)
class Derive:
    """A fine-tuned derivative of a base model."""

    base: str
    model: str

    @property
    def name(self) -> str:
        return f"derive {Path(self.model).name}"

    def result(self, place: Place) -> Path:
        return Path(self.model) / DERIVED

    def run(self, place: Place) -> None:
        derive(place.work, place.shared, self.base, Path(self.model))


@dataclass(frozen=True)
class Deploy:
    """One method on one cell."""

    cell: Cell
    provider: str

    @property
    def name(self) -> str:
        return f"{self.provider} on {self.cell.name}"

    @property
    def sets(self) -> tuple[str, ...]:
        """What its scales are learned on; empty where nothing is."""
        if self.provider not in LEARNED:
            return ()
        return self.cell.learn_on_several if LEARNED[self.provider][1] else (self.cell.learn_on,)

    @property
    def learned_for(self) -> str:
        """Folder of the model that its scales are learned for."""
        own = Path(self.cell.learned_for)
        return str(own.with_name(DONORS[own.name])) if self.provider == TRANSFERRED else str(own)

    @property
    def learns(self) -> Learn | None:
        return Learn(self.learned_for, LEARNED[self.provider][0], self.sets) if self.sets else None

    def folder(self, place: Place) -> Path:
        return place.work / "runs" / f"{self.cell.name}-{self.cell.steps}" / self.provider.replace(", ", "-")

    def result(self, place: Place) -> Path:
        return self.folder(place) / "done.json"

    def left(self, place: Place) -> int:
        """Runs that are still to be made, at least."""
        if self.result(place).is_file():
            return 0
        rates = len(ADAM_RATES if self.provider == "adam" else place.multiples)
        return max(rates + len(place.seeds) - len(list(self.folder(place).glob("*-*.json"))), 1)

    def run(self, place: Place) -> None:
        bed = Bed(self.cell, place.shared, place.work)
        if self.provider == "adam":
            centre, multiples, more, go = 1.0, ADAM_RATES, 0, bed.adam
        else:
            centre, multiples, more = self._centre(place, bed), place.multiples, place.more
            go = partial(bed.zeroth_order, maker(self, place), eps=eps_of(self.provider))
        losses = {}
        while (multiple := _next(multiples, losses, more)) is not None:
            losses[multiple] = self._once(place, bed, go, centre, multiple, TUNING_SEED, "dev")
        best = min(losses, key=losses.__getitem__)
        edge = best in (min(losses), max(losses))
        for seed in place.seeds:
            self._once(place, bed, go, centre, best, seed, "test", edge=edge)
        tried = sorted(losses.items())
        write_json(self.result(place), {"multiple": best, "lr": best * centre, "edge": edge, "dev": tried})

    def _centre(self, place: Place, bed: Bed) -> float:
        central = _read(Central(self.cell.learned_for).result(place))["lr"]
        if self.provider in TWO_POINT:
            return central
        path = self.folder(place) / "centre.json"
        if not path.is_file():
            mezo = bed.travel(maker(Deploy(self.cell, "mezo"), place), PROBED)
            own = bed.travel(maker(self, place), PROBED, eps_of(self.provider))
            _write(path, {"lr": float(f"{central * mezo / own:.1e}")})
        return _read(path)["lr"]

    def _once(
        self, place: Place, bed: Bed, go: Callable[..., Run], centre: float, multiple: float, seed: int, split: str,
        **more: Any,
    ) -> float:  # fmt: skip
        path = self.folder(place) / f"{split}-{multiple:.3g}-{seed}.json"
        if path.is_file():
            return _read(path)["loss"]
        run = go(centre * multiple, seed, split)
        row = _row(self, bed, run, split, seed, place) | {"lr": centre * multiple, **more}
        if split == "dev":
            row["rate"] = round(multiple, 4)
        append(place.rows, row)
        reference = bed.first(split)[0] if split == "dev" or bed.rows.prior is None else bed.rows.prior
        _write(path, {"loss": run.loss, "reference": reference, "lr": centre * multiple, "curve": run.curve})
        return run.loss


def _next(multiples: tuple[float, ...], losses: dict[float, float], more: int) -> float | None:
    """The next rate to try: those given, then beyond the end that is best, `more` at most."""
    for multiple in multiples:
        if multiple not in losses:
            return multiple
    best = min(losses, key=losses.__getitem__)
    if len(losses) >= len(multiples) + more or best not in (min(losses), max(losses)):
        return None
    apart = multiples[1] / multiples[0]
    return best / apart if best == min(losses) else best * apart


def optimizer_of(provider: str) -> str:
    """The library's name of what a provider is."""
    if provider in ON_SCALES:
        return ON_SCALES[provider]
    if provider == "improved, per layer":
        return "closed-form"
    return "zo-finetuner" if provider in ("random", "published", *LEARNED) else provider


def eps_of(provider: str) -> float:
    return PRESETS[optimizer_of(provider)].eps


def maker(job: Deploy, place: Place) -> Make:
    """Random nets are drawn anew for every seed."""
    provider, options = job.provider, {}
    if provider in LEARNED:
        path = artefact_path(place.work, job.learned_for, LEARNED[provider][0], job.sets)
        options = {"pertnn": path, "normalize": provider != "improved, not normalised"}
        options["transfer"] = provider == TRANSFERRED or bool(job.cell.base)
    if provider == "improved, per layer":
        options = {"pertnn": per_layer(path)}
    elif provider == "published":
        options = {"pertnn": place.shared / "pertnn" / PUBLISHED}
    name = optimizer_of(provider)
    return lambda model, seed: make_method(name, model, batch_size=job.cell.batch, seed=seed, **options)


def _row(job: Deploy, bed: Bed, run: Run, split: str, seed: int, place: Place) -> dict[str, Any]:
    """`test_loss` or `dev_loss` of one run, with its curve: [forwards, loss] at every point."""
    row = {
        "case": place.case, "provider": job.provider, "dtype": "float32", "n": len(getattr(bed.rows, split)),
        "metric": f"{split}_loss", "unit": "nats", "phase": "tune" if split == "dev" else "report",
        "model": Path(job.cell.model).name, "task": job.cell.task, "steps": job.cell.steps, "seed": seed,
        "forwards": run.curve[-1][0], "curve": [[x, round(y, 5)] for x, y in run.curve],
        "base_loss": bed.first(split)[0], "learned_on": list(job.sets), "time_s": round(run.seconds, 2),
        "processor_s": round(run.processor_seconds, 2), "forwards_per_step": run.forwards,
        "diverged": run.diverged, "transformers": version("transformers"), **spread([run.loss]),
        **machine(place.device),
    }  # fmt: skip
    if bed.rows.prior is not None:
        row["prior_loss"] = bed.rows.prior
    if run.state is not None:
        row["state"] = round(run.state, 4)
    if run.accuracy is not None:
        row |= {"accuracy": run.accuracy, "base_accuracy": bed.first(split)[1]}
    return row


Job = Central | Learn | Derive | Deploy


def learnable(deploy: Deploy, place: Place) -> bool:
    """Whether first-order Adam's held-out loss is below the reference (the prior, else the base model's loss) by more
    than their own spread."""
    runs = [_read(path) for path in sorted(deploy.folder(place).glob("test-*.json"))]
    losses = [run["loss"] for run in runs]
    return runs[0]["reference"] - statistics.median(losses) > max(losses) - min(losses)


def work_on(job: Job, place: Place) -> str:
    """In a process of its own, of one thread."""
    import logging

    keep_large_buffers()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    job.run(place)
    return job.name


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    make_folder(path.parent)
    write_json(path, value)
