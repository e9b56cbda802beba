"""The command line on a tiny model and a few rows: the main job, and one line for every kind of bad input."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import struct
import subprocess
import sys

import pytest
import torch
import yaml
from models import save_model, save_rows

from zo_finetuner.cli import EXAMPLES, _parser, main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    save_rows(folder / "data")
    return folder


def flags(base, out, **more):
    settings = dict(
        model=base / "model", task="sst2", data=base / "data", output_dir=out, steps=6, batch_size=4, lr=1e-2,
        eps=1e-2, num_train=32, num_dev=16, num_eval=24, eval_steps=3, logging_steps=1,
    )
    return ["train", *(f"--{k.replace('_', '-')}={v}" for k, v in (settings | more).items())]


def result(out):
    return json.loads((out / "result.json").read_text())


def fails(capsys, argv, *words):
    """Exit code 2, nothing on stdout's place, one line on stderr that holds every word; returns the line."""
    capsys.readouterr()
    assert main(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zo: error: ")]
    assert len(error) == 1
    for word in words:
        assert str(word) in error[0], error[0]
    return error[0]


@pytest.mark.parametrize("optimizer", ["mezo", "zo-finetuner"])
def test_train_writes_everything_and_the_result_can_be_evaluated(base, tmp_path, optimizer, capsys):
    out = tmp_path / "run"
    assert main(flags(base, out, optimizer=optimizer)) == 0
    written = result(out)
    for key in ("steps", "forwards", "seconds", "metric", "eval_loss_before", "eval_loss_after", "eval_metric_before",
                "eval_metric_after", "seed", "config"):
        assert key in written, key
    assert (written["steps"], written["forwards"], written["metric"]) == (6, 12, "accuracy")
    assert written["prior_loss"] == pytest.approx(math.log(2), abs=0.02)
    assert yaml.safe_load((out / "config.yaml").read_text())["optimizer"] == optimizer
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum("eval_loss" in e for e in logged) == 2 and sum("loss" in e for e in logged) == 6

    capsys.readouterr()
    report = tmp_path / "eval.json"
    argv = ["eval", "--model", str(out / "model"), "--task", "sst2", "--data", str(base / "data"), "--num-eval", "24",
            "--output", str(report)]
    assert main(argv) == 0
    assert json.loads(report.read_text())["loss"] == pytest.approx(written["eval_loss_after"], abs=1e-6)


def test_zo_steps_lower_the_loss(base, tmp_path):
    assert main(flags(base, tmp_path / "run", steps=200, batch_size=8, lr=1e-3, eps=1e-3, eval_steps=50)) == 0
    written = result(tmp_path / "run")
    assert written["eval_loss_after"] < written["eval_loss_before"] - 0.1  # .735 to .564 when this was written
    assert written["eval_loss_after"] < written["prior_loss"] - 0.05


def test_a_yaml_file_and_flags_that_override_it(base, tmp_path):
    config = tmp_path / "run.yaml"
    settings = dict(model=str(base / "model"), task="sst2", data=str(base / "data"), output_dir=str(tmp_path / "a"),
                    steps=4, batch_size=4, num_train=32, num_dev=16, num_eval=8, optimizer="mezo")
    config.write_text(yaml.safe_dump(settings) + "lr: 1e-4\n")  # YAML 1.1 reads 1e-4 as text
    assert main(["train", "--config", str(config), "--steps", "2"]) == 0
    written = result(tmp_path / "a")
    assert written["steps"] == 2 and written["config"]["lr"] == 1e-4
    # the resolved file reproduces the run
    assert main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--output-dir", str(tmp_path / "b")]) == 0
    assert result(tmp_path / "b")["eval_loss_after"] == written["eval_loss_after"]


def test_resume_goes_on_and_ends_at_the_same_weights(base, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file

    from zo_finetuner.training import TaskTrainer

    assert main(flags(base, tmp_path / "whole")) == 0

    step = TaskTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "training_step", interrupted)
    assert main(flags(base, tmp_path / "part")) == 130
    assert not (tmp_path / "part" / "result.json").exists()
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*flags(base, tmp_path / "part"), "--resume"]) == 0
    assert "lr_scheduler.step()" not in capsys.readouterr().err, "torch warns of a schedule that was set to its place"
    ends = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    assert result(tmp_path / "whole")["eval_loss_after"] == result(tmp_path / "part")["eval_loss_after"]


def test_resume_starts_fresh_where_there_is_nothing(base, tmp_path):
    assert main([*flags(base, tmp_path / "new", steps=2), "--resume"]) == 0
    assert result(tmp_path / "new")["steps"] == 2


