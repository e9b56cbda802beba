"""`python -m bench methods`: every method in its plan, equal forwards, rates of one reach, verdicts, a tiny job."""

from __future__ import annotations

import json
import math

import pytest
from models import save_model, save_rows

from bench import rows as bench_rows
from bench.__main__ import main, parse
from bench.methods import command
from bench.methods.picture import draw
from bench.methods.table import against_mezo, measured
from bench.quality.bed import Bed
from bench.quality.cells import Cell
from bench.quality.jobs import ON_SCALES, Central, Deploy, Learn, Place, eps_of, maker
from bench.report import TABLES
from zo_finetuner.errors import InputError
from zo_finetuner.optim import METHODS, PRESETS, make_method
from zo_finetuner.params import trainable_blocks
from zo_finetuner.prediction import method_bytes


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    save_model(folder / "models" / "tiny")
    save_rows(folder / "data" / "sst2", train=64, validation=32)
    return folder


@pytest.fixture
def place(shared, tmp_path):
    """With a central rate, as its job would leave it."""
    place = Place(shared, tmp_path / "work", tmp_path / "out", case="methods")
    path = Central("tiny").result(place)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"lr": 2e-4}))
    return place


def cell(shared, steps=16):
    return Cell(str(shared / "models" / "tiny"), "sst2", steps)


def planned(*words):
    ((_, arguments),) = parse(["methods", *words])
    return command.jobs(arguments)


def test_the_plan_has_every_method_once_per_cell_and_learnability_first():
    made = planned()
    deploys = [job for job in made if isinstance(job, Deploy)]
    assert len(set(made)) == len(made) and made[0] == Central(deploys[0].cell.model)
    cells = list(dict.fromkeys(job.cell for job in deploys))
    assert len(cells) == len(command.CELLS)
    expected = {"random" if name == "zo-finetuner" else name for name in METHODS} - {"sigma-one"}
    expected |= {"improved", *ON_SCALES}
    for one in cells:
        names = [job.provider for job in deploys if job.cell == one]
        assert names[0] == "adam" and set(names[1:]) == expected and len(names) == len(expected) + 1
    assert {job.recipe for job in made if isinstance(job, Learn)} == {"closed-form", "improved"}
    for deploy in deploys:
        assert deploy.learns is None or made.index(deploy.learns) < made.index(deploy)


def test_the_plan_of_what_is_asked_for():
    made = planned("--model", "m", "--task", "wic", "--steps", "7", "--provider", "es", "--provider", "mezo")
    only = Cell("m", "wic", 7)
    assert made == [Central("m"), *(Deploy(only, name) for name in ("adam", "es", "mezo"))]
    with pytest.raises(InputError, match='unknown optimizer "eS"'):
        planned("--provider", "eS")


def test_a_method_gets_the_forwards_of_mezo_and_no_more(shared, place):
    bed = Bed(cell(shared), shared, place.work)
    for name, steps in (("mezo", 16), ("zo-conservative", 6), ("es", 1), ("forward-grad", 16)):
        run = bed.zeroth_order(maker(Deploy(bed.cell, name), place), 1e-5, 1, "test", eps_of(name))
        assert run.steps == steps and run.curve[-1][0] == steps * run.forwards <= 32
        assert run.curve[-1][0] > 32 - run.forwards and run.processor_seconds > 0
    assert run.state == pytest.approx(1.0, abs=0.05)  # the direction of the derivative
    assert eps_of("fzoo") == PRESETS["fzoo"].eps == 1e-4 and eps_of("random") == eps_of("closed-form") == 1e-3
    with pytest.raises(InputError, match="a step takes 30 forwards, the run has 20"):
        cell(shared, steps=10).steps_of(30)


@pytest.mark.parametrize("name", ["zo-sign", "fzoo"])
def test_rates_are_centred_where_weights_go_as_far_as_mezos(name, shared, place, monkeypatch):
    monkeypatch.setattr("bench.quality.jobs.PROBED", 36)
    bed = Bed(cell(shared, steps=18), shared, place.work)
    assert Deploy(bed.cell, "mezo")._centre(place, bed) == Deploy(bed.cell, "random")._centre(place, bed) == 2e-4
    job = Deploy(bed.cell, name)
    centre = job._centre(place, bed)

    def distance(job, rate):
        bed.zeroth_order(maker(job, place), rate, 0, "dev", eps_of(job.provider))
        pairs = zip(bed.model.parameters(), bed._base, strict=True)
        return math.sqrt(sum(float((p.detach() - base).square().sum()) for p, base in pairs))

    assert distance(job, centre) == pytest.approx(distance(Deploy(bed.cell, "mezo"), 2e-4), rel=0.3)
    monkeypatch.setattr(bed, "travel", lambda *_: pytest.fail("measured twice"))
    assert job._centre(place, bed) == centre


def test_low_rank_updates_travel_and_factors_count(shared, place):
    bed = Bed(cell(shared), shared, place.work)
    far = bed.travel(maker(Deploy(bed.cell, "lozo"), place), 4)  # two steps, far from a merge
    assert 0 < far < math.inf
    bed.restore()
    before = [p.clone() for p in bed.model.parameters()]
    bed.evaluate("dev")  # nothing that waited is merged into the base
    assert all((p == q).all() for p, q in zip(bed.model.parameters(), before, strict=True))
    blocks = trainable_blocks(bed.model)
    matrices = [t.shape for t in blocks.tensors if t.dim() == 2]
    for name, numbers in (("lozo", sum(2 * (m + n) for m, n in matrices)),
                          ("subzero", sum(8 * (m + n + 8) for m, n in matrices))):  # fmt: skip
        kept = method_bytes(make_method(name, bed.model), blocks)
        assert 4 * numbers <= kept <= 4 * numbers + 100 * len(blocks)


