"""What a run tells while it goes: the clock of its steps, its lines, its log file, and scales by kind of block."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from test_hf import run

from zo_finetuner import progress
from zo_finetuner.block_kinds import by_kind
from zo_finetuner.engine import Engine
from zo_finetuner.optim import make_method
from zo_finetuner.optim.scales import Constant
from zo_finetuner.params import trainable_blocks
from zo_finetuner.progress import LogFile, Progress, Speed, clock


@pytest.fixture
def now(monkeypatch):
    time = SimpleNamespace(at=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: time.at)
    return time


def step(speed, now, seconds, tokens=30):
    speed.on_step_begin(None, None, None)
    speed.count([{"input_ids": torch.zeros(tokens // 6, 3)}], ranks=2)
    now.at += seconds
    speed.on_step_end(None, None, None)


def test_the_clock_stands_still_in_evaluations(now):
    speed = Speed()
    assert speed.since_last_log() == {}
    step(speed, now, 1.0)
    now.at += 1000  # an evaluation
    speed.on_evaluate(None, None, None)
    step(speed, now, 2.0)
    assert speed.since_last_log() == {"seconds_per_step": 1.5, "tokens_per_second": 20.0}
    now.at += 1000  # a checkpoint, after the log
    speed.on_save(None, None, None)
    step(speed, now, 4.0, tokens=0)
    assert speed.since_last_log() == {"seconds_per_step": 4.0}


def test_lines_where_there_is_no_terminal(now, capsys):
    shown = Progress()
    shown._terminal = False
    state = SimpleNamespace(global_step=10, max_steps=1000, is_world_process_zero=True)
    logs = {"loss": 0.5, "grad_norm": 12.0, "zo/tokens_per_second": 4000.0, "zo/skipped_steps": 2.0}
    shown.on_train_begin(None, state, None)
    for _ in range(40):  # a log every two seconds, five steps each
        now.at += 2
        state.global_step += 5
        shown.on_log(None, state, None, logs)
    shown.on_log(None, state, None, {"eval_loss": 0.625, "eval_accuracy": 0.75, "eval_runtime": 3.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0][:-6] == "step 15/1000: loss 0.5000, |g| 12, 4,000 tokens/s, 2 skipped, 7 min left (until "
    assert len(lines) == 9  # the first, one in ten seconds, the evaluation
    assert lines[-1] == "step 210: dev loss 0.6250, accuracy 0.750"
    state.global_step = 1000
    shown.on_log(None, state, None, logs)
    assert capsys.readouterr().out.startswith("step 1000/1000: ")


def test_a_bar_on_a_terminal(capsys):
    shown = Progress()
    shown._terminal = True
    state = SimpleNamespace(global_step=0, max_steps=4, is_world_process_zero=True)
    shown.on_train_begin(None, state, None)
    state.global_step = 4
    shown.on_step_end(None, state, None)
    shown.on_log(None, state, None, {"loss": 0.5, "grad_norm": 12.0})
    shown.on_log(None, state, None, {"eval_loss": 0.625})
    shown.training_bar.refresh()
    shown.on_train_end(None, state, None)
    told = capsys.readouterr()
    assert "4/4" in told.err and "loss 0.5000, |g| 12" in told.err
    assert "step 4: dev loss 0.6250" in told.out


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (61, "1 min"), (3599, "1 h 0 min"), (1.2e4, "3 h 20 min")])
def test_times_in_words(seconds, text):
    assert clock(seconds) == text


def test_every_entry_of_the_log_is_in_its_file_at_once_and_a_resumed_run_goes_on(tmp_path):
    seen = []

    class Reads(LogFile):
        def on_log(self, *args, **kwargs):
            super().on_log(*args, **kwargs)
            seen.append(len(self._path.read_text().splitlines()))

    path = tmp_path / "log.jsonl"
    run(tmp_path / "a", steps=4, save_strategy="steps", save_steps=2, callbacks=[Reads(path)])
    assert seen == [1, 2, 3, 4, 5]  # four steps and the Trainer's summary
    run(tmp_path / "b", steps=4, callbacks=[Reads(path)], resume=str(tmp_path / "a" / "checkpoint-2"))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 4]
    assert all(entry["zo/seconds_per_step"] > 0 and entry["zo/tokens_per_second"] > 0 for entry in entries[:4])


def test_scales_are_logged_by_kind_of_block():
    model = tiny("llama")
    blocks = trainable_blocks(model)
    scale = torch.tensor([3.0 if "v_proj" in name else 0.5 for name in blocks.names])
    scale[blocks.names.index("model.layers.1.self_attn.v_proj.weight")] = 1.0
    method = make_method("mezo", model)
    method.scales = Constant(scale)
    engine = Engine(model, method, eps=1e-2)
    engine.step(lambda: model(torch.tensor([[5, 6]])).logits.square().mean(), 1e-3)
    sigma = {name: value for name, value in engine.metrics().items() if name.startswith("sigma/")}
    kinds = ("norm", "embedding", "head", "q", "k", "o", "gate", "up", "down")
    assert sigma == pytest.approx({"sigma/v": 5**0.5, **{f"sigma/{kind}": 0.5 for kind in kinds}}, rel=1e-3)


@pytest.mark.parametrize("name", ["zo-finetuner", "self-calibrated"])
def test_learned_scales_say_theirs(name):
    model = tiny("llama")
    engine = Engine(model, make_method(name, model, batch_size=1), eps=1e-2)
    engine.step(lambda: model(torch.tensor([[5, 6]])).logits.square().mean(), 1e-3)
    sigma = engine.method.metrics["sigma"]
    assert sigma.shape == (len(engine.blocks),)
    logged = {k[6:]: v for k, v in engine.metrics().items() if k.startswith("sigma/")}
    assert logged == pytest.approx(by_kind(engine.blocks.names, sigma.tolist()))
