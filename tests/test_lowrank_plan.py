"""`zo plan` of low-rank methods: memory against what steps allocate, forwards, passes."""

from __future__ import annotations

import json

import pytest
import torch
from test_plan import CONFIGS, peak_bytes, published  # noqa: F401 (a fixture)
from transformers import AutoConfig, AutoModelForCausalLM

from zo_finetuner import fits
from zo_finetuner.cli import main
from zo_finetuner.config import RunConfig
from zo_finetuner.devices import Device
from zo_finetuner.encoding import collate
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method
from zo_finetuner.plan import make_plan, planned_rows

SETTINGS = {"lozo": {"period": "1"}, "lozo-m": {"period": "1"}, "subzero": {"period": "1"},
            "es-lowrank": {"probes": "2", "limit": "4"}}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    CONFIGS["llama"].save_pretrained(path)
    return path


CASES = [("lozo", "float32", "sst2"), ("lozo", "bfloat16", "squad"), ("lozo-m", "float32", "squad"),
         ("subzero", "bfloat16", "sst2"), ("es-lowrank", "float32", "sst2")]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "task"), CASES)
def test_steps_take_the_predicted_memory(cpu, folder, name, dtype, task):
    """Every step shares its forwards, and merges; of the first the rehearsal is not predicted.  The head is taken
    whole, and of a population the last directions' coordinates are counted twice: 3 % either way."""
    plan = make_plan(str(folder), task=task, batch=8, seq=64, dtype=dtype, optimizer=name, settings=SETTINGS[name])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=plan.dtype).eval()
    batch = collate(planned_rows(task, 8, 64), 0, packed=True)
    engine = Engine(model, make_method(name, model, settings=SETTINGS[name]))

    def steps(count):
        for _ in range(count):
            engine.step(lambda: torch.div(*training_loss(model, batch)), 1e-6)

    steps(1)
    peak = peak_bytes(lambda: steps(3))
    assert engine.probing.reason == "" and engine.probing._trusted
    m = plan.memory
    assert 0.97 < peak / max(m.activations, m.logits, m.first - m.scratch) < 1.03


def test_forwards_and_passes(folder):
    mezo = make_plan(str(folder), batch=8, seq=64, dtype="float32")
    lozo = make_plan(str(folder), batch=8, seq=64, dtype="float32", optimizer="lozo")
    long = make_plan(str(folder), batch=16, seq=128, dtype="float32", optimizer="lozo")
    assert lozo.probing == "lowrank" and (lozo.work.forwards, long.work.forwards) == (1, 2)
    assert lozo.work.flops == pytest.approx(mezo.work.flops, rel=0.15)  # with the whole head, and products of rank 2
    assert lozo.work.moved == round(2 * 4 * lozo.parameters / 50)
    population = make_plan(str(folder), batch=8, seq=64, dtype="float32", optimizer="es-lowrank")
    assert population.work.forwards == 2 and population.work.moved == round(2 * 4 * lozo.parameters / 4)


def test_a_large_model_keeps_to_the_memory_of_inference(published):  # noqa: F811
    plan = make_plan(str(published / "llama-3.2-1b"), batch=16, seq=32, optimizer="lozo")
    assert 1 < plan.memory.ratio <= 1.05 and plan.memory.method < 3e-3 * plan.memory.weights


def test_the_verb_says_what_is_counted(folder, capsys):
    assert main(["plan", "--model", str(folder), "--seq", "64", "--optimizer", "lozo", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    assert "lozo, lowrank probing" in text and "factors and copies of vectors" in text


@pytest.mark.parametrize(
    ("optimizer", "gib", "message"),
    [
        ("zo-adamm", 9.0, r"zo-adamm keeps 13.8 GiB beside 2.3 GiB of weights, a GPU has 9.0 GiB: see `zo plan`"),
        ("mezo", 1.0, "a GPU has 1.0 GiB, and the weights alone do not fit"),
        ("lozo", 9.0, ""),
    ],
)
def test_what_cannot_fit_is_refused(published, monkeypatch, optimizer, gib, message):  # noqa: F811
    monkeypatch.setattr(fits, "present_gpu", lambda: Device("a GPU", gib, 0, 0, 0))
    config = RunConfig(model=str(published / "llama-3.2-1b"), task="sst2", optimizer=optimizer, output_dir="out")
    if not message:
        return fits.require_fits(config)
    with pytest.raises(InputError, match=message):
        fits.require_fits(config)


def test_train_says_so(published, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.setattr(fits, "present_gpu", lambda: Device("a GPU", 9.0, 0, 0, 0))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"sentence": f"row {i}", "label": i % 2}) + "\n" for i in range(20)))
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text(rows.read_text())
    flags = ["--model", str(published / "llama-3.2-1b"), "--task", "sst2", "--data", str(data), "--num-train", "10",
             "--num-dev", "4", "--num-eval", "4", "--optimizer", "zo-adam", "--output-dir", str(tmp_path / "out")]
    assert main(["train", *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "GiB" in line]
    assert "zo-adam keeps 9.2 GiB beside" in line and not (tmp_path / "out" / "config.yaml").exists()