def test_an_earlier_run_is_not_overwritten(base, tmp_path, capsys):
    assert main(flags(base, tmp_path / "run", steps=2)) == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    fails(capsys, flags(base, tmp_path / "run", steps=2, seed=1), "holds a run", "--resume or --overwrite")
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main([*flags(base, tmp_path / "run", steps=2, seed=1), "--overwrite"]) == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert result(tmp_path / "run")["seed"] == 1


def test_bf16_and_lora_runs(base, tmp_path):
    save_model(tmp_path / "bf16", torch.bfloat16)
    assert main(flags(base, tmp_path / "a", model=tmp_path / "bf16", steps=2)) == 0
    pytest.importorskip("peft")
    assert main(flags(base, tmp_path / "b", lora_rank=2, steps=2)) == 0
    assert (tmp_path / "b" / "model" / "adapter_model.safetensors").is_file()


def test_a_composition_by_flags_and_yaml(base, tmp_path):
    """Settings of the file and of flags come together; rates that are not given are the optimizer's."""
    config = tmp_path / "run.yaml"
    config.write_text("optimizer: fzoo\nset: {probes: 2, rule: momentum}\n")
    given = flags(base, tmp_path / "run", steps=2, config=config)
    given = [flag for flag in given if not flag.startswith(("--lr=", "--eps="))]
    assert main([*given, "--set", "beta=0.5", "--set", "probes=3"]) == 0
    written = result(tmp_path / "run")
    assert written["config"]["set"] == {"probes": "3", "rule": "momentum", "beta": "0.5"}
    assert (written["config"]["lr"], written["config"]["eps"]) == (5e-5, 1e-4)
    assert written["forwards"] == 2 * 4


@pytest.mark.parametrize(
    ("name", "settings", "forwards"),
    [("forward-grad", (), 4), ("dizo", ("period=1", "rounds=1"), 4), ("ldsd-jaguar", ("candidates=2",), 6)],
)
def test_methods_of_other_rounds_train(base, tmp_path, name, settings, forwards):
    chosen = [part for setting in settings for part in ("--set", setting)]
    assert main([*flags(base, tmp_path / "run", steps=2, lr=1e-3, optimizer=name), *chosen]) == 0
    written = result(tmp_path / "run")
    assert written["forwards"] == forwards and written["skipped_steps"] == 0
    assert written["eval_loss_after"] != written["eval_loss_before"]


@pytest.mark.parametrize(
    ("optimizer", "given", "taken", "share"),
    [
        ("ldsd-sgd", {}, "cosine_with_min_lr", 0.1 + 0.45 * (1 + math.cos(5 / 6 * math.pi))),
        ("ldsd-sgd", {"lr_scheduler": "constant"}, "constant", 1.0),
        ("mezo", {}, "constant", 1.0),
        ("mezo", {"lr_scheduler": "cosine_warmup_with_min_lr", "warmup_steps": 1}, "cosine_warmup_with_min_lr", 0.1),
        ("mezo", {"lr_scheduler": "warmup_stable_decay", "steps": 20}, "warmup_stable_decay", 0.5),
    ],
)
def test_the_rate_ends_where_its_schedule_says(base, tmp_path, optimizer, given, taken, share):
    """The last step's: of the optimizer's own schedule where none is given; schedules that need a number get it."""
    out = tmp_path / "run"
    assert main([*flags(base, out, optimizer=optimizer, lr=1e-4, **given), "--no-checkpoints", "--no-save-model"]) == 0
    assert result(out)["config"]["lr_scheduler"] == taken
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seen = [entry["learning_rate"] for entry in entries if "learning_rate" in entry]
    assert seen[-1] == pytest.approx(share * 1e-4, abs=1e-12) and max(seen) <= 1e-4