def made(finals, **more):
    """Rows of three seeds whose curves fall from 4 to their last loss."""
    known = {"case": "methods", "metric": "test_loss", "phase": "report", "model": "m", "task": "t", "steps": 50,
             "base_loss": 4.0, "date": "2026", "forwards": 100, "forwards_per_step": 2, "lr": 1e-4, "state": 0.0002,
             "processor_s": 2.0, "diverged": False}  # fmt: skip
    return [known | {"provider": name, "seed": seed, "curve": [[0, 4.0], [100, end]], "p50": end} | more
            for name, ends in finals.items() for seed, end in enumerate(ends, 1)]  # fmt: skip


ADAM, MEZO = {"adam": [2.0, 2.1, 2.2]}, {"mezo": [3.0, 3.1, 3.2]}
OTHERS = {"zo-adam": [2.9, 2.5, 2.8], "es": [3.3, 3.4, 3.9], "random": [3.3, 3.0, 3.5]}


def test_better_and_worse_are_beyond_every_seed():
    (one,) = measured(made(ADAM | MEZO | OTHERS))
    verdicts = {name: against_mezo(outcome, one.outcomes["mezo"]) for name, outcome in one.outcomes.items()}
    assert verdicts == {"adam": "better", "mezo": "", "zo-adam": "better", "es": "worse", "random": "equal"}


def test_the_table_says_who_beats_mezo_and_who_does_not():
    rows = made(ADAM | MEZO | OTHERS) + made({"hizoo": [3.1] * 3}, state=1.0, forwards_per_step=3, forwards=99)
    rows += made({"fzoo": [3.1, 3.2, 5.0]}, edge=True, diverged=True)
    text = TABLES["methods"](rows)
    assert "m, t, 100 forwards" in text
    assert "| `zo-adam` | **better** | 2.800 | 2.500..2.900 | 2 | 100 | 1.0e-04 | 2.0 | - |" in text
    assert "| `hizoo` | equal | 3.100 | 3.100..3.100 | 3 | 99 | 1.0e-04 | 2.0 | 1.00 |" in text
    assert text.index("`zo-adam`") < text.index("`mezo`") < text.index("zo-finetuner (random nets)")
    assert "(every seed below every seed of MeZO's): zo-adam." in text and "Worse (every seed above): es." in text
    assert "Equal within the seeds' spread: hizoo, fzoo, zo-finetuner (random nets)." in text
    assert "end of those tried: fzoo." in text and "fzoo (3 of 3)" in text


def test_what_adam_cannot_learn_is_left_out(tmp_path):
    rows = made({"adam": [3.9, 4.1, 4.0]} | MEZO)
    assert TABLES["methods"](rows) == "No rows: `python -m bench methods`."
    assert not draw(rows, tmp_path / "methods.png") and not (tmp_path / "methods.png").exists()
    assert measured(made(ADAM | MEZO, case="quality")) == []


def test_the_picture(tmp_path):
    rows = made(ADAM | MEZO | OTHERS) + made(ADAM | MEZO, task="u", prior_loss=3.5, accuracy=0.6)
    assert draw(rows, tmp_path / "methods.png") and (tmp_path / "methods.png").stat().st_size > 10_000


def test_a_whole_job_and_no_run_twice(shared, place, capsys, monkeypatch):
    """In this process (`bench quality`'s test has them in their own), and with a short Adam."""

    def serial(todo, here, workers, end):
        for job in todo:
            if not job.result(here).is_file():
                job.run(here)
        return 0

    monkeypatch.setattr("bench.quality.command.work", serial)
    monkeypatch.setattr("bench.quality.bed.ADAM_STEPS", 40)
    words = ["methods", "--shared", str(shared), "--model", str(shared / "models" / "tiny"), "--task", "sst2",
             "--quick", "--work", str(place.work), "--out", str(place.out), "--device", "cpu", "--steps", "15",
             "--workers", "1", "--provider", "mezo", "--provider", "es"]  # fmt: skip
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "tiny, sst2, 30 forwards" in told and "| `es` |" in told
    rows = bench_rows.read(place.out / "methods.jsonl")
    reported = [row for row in rows if row["metric"] == "test_loss" and row["provider"] != "adam"]
    assert {(row["provider"], row["seed"]) for row in reported} == {(n, s) for n in ("mezo", "es") for s in (1, 2)}
    for row in reported:
        assert row["case"] == "methods" and row["forwards"] == 30 and row["accuracy"] <= 1 and row["state"] < 0.1
    for name in ("mezo", "es"):
        tried = [row["rate"] for row in rows if row["metric"] == "dev_loss" and row["provider"] == name]
        assert 3 <= len(tried) <= 7 and {0.3333, 1.0, 3.0} <= set(tried)
    assert (place.out / "methods.png").is_file()
    assert main(words) == 0
    assert bench_rows.read(place.out / "methods.jsonl") == rows
