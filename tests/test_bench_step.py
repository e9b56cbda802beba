"""The step benchmark and what goes with it, on the CPU with models a 64th as wide and deep."""

from __future__ import annotations

import inspect
import json
import re
import weakref

import pytest
import torch
from conftest import ROOT
from models import save_model, save_rows

from bench import loading, memory, planned, shares, step, step_picture, step_tables, train
from bench.__main__ import main
from bench.providers import PROVIDERS, Batch, Provider, Setup
from bench.rows import newest, read
from bench.shapes import CONFIGS
from zo_finetuner import phases
from zo_finetuner.encoding import Encoded

CPU = torch.device("cpu")
SHAPED = ("--model", "tiny", "--model-like", "llama-1b", "opt-30b", "--shrink", "64")


@pytest.fixture
def data(tmp_path):
    """A folder like SHARED: a tiny model, rows of SST-2."""
    save_model(tmp_path / "models" / "tiny")
    save_rows(tmp_path / "data" / "sst2")
    return tmp_path


def run(data, case: str, *words: str) -> list[dict]:
    device = ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    assert main([case, *device, "--quick", "--shared", str(data), "--out", str(data / "out"), *words]) == 0
    return read(data / "out" / f"{case}.jsonl")


def here() -> list[str]:
    """The providers that this machine's device has."""
    return [name for name, provider in PROVIDERS.items() if torch.cuda.is_available() or not provider.graphs]


def check_step_rows(rows: list[dict], models: set[str]) -> None:
    assert {r["model"] for r in rows} == models
    for model in models:
        mine = {(r["provider"], r["metric"]): r for r in rows if r["model"] == model and r["metric"] != "share"}
        for name in here():
            provider = PROVIDERS[name]
            assert mine[name, "time_s"]["repeats"] == 3 and mine[name, "time_s"]["p50"] > 0
            assert mine[name, "peak_bytes"]["p50"] >= 0.99 * mine["inference", "peak_bytes"]["p50"]
            assert ((name, "planned_bytes") in mine) == bool(provider.optimizer or name == "inference")
            parts = {r["phase"]: r["p50"] for r in rows
                     if (r["model"], r["provider"], r["metric"]) == (model, name, "share")}  # fmt: skip
            assert set(parts) == set(shares.PHASES) and sum(parts.values()) == pytest.approx(1)
            ours = "inference" not in name
            assert parts["forward"] > 0 and (parts["probe"] > 0) == (parts["update"] > 0) == ours


def test_models_by_shape_and_every_provider(data, capsys):
    words = ["--model", "tiny", "--model-like", "llama-1b", "--shrink", "64", "--task", "sst2", "--batch-size", "4"]
    rows = run(data, "step", *words, "--trace", str(data / "trace.json"))
    check_step_rows(rows, {"llama-1b"})
    assert {r["dtype"] for r in rows} == {"bfloat16"} and {r["shrink"] for r in rows} == {64}
    told = capsys.readouterr().out
    assert "llama-1b, sst2, batch 4: 4 rows," in told and "x two forwards, peak" in told
    assert "trace.json: a step of zo_finetuner" in told
    events = json.loads((data / "trace.json").read_text())["traceEvents"]
    seen = [e["name"] for e in events if str(e.get("name")).startswith("zo.") and e.get("cat") == "user_annotation"]
    assert seen.count("zo.step") == 1 and {"zo.ask", "zo.probe", "zo.forward", "zo.tell", "zo.update"} <= set(seen)