BAD_SETTINGS = [
    (dict(task="sst3"), ('"sst3"', '"sst2"')),
    (dict(optimizer="mezzo"), ('"mezzo"', 'did you mean "mezo"')),
    (dict(eps=0), ("eps must be positive",)),
    (dict(eps=-1e-3), ("eps must be positive",)),
    (dict(eps="nan"), ("eps must be positive",)),
    (dict(lr=0), ("lr must be positive",)),
    (dict(lr="inf"), ("lr must be positive",)),
    (dict(lr="fast"), ("--lr must be a number", "'fast'")),
    (dict(steps=1.5), ("--steps must be an integer",)),
    (dict(steps=0), ("steps must be at least 1",)),
    (dict(probing="scrath"), ('did you mean "scratch"',)),
    (dict(pertnn="x.safetensors"), ("mezo has no nets",)),
    (dict(optimizer="hizoo", pertnn="x.safetensors"), ("hizoo has no nets",)),
    (dict(optimizer="zo-adam", set="beta_1=0.5"), ("zo-adam has no setting", 'did you mean "beta1"')),
    (dict(optimizer="zo-adam", set="beta1"), ("--set takes NAME=VALUE", "'beta1'")),
    (dict(optimizer="fzoo", set="probes=1"), ("probes must be at least 2, got 1",)),
    (dict(optimizer="sparse-mezo", probing="inplace"), ("probing inplace does not go with", "--probing scratch")),
    (dict(optimizer="dizo", set="project=conv"), ('no trainable tensor has "conv" in its name',)),
    (dict(optimizer="zo-finetuner", pertnn="missing.safetensors"), ("missing.safetensors",)),
    (dict(model="./nowhere"), ("nowhere", "no such folder")),
    (dict(model="nobody/nothing-at-all"), ("nobody/nothing-at-all", "cannot be loaded")),
    (dict(data="./nowhere"), ("nowhere",)),
    (dict(num_dev=0), ("num_dev must be at least 1",)),
]


