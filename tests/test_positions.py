"""A run's place in its journal: no weights before the end, the best step rebuilt, what cannot be taken up that way."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from models import save_model, save_rows, tiny
from safetensors.torch import load_file
from test_cli import fails, flags, result
from test_run_folder import at_step
from transformers import AutoModelForCausalLM

from zo_finetuner import workload
from zo_finetuner.cli import main
from zo_finetuner.config import RunConfig
from zo_finetuner.journal import read_journal
from zo_finetuner.optim import make_method
from zo_finetuner.positions import Position, best_of, read_log, why_not
from zo_finetuner.replay import replay
from zo_finetuner.training import TaskTrainer

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model", torch.bfloat16)
    save_rows(folder / "data")
    return folder


def stop_at(monkeypatch, number: int) -> None:
    """The step after `number` is the last."""
    monkeypatch.setattr(TaskTrainer, "training_step", at_step(number, lambda: os.kill(os.getpid(), signal.SIGINT)))


def test_no_weights_before_the_end_and_the_best_step_at_it(base, tmp_path, monkeypatch):
    """A rate that is too large makes an early step the best."""
    out = tmp_path / "run"
    argv = flags(base, out, steps=9, lr=0.3, eval_steps=2)
    stop_at(monkeypatch, 6)
    assert main(argv) == 130
    assert not [*out.rglob("*.safetensors")]
    monkeypatch.undo()
    assert main([*argv, "--resume"]) == 0
    evaluated = [entry for entry in read_log(out / "log.jsonl") if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4, 6, 8, 9]
    best = min(evaluated, key=lambda entry: entry["eval_loss"])["step"]
    assert result(out)["best_step"] == best < 9
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype="auto")
    replay(model, read_journal(out / "journal.zoj"), best)
    saved = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], model.state_dict()[name]) for name in saved)


@pytest.mark.parametrize("method", ["zo-adam", "dizo"])
def test_the_best_step_is_rebuilt_beside_no_second_state(base, tmp_path, monkeypatch, method):
    """The trainer's method gives its states up before another is made, and so does that one at its end."""
    made, alive = [], []

    def held(method):
        kept = [tensors for tensors in method.state_dict().values() if isinstance(tensors, list)]
        return sum(tensor.untyped_storage().nbytes() for tensors in kept for tensor in tensors)

    def noted(*args, **kwargs):
        alive.append([held(method) for method in made])
        made.append(make_method(*args, **kwargs))
        assert held(made[-1]) > 0
        return made[-1]

    monkeypatch.setattr("zo_finetuner.training.make_method", noted)
    monkeypatch.setattr("zo_finetuner.replay.make_method", noted)
    out = tmp_path / "run"
    assert main(flags(base, out, steps=9, lr=0.3, eval_steps=2, optimizer=method)) == 0
    best = result(out)["best_step"]
    assert best < 9 and alive == [[], [0]] and [held(method) for method in made] == [0, 0]
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype="auto")
    replay(model, read_journal(out / "journal.zoj"), best)
    saved = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], model.state_dict()[name]) for name in saved)


def test_a_branch_is_taken_up_and_its_best_step_rebuilt(base, tmp_path, monkeypatch):
    """Its first weights are those of a step of another run."""
    assert main(flags(base, tmp_path / "trunk", steps=4)) == 0
    branch = dict(steps=6, lr=0.3, eval_steps=2, seed=5, branch=f"{tmp_path / 'trunk' / 'journal.zoj'}:3")
    assert main(flags(base, tmp_path / "whole", **branch)) == 0
    stop_at(monkeypatch, 2)
    assert main(flags(base, tmp_path / "part", **branch)) == 130
    monkeypatch.undo()
    assert main([*flags(base, tmp_path / "part", **branch), "--resume"]) == 0
    assert result(tmp_path / "part")["best_step"] == result(tmp_path / "whole")["best_step"] < 6
    ends = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("part", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_evaluation_that_was_due_is_made_up_for(base, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TaskTrainer, "evaluate", killed)
    assert main(flags(base, out, steps=5, eval_steps=2)) == 130
    monkeypatch.undo()
    assert read_journal(out / "journal.zoj").steps == 2
    assert main([*flags(base, out, steps=5, eval_steps=2), "--resume"]) == 0
    assert main(flags(base, tmp_path / "whole", steps=5, eval_steps=2)) == 0
    logs = [[(e["step"], e.get("loss"), e.get("eval_loss")) for e in read_log(tmp_path / name / "log.jsonl")]
            for name in ("run", "whole")]  # fmt: skip
    assert logs[0] == logs[1]


def test_a_log_that_lacks_evaluations_takes_the_run_back_to_the_first(base, tmp_path):
    """After a power cut: the journal is on the disk every few seconds, the log when the kernel likes."""
    out = tmp_path / "run"
    argv = flags(base, out, steps=9, eval_steps=2)
    assert main(argv) == 0
    end = result(out)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if "eval_loss" in line and '"step": 4' in line)
    (out / "log.jsonl").write_text("".join(lines[:first]))
    assert Position.of(out / "journal.zoj", out / "log.jsonl", 9, 2).step == 4
    assert main([*argv, "--resume"]) == 0
    assert {key: result(out)[key] for key in ("best_step", "eval_loss_after")} == {
        key: end[key] for key in ("best_step", "eval_loss_after")}  # fmt: skip