def test_without_room_for_a_copy_the_published_orders_come_after_ours(data, capsys, monkeypatch):
    monkeypatch.setattr(step, "capacity", lambda device: 1)
    engines, make, sweeps = [], PROVIDERS["zo_finetuner"].make, PROVIDERS["reference_noise"].make

    def noted(setup):
        ours = make(setup)
        engines.append(weakref.ref(inspect.getclosurevars(ours).nonlocals["engine"]))
        return ours

    def after_ours(setup):
        assert not any(engine() for engine in engines)  # one alive would hold the weights that are replaced: two models
        return sweeps(setup)

    monkeypatch.setitem(PROVIDERS, "zo_finetuner", Provider(noted, optimizer="mezo"))
    monkeypatch.setitem(PROVIDERS, "reference_noise", Provider(after_ours, moves=True))
    rows = run(data, "step", "--model", "tiny", "--task", "sst2", "--batch-size", "4")
    check_step_rows(rows, {"tiny"})
    assert len(engines) == 2  # of the measured peak, of the turns
    told = capsys.readouterr().out
    assert "take their turns after ours: the device has no room for a second model" in told
    assert "shrink" not in rows[0] and {r["dtype"] for r in rows} == {"float32"}


def test_a_provider_that_does_not_fit_is_left_out_and_named(data, capsys, monkeypatch):
    def too_large(setup):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(PROVIDERS, "mezo_reference", Provider(too_large, moves=True))
    rows = run(data, "step", "--model", "tiny", "--task", "sst2", "--batch-size", "4")
    assert "mezo_reference is left out: it does not fit" in capsys.readouterr().out
    assert {r["provider"] for r in rows} == set(here()) - {"mezo_reference"}


def test_a_failure_is_told_and_the_other_models_are_measured(data, capsys, monkeypatch):
    load = step._load

    def broken(arguments, name, *rest):
        if name == "llama-1b":
            raise RuntimeError("no such thing\nand more")
        return load(arguments, name, *rest)

    monkeypatch.setattr(step, "_load", broken)
    words = [*SHAPED, "--task", "sst2", "--batch-size", "4", "--provider", "inference", "zo_finetuner"]
    words += ["--device", "cpu", "--quick", "--shared", str(data), "--out", str(data / "out")]
    assert main(["step", *words]) == 1
    assert "FAILED llama-1b, sst2, batch 4: RuntimeError: no such thing\n" in capsys.readouterr().out
    rows = read(data / "out" / "step.jsonl")
    assert {r["model"] for r in rows} == {"opt-30b"} and {r["provider"] for r in rows} == {"inference", "zo_finetuner"}


def test_a_spent_budget_names_what_is_left_out(data, capsys):
    words = ["--device", "cpu", "--shared", str(data), "--out", str(data / "out"), "--tokens", "4096", "--budget", "-1"]
    assert main(["step", *SHAPED, "--task", "sst2", "drop", *words]) == 0
    each = "sst2, batch 16; {0}, boolq, 4096 tokens; {0}, drop, batch 16"
    whole = "; ".join(f"{m}, {each.format(m)}" for m in ("llama-1b", "opt-30b"))
    assert f"budget spent; left out: {whole}\n" in capsys.readouterr().out


def row_of(length: int) -> Encoded:
    return Encoded("classification", ((0,) * (length - 1) + (1,), (0,) * (length - 1) + (2,)), (1, 1), (0,), (0,))


def test_a_filled_batch_holds_as_many_rows_as_fit():
    groups = step.fill([row_of(n) for n in (5, 4, 3, 10, 12, 2, 1)], 10)
    assert [[len(r.sequences[0]) for r in group] for group in groups] == [[5, 4], [3], [10], [12]]
    assert Batch(groups[0], {}).tokens == 9


def test_the_real_rows_of_all_tasks(shared, tmp_path):
    """Four tasks and the filled batch, which comes second, a turn of two providers."""
    words = ["--model-like", "llama-8b", "--shrink", "512", "--tokens", "640", "--batch-size", "1", "--repeats", "1"]
    words += ["--provider", "inference", "mezo_reference", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["step", "--shared", str(shared), *words]) == 0
    rows = [r for r in read(tmp_path / "step.jsonl") if r["metric"] == "time_s" and r["provider"] == "inference"]
    assert [r["task"] for r in rows] == ["sst2", "boolq", "boolq", "squad", "drop"]
    assert [r.get("filled") for r in rows] == [None, 640, None, None, None]
    assert 300 < rows[1]["tokens"] <= 640 and rows[1]["n"] > 1 == rows[2]["n"]
    assert rows[0]["tokens"] < 100 < min(r["tokens"] for r in rows[1:])


