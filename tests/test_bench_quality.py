"""`python -m bench quality`: its plan, its rows, what is concluded from them, and a whole tiny job that resumes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from models import save_model, save_rows

from bench import rows as bench_rows
from bench.__main__ import main
from bench.quality import bed, cells, jobs, verdict
from bench.quality.cells import Cell
from bench.quality.command import plan, transfers
from bench.quality.jobs import Central, Deploy, Derive, Learn, Place
from bench.quality.picture import draw
from bench.report import TABLES


@pytest.fixture
def shared(tmp_path):
    """A stand-in for the development data: a tiny model, SST-2 rows, passages for squad-text."""
    save_model(tmp_path / "shared" / "models" / "tiny")
    save_rows(tmp_path / "shared" / "data" / "sst2", train=64, validation=32)
    (tmp_path / "shared" / "data" / "squad").mkdir()
    words = "the film was good and the plot was dull but acting great bad fine warm cold . ,".split()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 230), ("validation", 10)):
        passages = [" ".join(words[i] for i in torch.randint(len(words), (300,), generator=generator))
                    for _ in range(count)]  # fmt: skip
        lines = [json.dumps({"context": passage}) for passage in passages for _ in range(2)]
        (tmp_path / "shared" / "data" / "squad" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "shared"


def command(shared, tmp_path, *words):
    return ["quality", "--shared", str(shared), "--model", str(shared / "models" / "tiny"), "--task", "sst2",
            "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--quick", "--device", "cpu",
            *words]  # fmt: skip


def test_a_cell_never_deploys_on_what_its_scales_were_learned_on():
    for tasks in (*cells.GRID.values(), cells.OTHER):
        for task in tasks:
            cell = Cell("m", task, 10)
            assert cell.learn_on != task and task not in cell.learn_on_several
            assert len(cell.learn_on_several) > 1


def test_the_plan_learns_first_and_once():
    made = plan([Cell("m", "sst2", 30), Cell("m", "copa", 20)], [], ablations=True)
    assert made[0] == Central("m") and len(set(made)) == len(made)
    for job in made:
        if isinstance(job, Deploy) and (learn := job.learns):
            assert made.index(learn) < made.index(job)
    learned = [job for job in made if isinstance(job, Learn)]
    assert {(job.recipe, job.sets) for job in learned} == {
        ("improved", ("squad-text",)), ("closed-form", ("squad-text",)), ("paper", ("squad-text",)),
        ("improved", ("squad-text", "copa")), ("improved", ("squad-text", "sst2")),
    }  # fmt: skip
    assert {job.provider for job in made if isinstance(job, Deploy)} == {
        "adam", *sum(jobs.ROUNDS, ()), *jobs.ABLATIONS
    }  # fmt: skip


def test_a_derivative_is_served_by_what_its_base_has_learned(shared, tmp_path):
    """Made once from the base, and taken for its artefact's own model; another model's goes through the mapping."""
    base = str(shared / "models" / "tiny")
    made = transfers([Cell(base, "sst2", 30), Cell("x/imdb-llama-6m", "sst2", 30)], tmp_path)
    derive, deploys = made[0], [job for job in made if isinstance(job, Deploy)]
    assert isinstance(derive, Derive) and derive.base == base and len(set(made)) == len(made)
    assert {job.learned_for for job in deploys if job.cell.base == base} == {base}
    (donated,) = [job for job in deploys if job.provider == jobs.TRANSFERRED]
    assert donated.cell.model == "x/imdb-llama-6m" and donated.learned_for == "x/stories260k-llama"
    place = Place(shared, tmp_path, tmp_path)
    (tmp_path / "texts").mkdir()
    review = "the film was good and the plot was dull but acting great " * 12
    (tmp_path / "texts" / "film-text.txt").write_text(f"{review}\n" * 1100)
    derive.run(place)
    assert derive.result(place).is_file()
    one, other = (bed.Bed(Cell(model, "sst2", 8), shared, tmp_path).model for model in (base, derive.model))
    moved = [not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert all(moved)


def test_rates_are_widened_only_at_an_end_and_twice_at_most():
    tried = {1.0: 2.0, 3.0: 1.0}
    assert jobs._next((1.0, 3.0, 9.0), tried, more=2) == 9.0
    assert jobs._next((1.0, 3.0, 9.0), tried | {9.0: 4.0}, more=2) is None
    falling = {1.0: 3.0, 3.0: 2.0, 9.0: 1.0}
    assert jobs._next((1.0, 3.0, 9.0), falling, more=0) is None
    for wanted in (27.0, 81.0, None):
        following = jobs._next((1.0, 3.0, 9.0), falling, more=2)
        assert following == wanted
        falling[following] = min(falling.values()) / 2


def test_runs_of_a_seed_are_equal_and_begin_at_the_base_weights(shared, tmp_path, monkeypatch):
    place = bed.Bed(Cell(str(shared / "models" / "tiny"), "sst2", 16), shared, tmp_path)
    make = jobs.maker(Deploy(place.cell, "mezo"), Place(shared, tmp_path, tmp_path))
    first = place.zeroth_order(make, 1e-3, 1, "test")
    assert [x for x, _ in first.curve] == [0, *range(4, 33, 4)] and first.steps == 16
    ones = place.zeroth_order(jobs.maker(Deploy(place.cell, "sigma-one"), place), 1e-3, 1, "test")
    assert ones.curve == first.curve  # equal scales are MeZO bit for bit
    assert place.zeroth_order(make, 1e-3, 2, "test").curve != first.curve
    assert len(place.zeroth_order(make, 1e-3, 1, "dev").curve) == 2
    monkeypatch.setattr(place.model, "forward", lambda **_: pytest.fail("a run that is lost goes on"))
    monkeypatch.setattr(bed.Engine, "step", lambda *_: torch.tensor(9.0))
    monkeypatch.setattr(place, "evaluate", lambda _: (9.0, None))
    lost = place.zeroth_order(make, 1.0, 1, "dev")
    assert lost.diverged and lost.steps == 2 and lost.curve[1:] == [(4, 9.0)]


def test_random_nets_are_drawn_anew_for_every_seed(shared, tmp_path):
    place = bed.Bed(Cell(str(shared / "models" / "tiny"), "sst2", 16), shared, tmp_path)
    make = jobs.maker(Deploy(place.cell, "random"), Place(shared, tmp_path, tmp_path))
    nets = [make(place.model, seed).scales.nets.w1 for seed in (1, 1, 2)]
    assert torch.equal(nets[0], nets[1]) and not torch.equal(nets[0], nets[2])


def test_a_whole_job_in_processes_of_its_own_and_no_run_twice(shared, tmp_path):
    words = command(shared, tmp_path, "--provider", "mezo", "--provider", "improved", "--steps", "16", "--workers", "1")
    run = subprocess.run([sys.executable, "-m", "bench", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "runs left" in run.stdout and "processes\n" in run.stdout
    rows = [row for row in bench_rows.read(tmp_path / "out" / "quality.jsonl") if row["metric"] == "test_loss"]
    assert {(row["provider"], row["seed"]) for row in rows} == {
        (name, seed) for name in ("adam", "mezo", "improved") for seed in (1, 2)
    }
    for row in rows:
        assert row["n"] == 32 and row["model"] == "tiny" and row["task"] == "sst2" and row["curve"][0][0] == 0
        assert row["p50"] == pytest.approx(row["curve"][-1][1], abs=1e-4) and "prior_loss" in row
        assert row["learned_on"] == (["squad-text"] if row["provider"] == "improved" else [])
    before = len(bench_rows.read(tmp_path / "out" / "quality.jsonl"))
    job = Deploy(Cell(str(shared / "models" / "tiny"), "sst2", 16), "mezo")
    place = Place(shared, tmp_path / "work", tmp_path / "out", quick=True)
    assert job.left(place) == 0
    job.result(place).unlink()
    next(job.folder(place).glob("test-*-2.json")).unlink()
    assert job.left(place) == 1
    job.run(place)
    (added,) = bench_rows.read(tmp_path / "out" / "quality.jsonl")[before:]
    assert (added["metric"], added["seed"]) == ("test_loss", 2) and job.left(place) == 0
    (first,) = (row for row in rows if (row["provider"], row["seed"]) == ("mezo", 2))
    assert added["curve"] == first["curve"] and added["lr"] == first["lr"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--provider", "mezzo"], 'unknown optimizer "mezzo"'),
        (["--task", "sst3"], "sst3"),
        (["--task", "poem-text"], "there is no text poem-text; there are: film-text, squad-text, drop-text"),
        (["--pretrain", "x"], "--pretrain needs --out-model DIR"),
    ],
)
def test_what_is_unknown_is_one_line(words, message, shared, tmp_path, capsys):
    assert main(command(shared, tmp_path, *words)) == 1
    told = capsys.readouterr().out
    assert told.startswith("quality: ") and message in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def row(provider, seed, curve, **more):
    known = {"case": "quality", "provider": provider, "metric": "test_loss", "phase": "report", "seed": seed,
             "model": "m", "task": "t", "steps": 50, "curve": curve, "base_loss": 4.0, "date": "2026",
             "p50": curve[-1][1]}  # fmt: skip
    return known | more


def made(finals, **more):
    """Rows of three seeds whose curves fall along a line from 4 to their last loss, in 100 forwards."""
    return [row(provider, seed, [[0, 4.0], [50, (4 + end) / 2], [100, end]], **more)
            for provider, ends in finals.items() for seed, end in enumerate(ends, 1)]  # fmt: skip


def test_cells_are_judged_as_they_are():
    rows = made({"adam": [2.0, 2.1, 2.2], "mezo": [3.0, 3.1, 3.2], "improved": [2.5, 2.2, 2.8],
                 "random": [3.3, 3.0, 3.5], "closed-form": [2.4, 2.6, 2.3]})  # fmt: skip
    rows += made({"adam": [2.0, 2.1, 2.2], "mezo": [3.0, 3.1, 3.2], "improved": [3.4, 3.3, 3.6]}, task="u")
    rows += made({"adam": [3.9, 4.1, 4.0]}, task="hopeless")
    (won, lost, hopeless) = verdict.cells_of(rows)
    assert won.learnable and lost.learnable and not hopeless.learnable
    assert won.outcomes["improved"].below(won.outcomes["mezo"])
    # From 4 to 2.5 in 100 forwards along a line: MeZO's 3.1 is met after 60 of its own 100.
    assert won.share("improved") == pytest.approx(0.6) and won.share("mezo") == pytest.approx(1.0)
    assert lost.share("improved") == float("inf")
    told = " ".join(verdict.verdict([won, lost, hopeless]))
    assert "learnable cells won: 1 of 2 (every seed below every seed: 1; above: 1): 50%, target 80%: not met" in told
    assert "median cell: never (cells 0.60x to never)" in told
    assert "Improved against random nets: 1 of 1 (every seed below every seed: 1; above: 0)" in told
    assert "Improved against closed form: 0 of 1" in told and "Not learnable by first-order Adam" in told


def test_the_reference_of_a_classification_cell_is_the_prior():
    (cell,) = verdict.cells_of(made({"adam": [0.68, 0.69, 0.7], "mezo": [0.7, 0.7, 0.7]}, prior_loss=0.693))
    assert not cell.learnable


def test_the_newest_row_of_a_seed_and_the_longest_runs_count():
    rows = made({"mezo": [3.0, 3.1, 3.2]}) + made({"mezo": [2.0, 2.0, 2.0]}, steps=10)
    rows.append(row("mezo", 1, [[0, 4.0], [100, 1.0]], date="2027"))
    (cell,) = verdict.cells_of(rows)
    assert cell.steps == 50 and cell.outcomes["mezo"].losses == [1.0, 3.1, 3.2]


def test_the_table_and_the_picture(tmp_path):
    rows = made({"adam": [2.0, 2.1, 2.2], "mezo": [3.0, 3.1, 3.2], "improved": [2.5, 2.2, 2.8], "newcomer": [3, 3, 3]})
    text = TABLES["quality"](rows)
    assert "| held-out loss | before | Adam | MeZO | newcomer | improved | forwards |" in text
    assert "| m, t, 100 | 4.000 | 2.100 | 3.100 ± .100 | 3.000 ± .000 | **2.500 ± .300** | 0.60x |" in text
    assert draw(rows, tmp_path / "quality.png") and (tmp_path / "quality.png").stat().st_size > 10_000
    assert not draw(rows[:3], tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_a_base_is_pretrained_and_loads(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The film number {i} was good, and the plot of it was not dull." for i in range(600)))
    out = tmp_path / "base"
    words = ["quality", "--pretrain", str(text), "--out-model", str(out), "--steps", "60", "--size", "tiny",
             "--pretrain-batch", "4", "--pretrain-lr", "0.01"]  # fmt: skip
    assert main(words) == 0
    facts = json.loads((out / "pretrain.json").read_text())
    assert facts["steps"] == 60 and facts["held_out_loss"] < facts["curve"][0][1] - 0.5
    from zo_finetuner.loading import load_model

    model, tokenizer = load_model(str(out), "float32")
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    assert tokenizer.decode(tokenizer(" great film")["input_ids"]) == " great film"
    assert main(words) == 1 and "is not empty" in capsys.readouterr().out