def test_generators_are_where_they_would_have_been(base, tmp_path, monkeypatch):
    """Steps draw nothing, the loader a number an epoch at most."""
    states = []
    argv = flags(base, tmp_path / "part", steps=9, num_train=12)
    stop_at(monkeypatch, 6)
    assert main(argv) == 130
    for name in ("whole", "part"):
        monkeypatch.undo()
        monkeypatch.setattr(TaskTrainer, "training_step", at_step(8, lambda: states.append(torch.get_rng_state())))
        assert main([*flags(base, tmp_path / name, steps=9, num_train=12), "--resume"]) == 0
    whole, part = states
    assert torch.equal(whole, part)


def test_a_run_killed_in_its_header_starts_afresh(base, tmp_path):
    out = tmp_path / "run"
    assert main(flags(base, out, steps=2)) == 0
    whole = (out / "journal.zoj").read_bytes()
    for size in (0, 7, 30):
        (out / "journal.zoj").write_bytes(whole[:size])
        assert Position.of(out / "journal.zoj", out / "log.jsonl", 2, 1) is None
    assert main([*flags(base, out, steps=2), "--resume"]) == 0
    assert read_journal(out / "journal.zoj").steps == 2


def test_a_run_that_had_to_stop_has_another_chance(base, tmp_path, monkeypatch, capsys):
    """It stops before step 35, and again after 35 more: what is rerun from the journal does not stop it."""
    nan = torch.tensor(torch.nan)
    monkeypatch.setattr(workload, "training_loss", lambda model, batch: (nan, torch.ones(())))
    for step in (35, 70, 105):
        error = fails(capsys, [*flags(base, tmp_path / "run", steps=200), "--resume"], f"stopped before step {step}:")
        assert f"({step} in all" in error
        assert read_journal(tmp_path / "run" / "journal.zoj").steps == step


def test_another_base_model_is_refused(base, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    save_model(tmp_path / "model", torch.bfloat16)
    stop_at(monkeypatch, 1)
    assert main(flags(base, out, model=tmp_path / "model", steps=5)) == 130
    monkeypatch.undo()
    save_model(tmp_path / "model", torch.bfloat16, seed=1)
    fails(capsys, [*flags(base, out, model=tmp_path / "model", steps=5), "--resume"], "journal.zoj", "other weights")


def test_more_steps_go_on_with_a_constant_schedule(base, tmp_path):
    assert main(flags(base, tmp_path / "a", steps=3)) == 0
    assert main([*flags(base, tmp_path / "a", steps=5), "--resume"]) == 0
    assert main(flags(base, tmp_path / "b", steps=5)) == 0
    assert result(tmp_path / "a")["eval_loss_after"] == result(tmp_path / "b")["eval_loss_after"]


def test_what_keeps_checkpoints():
    model = tiny("llama")
    assert why_not(RunConfig(), model) == ""
    for field, value in (("journal", False), ("random_weights", True), ("lr_scheduler", "greedy")):
        assert why_not(RunConfig(**{field: value}), model)
    peft = pytest.importorskip("peft")
    assert why_not(RunConfig(), peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])))


def test_a_log_may_end_in_the_middle_of_a_line(tmp_path):
    entries = [{"loss": 1.0, "step": 1}, {"eval_loss": 0.5, "step": 1}, {"eval_loss": 0.5, "step": 2},
               {"eval_loss": float("nan"), "step": 3}, {"train_runtime": 3.0, "step": 3}]  # fmt: skip
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "log.jsonl").write_text(text + '{"eval_loss": 0.')
    read = read_log(tmp_path / "log.jsonl")
    assert read[:3] == entries[:3] and len(read) == 4
    assert best_of(read)["step"] == 1 and best_of([]) is None
    assert read_log(tmp_path / "none") == []