@pytest.mark.parametrize(("bad", "words"), BAD_SETTINGS, ids=lambda v: str(v)[:40])
def test_bad_settings(base, tmp_path, capsys, bad, words):
    fails(capsys, flags(base, tmp_path / "out", **bad), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "words"), [
    ("tensorbord", ('unknown report_to "tensorbord" (did you mean "tensorboard"?)', "none, all, ", "wandb")),
    ("", ('unknown report_to ""', "none, all, ")),
    ("mlflow", ("report_to mlflow: ", "requires mlflow to be installed", "pip install mlflow")),
    ("kubeflow", ("report_to kubeflow: ", "KUBEFLOW_TRAINER_SERVER_URL")),
])  # fmt: skip
def test_reporters_that_cannot_begin(base, tmp_path, capsys, monkeypatch, name, words):
    """In one line, also where the half-made reporter fails once more as it goes (mlflow's)."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_mlflow_available", lambda: False)
    fails(capsys, flags(base, tmp_path / "run", report_to=name), *words)
    assert not told and not (tmp_path / "run").exists()


def test_bad_config_files(base, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    for text, words in (
        ("modle: x\n", ('unknown key "modle"', 'did you mean "model"')),
        ("model: [1\n", ("not valid YAML",)),
        ("- a\n", ("must hold `key: value` lines",)),
        ("steps: many\n", ('key "steps" must be an integer',)),
        ("resume: 3\n", ('key "resume" must be true or false',)),
    ):
        config.write_text(text)
        fails(capsys, [*flags(base, tmp_path / "out"), "--config", str(config)], config, *words)
    fails(capsys, ["train", "--config", str(tmp_path / "none.yaml")], "none.yaml", "no such file")
    fails(capsys, ["train", "--task", "sst2"], "model is missing")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copy(base, tmp_path):
    shutil.copytree(base / "model", tmp_path / "model")
    shutil.copytree(base / "data", tmp_path / "data")
    return tmp_path


def test_broken_models(base, copy, capsys):
    model, out = copy / "model", copy / "out"
    weights = model / "model.safetensors"
    argv = flags(base, out, model=model)
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-100])
    fails(capsys, argv, weights, "bytes of tensors but its header needs")
    weights.write_bytes(whole[:4])
    fails(capsys, argv, weights, "truncated")
    weights.write_bytes(struct.pack("<Q", 20) + b"{not json at all....")
    fails(capsys, argv, weights, "damaged safetensors header: not JSON at column 2")
    weights.unlink()
    fails(capsys, argv, model, "no .safetensors file")
    weights.write_bytes(whole)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    fails(capsys, argv, "model-00002-of-00002.safetensors", "no such file")
    (model / "model.safetensors.index.json").unlink()

    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, weights, metadata={"format": "pt"})
    fails(capsys, argv, "model.norm.weight is I8", "bfloat16")
    weights.write_bytes(whole)
    (model / "tokenizer.json").unlink()
    fails(capsys, argv, "no tokenizer")
    (model / "config.json").write_text("{")
    fails(capsys, argv, "config.json", "not JSON at column 2")
    (model / "config.json").unlink()
    fails(capsys, argv, "config.json is missing")
    assert not out.exists()


def test_broken_rows(base, copy, capsys):
    train, out = copy / "data" / "train.jsonl", copy / "out"
    argv = flags(base, out, data=copy / "data")
    lines = train.read_text().splitlines()
    for line, words in (
        ('{"sentence": "a film ."}', ('"label"', "missing")),
        ('{"sentence": "a film .", "label": 2}', ('"label"', "2")),
        ('{"sentence": "a film .", "label": "good"}', ('"label"', "good")),
        ('{"sentence": 3, "label": 1}', ('"sentence"',)),
        ('{"sentence": "a', ("JSON",)),
    ):
        train.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
        fails(capsys, argv, f"{train}:2", *words)
    train.write_text("")
    fails(capsys, argv, train, "no rows")
    train.unlink()
    fails(capsys, argv, "train.jsonl")
    assert not out.exists()


def test_a_place_that_cannot_be_written(base, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    fails(capsys, flags(base, tmp_path / "file" / "run"), tmp_path / "file", "cannot be made")
    fails(capsys, flags(base, tmp_path / "file"), tmp_path / "file", "is a file")
    argv = ["eval", "--model", str(base / "model"), "--task", "sst2", "--data", str(base / "data")]
    fails(capsys, [*argv, "--output", str(tmp_path / "none" / "e.json")], "e.json", "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("task", ["copa", "squad", "drop", "record", "cb", "boolq", "wsc", "wic"])
def test_the_main_job_on_every_real_task(shared, tmp_path, task):
    out = tmp_path / "run"
    few = dict(steps=2, batch_size=2, lr=1e-5, num_train=8, num_dev=4, num_eval=4)
    where = dict(model=shared / "models" / "stories260k-llama", task=task, data=shared / "data" / task, output_dir=out)
    assert main(["train", "--no-save-model", *(f"--{k.replace('_', '-')}={v}" for k, v in (where | few).items())]) == 0
    written = result(out)
    assert written["metric"] == ("f1" if task in ("squad", "drop") else "accuracy")
    assert written["eval_rows"] == 4 and math.isfinite(written["eval_loss_after"])


def test_a_run_that_keeps_no_weights(base, tmp_path):
    out = tmp_path / "run"
    assert main([*flags(base, out, steps=3), "--no-checkpoints", "--no-save-model"]) == 0
    assert not [*out.rglob("*.safetensors"), *out.glob("checkpoint-*")] and (out / "log.jsonl").exists()
    written = result(out)
    assert written["best_step"] is None and math.isfinite(written["best_dev_loss"]) and written["steps"] == 3
    assert (written["peak_bytes"]["training"] is None) == (not torch.cuda.is_available())


def test_nets_of_another_architecture_name_what_is_missing(base, tmp_path, capsys):
    from zo_finetuner.pertnn import PertNN
    from zo_finetuner.pertnn_io import Card, save_pertnn

    path = tmp_path / "opt.safetensors"
    nets = PertNN.fresh(["model.decoder.embed_tokens.weight"])
    save_pertnn(path, nets, Card(source="test"))
    fails(capsys, flags(base, tmp_path / "out", optimizer="zo-finetuner", pertnn=path), path,
          "model.embed_tokens.weight", "more of the model's 20 trainable blocks")
    assert not (tmp_path / "out").exists()


def test_published_nets_run_on_a_small_llama_with_a_warning(base, shared, tmp_path, caplog):
    pertnn = shared / "pertnn" / "llama1B_finetuner.pth"
    assert main(flags(base, tmp_path / "run", optimizer="zo-finetuner", pertnn=pertnn, steps=2)) == 0
    assert "its scales are a guess here" in caplog.text
    converted = tmp_path / "llama1b.safetensors"
    assert main(["convert", str(pertnn), str(converted), "--base-model", "meta-llama/Llama-3.2-1B"]) == 0
    assert main(flags(base, tmp_path / "again", optimizer="zo-finetuner", pertnn=converted, steps=2)) == 0
    assert result(tmp_path / "run")["eval_loss_after"] == result(tmp_path / "again")["eval_loss_after"]


def test_env_says_what_there_is(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "noise contract 1" in text and "reference" in text and "ops on cpu" in text


def test_unknown_flags_are_errors():
    argv = [sys.executable, "-m", "zo_finetuner.cli", "train", "--modle", "x"]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "--modle" in run.stderr


def test_what_torchao_says_when_it_is_imported_is_not_passed_on(base):
    """transformers imports it wherever it is installed, and it tells of every library of its own that does not load."""
    pytest.importorskip("torchao")
    argv = [sys.executable, "-m", "zo_finetuner.cli", "plan", "--model", base / "model", "--seq", "8"]
    run = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert not any(word in run.stderr for word in ("torchao", "KernelPreference")), run.stderr


def test_every_verb_has_an_example_that_it_takes():
    parser = _parser()
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert set(EXAMPLES) == set(verbs.choices)
    for name, added in verbs.choices.items():
        assert added.format_help().endswith(f"example:\n  {EXAMPLES[name]}\n")
        assert parser.parse_args(shlex.split(EXAMPLES[name])[1:]).verb == name