def test_the_clock_is_of_the_innermost_phase(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(shares.time, "perf_counter", lambda: next(now))

    def one_step(batch):
        with phases.phase("probe"), phases.phase("forward"), phases.phase("loss"):
            pass
        with phases.phase("update"):
            pass

    # Read at 0 other, 1 probe, 2 forward, 3 loss, 4 forward, 5 probe, 6 other, 7 update, 8 other, 9 the end.
    found = shares.phase_shares(one_step, [None, None], CPU)
    assert found == pytest.approx({"other": 3 / 9, "probe": 2 / 9, "forward": 2 / 9, "loss": 1 / 9, "update": 1 / 9,
                                   "ask": 0, "tell": 0})  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the CPU's allocator")
def test_the_peak_is_that_of_the_allocator():
    """Weights of 4 KB, 1 MB kept from the first step on, in the second for a moment 3 MB besides."""

    def make(setup):
        kept = []

        def one_step(size):
            kept.append(torch.empty(1 << 20, dtype=torch.uint8)) if not kept else None
            torch.empty(size << 20, dtype=torch.uint8)

        return one_step

    model = torch.nn.Linear(1024, 1, bias=False)
    peak = memory.peak_bytes(Provider(make), Setup(model, 0, 1, "auto"), [1, 3], CPU)
    assert peak == 4096 + (4 << 20)
    published = PROVIDERS["reference_noise"]
    assert published.moves and not PROVIDERS["zo_finetuner"].moves


def test_zo_train_with_random_weights_leaves_rows_and_no_weights(data, capsys):
    rows = run(data, "train", "--model", "tiny", "--shrink", "64", "--batch-size", "4")
    assert {r["provider"] for r in rows} == set(train.METHODS) and {r["model"] for r in rows} == {"opt-30b"}
    assert all(r["steps"] == 2 and r["p50"] > 0 for r in rows)
    told = capsys.readouterr().out
    assert "checkpoints: false" in told and "opt-30b, zo train, mezo:" in told and "result.json" in told
    assert ("training_peak_bytes" in {r["metric"] for r in rows}) == torch.cuda.is_available()


def test_loading_is_measured_in_a_fresh_process(data, capsys, monkeypatch):
    monkeypatch.setattr(loading, "measure", lambda small, large, dtype: loading.Measured(9, 4, 4, 2, 5))
    rows = run(data, "loading", "--model", "tiny", "--shrink", "64", "--shard", "50KB")
    assert [(r["dtype"], r["p50"], r["shard"]) for r in rows] == [("bfloat16", 5, 5), ("float32", 5, 5)]
    monkeypatch.setattr(loading, "measure", lambda small, large, dtype: loading.Measured(10, 4, 4, 2, 5))
    words = ["--model", "tiny", "--shrink", "64", "--shard", "50KB", "--shared", str(data), "--out", str(data / "out")]
    assert main(["loading", *words]) == 1  # more than a shard


def test_plans_are_marked_as_predicted(tmp_path, capsys):
    assert main(["plan", "--quick", "--model-like", "llama-1b", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "plan.jsonl")
    assert {r["device"] for r in rows} == {f"{name} (predicted)" for name in planned.DEVICES}
    assert all(line.startswith("predicted, ") for line in capsys.readouterr().out.splitlines())
    made = step_tables.step(rows)
    assert "No rows: `python -m bench step`" in made and "not yet measured on a GPU" in made
    assert re.search(r"\| over two bare forwards \| <= 2.2 \| predicted [12]\.\d\dx \| not measured \|", made)


COMMON = {
    "case": "step", "dtype": "bfloat16", "n": 16, "task": "sst2", "tokens": 320.0, "metric": "time_s", "unit": "s",
    "device": "NVIDIA H100", "driver": "580.1", "model": "llama-1b", "date": "2026-11-23T10:00:00+00:00",
}  # fmt: skip


def value(number: float, provider: str, metric: str = "time_s", **more) -> dict:
    return COMMON | {"provider": provider, "metric": metric, "p50": number} | more


def test_measured_numbers_stand_against_the_targets():
    rows = [
        value(0.010, "zo_finetuner"), value(0.005, "inference"), value(0.040, "reference_noise"),
        value(0.080, "mezo_reference"), value(0.012, "zo_finetuner_learned"), value(0.120, "zo_finetuner_reference"),
        value(103.0, "zo_finetuner", "peak_bytes"), value(100.0, "inference", "peak_bytes"),
        value(0.00525, "zo_finetuner_lozo"), value(0.009, "zo_finetuner_graph"), value(0.0045, "inference_graph"),
        value(102.0, "zo_finetuner", "planned_bytes"), value(100.0, "inference", "planned_bytes"),
        value(104.0, "zo_finetuner_lozo", "peak_bytes"), value(105.0, "zo_finetuner_lozo", "planned_bytes"),
        value(0.007, "zo_finetuner", case="plan", device="H100 (predicted)", driver="", model="llama-8b"),
        value(0.001, "zo_finetuner", case="plan", device="H200 (predicted)", driver="", model="llama-8b"),
        value(0.300, "zo_finetuner", case="train", model="opt-30b"),
        value(61.0, "zo_finetuner", "training_peak_bytes", case="train", model="opt-30b"),
        value(60.0, "zo_finetuner", "evaluation_peak_bytes", case="train", model="opt-30b"),
        value(9.0, "zo_finetuner", model="opt-30b", shrink=64),
    ]  # fmt: skip
    made = step_tables.step(rows)
    assert ("| llama-1b, bf16, sst2, batch 16, NVIDIA H100 | 10.0 ms, 100.0 steps/s, 32,000 tokens/s | 2.00x | 1.05x | "
            "1.030x (plan 1.020x) | 1.040x (plan 1.050x) | 8.00x = 4.00 kernels * 2.00 work | "
            "10.00x |") in made  # fmt: skip
    assert "| SST-2, 16 rows: a step |  | 10.0 ms, 100.0 steps/s | predicted 7.0 ms, 142.9 steps/s | not" in made
    assert "| the same, both as CUDA graphs | <= 2.2 | 2.00x | not measured | not measured |" in made
    assert "| low rank (LOZO), over two bare forwards | <= 1.05 | 1.05x | not measured | not measured |" in made
    assert "| peak over inference | <= 1.05x at 1B, 1.02x at 30B | 1.030x | not measured | not measured |" in made
    assert "| `zo train`, MeZO: a step |  | not measured | not measured | 300.0 ms, peak 1.017x evaluation's |" in made
    assert "| NVIDIA H100, bf16, random weights | target | 1B | 8B | 30B |" in made


def test_the_picture_has_a_panel_per_batch(tmp_path):
    parts = [value(1 / 7, "zo_finetuner", "share", phase=phase) for phase in shares.PHASES]
    rows = [value(0.01, "zo_finetuner"), *parts, value(0.02, "inference"), value(0.1, "inference", filled=4096)]
    step_picture.draw(rows, tmp_path / "step.png")
    step_picture.draw([], tmp_path / "empty.png")
    assert (tmp_path / "step.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 1000


def test_every_provider_has_a_name_in_the_picture_and_a_color_for_every_phase():
    assert set(PROVIDERS) == set(step_picture.LABELS) and set(shares.PHASES) == set(step_picture.COLORS)
    assert [p.moves for p in PROVIDERS.values()] == sorted(p.moves for p in PROVIDERS.values())


def test_committed_rows_have_no_dry_runs():
    rows = newest(read(ROOT / "bench" / "results"))
    assert not [r for r in rows if r.get("shrink")]
    assert {r["model"] for r in rows if r["case"] == "plan"} == set(CONFIGS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_whole_suite_on_a_gpu_with_small_shapes(data):
    rows = run(data, "step", *SHAPED, "--task", "sst2", "--batch-size", "4")
    check_step_rows(rows, {"llama-1b", "opt-30b"})
