"""Objectives of one's own: found by their place, called in every probe, minimised or maximised, faults in one line."""

from __future__ import annotations

import copy
import json
import random
import sys

import numpy as np
import pytest
import torch
from models import save_model, save_rows, tiny
from test_cli import fails, result
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_finetuner.cli import main
from zo_finetuner.encoding import collate
from zo_finetuner.errors import InputError
from zo_finetuner.objective import training_loss
from zo_finetuner.optimizer import create_zo_optimizer
from zo_finetuner.own.encoding import encode_own
from zo_finetuner.own.formats import Format, OwnRow
from zo_finetuner.own.objective import OwnObjective, collate_rows

ROOT = __file__.rsplit("/", 2)[0]
MINE = f"{ROOT}/tests/objectives_of_tests.py"
PAIRS = [{"prompt": f"the {noun} was {word} . It was", "completion": " great ."}
         for noun in ("film", "plot", "acting") for word in "good bad fine dull warm cold".split()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    save_rows(folder / "data")
    for name, rows in (("pairs", PAIRS), ("prompts", [{"prompt": row["prompt"]} for row in PAIRS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def examples(base, count=4):
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    rows = [OwnRow(str(i), row) for i, row in enumerate(PAIRS[:count])]
    return encode_own(rows, Format("prompt-completion", False), tokenizer, 64)


def calls(name):
    """The objective of that name, and what it remembers."""
    own = OwnObjective(f"{MINE}:{name}")
    memory = sys.modules["zo_objective_objectives_of_tests"].CALLS
    return own, memory


def flags(base, out, objective, data="pairs.jsonl", *more, **settings):
    settings = dict(model=base / "model", data=base / data, objective=objective, output_dir=out, steps=2, batch_size=4,
                    lr=1e-2, eps=1e-2, eval_steps=2, logging_steps=1) | settings
    return ["train", *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items()), *more]


# --- found by its place


def test_places_of_objectives(monkeypatch, tmp_path):
    batch = {"seed": 0, "rows": [1]}
    assert OwnObjective(f"{MINE}:Shaped.best")(None, None, batch) == 2.0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "mine_here.py").write_text("from beside import VALUE\ndef score(model, tokenizer, batch):\n"
                                           "    return VALUE if tokenizer == 'tokenizer' else 0\n")
    for place in ("mine_here.py", str(tmp_path / "mine_here.py"), "mine_here"):
        own = OwnObjective(f"{place}:score")
        assert own.name == "score" and own(None, "tokenizer", batch) == 7


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("reward", 'objective "reward": write FILE.py:NAME or MODULE:NAME'),
        ("my.py:reward", "no file my.py"),
        (f"{MINE}:acuracy", 'there is no "acuracy" .did you mean "accuracy"'),
        (f"{MINE}:number", '"number" is a int, not a function'),
        (f"{MINE}:one", r"takes 1 arguments; it must take \(model, batch\) or"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_places_that_hold_no_objective(source, words):
    with pytest.raises(InputError, match=words):
        OwnObjective(source)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\nimport no_such_package\n", r"ModuleNotFoundError: No module named .* \(.*broken.py:2\)"),
        ("def f(:\n", r"SyntaxError: .* \(.*broken.py:1\)"),
        ("raise SystemExit(3)\n", r"SystemExit: 3 \(.*broken.py:1\)"),
    ],
)
def test_code_that_cannot_be_imported_names_its_line(tmp_path, code, words):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(InputError, match=f"cannot be imported: {words}"):
        OwnObjective(f"{tmp_path / 'broken.py'}:f")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "nothing: returned None; it must return one number"),
        ("shaped", r"shaped: returned a Tensor of shape \(2,\)"),
        ("fails", r"objectives_of_tests.py:\d+: fails raised KeyError: 'no such column'"),
        ("fails_in_a_library", r"objectives_of_tests.py:\d+: fails_in_a_library raised RuntimeError: .*size"),
    ],
)
def test_what_goes_wrong_in_it_is_one_line(name, words):
    with pytest.raises(InputError, match=words) as caught:
        OwnObjective(f"{MINE}:{name}")(None, None, {"seed": 0, "rows": [{}, {}]})
    assert "\n" not in str(caught.value)
    if "library" in name:  # its own line, not the library's
        line = int(str(caught.value).split(":")[1])
        assert "torch.zeros(3)" in open(MINE).read().splitlines()[line - 1]


# --- what it is given


def test_a_batch_as_a_model_takes_it(base):
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    encodeds = examples(base)
    batch = collate_rows(encodeds, 0)
    assert batch["rows"] == PAIRS[:4]
    own = OwnObjective(f"{MINE}:loss")(model, None, batch)
    with torch.no_grad():
        total, weight = training_loss(model, collate(encodeds, 0, packed=True))
    assert float(own) == pytest.approx(float(total / weight), rel=1e-5)
    for i, example in enumerate(encodeds):
        kept = batch["prompt_mask"][i].bool()
        assert tuple(batch["prompt_ids"][i][kept].tolist()) == example.prompt
        assert bool(batch["prompt_mask"][i, -1])  # padded in front


def test_draws_are_the_same_in_every_call_and_nobody_elses_change():
    own, drawn = calls("drawn")
    drawn.clear()
    batch, states = {"seed": 5, "rows": []}, (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    values = [own(None, None, batch) for _ in range(2)]
    assert values[0] == values[1] != own(None, None, batch | {"seed": 6})
    assert len(set(drawn[0])) == 3
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt"])
def test_generation_with_a_cache_sees_the_weights_of_the_probe(name, dtype):
    """Under a scratch probe, the first (which is watched) and later ones, as with weights that are written."""
    own, texts = calls("written")
    texts.clear()
    prompts = torch.tensor([[0, 5, 9], [7, 4, 8]])
    batch = {"seed": 0, "rows": [{}, {}], "prompt_ids": prompts, "prompt_mask": (prompts > 0).long()}
    for probing in ("scratch", "inplace"):
        model = tiny(name, dtype)
        before = copy.deepcopy(model.state_dict())
        optimizer = create_zo_optimizer(model, "mezo", lr=1e-30, eps=0.1, probing=probing)
        for _ in range(2):
            optimizer.step(lambda model=model: own(model, None, batch))
        if probing == "scratch":
            # biases of 0 take even a step of 1e-30
            assert all(torch.allclose(value, before[key], 0, 1e-20) for key, value in model.state_dict().items())
    own(tiny(name, dtype), None, batch)
    assert len(texts) == 9
    if dtype == torch.float32:  # in place, 16 bits drift
        assert all(torch.equal(a, b) for a, b in zip(texts[:4], texts[4:8], strict=True))
    assert sum(not torch.equal(text, texts[8]) for text in texts[:4]) >= 3  # the probes did change what is written
    assert not torch.equal(texts[0], texts[1])


# --- runs


def test_an_objective_that_is_the_loss_gives_the_run_of_the_loss(base, tmp_path):
    """Answers of one length: the mean over rows is that over tokens.  Windows of micro-batches, own rows."""
    for name, objective in (("own", f"{MINE}:loss"), ("loss", None)):
        argv = flags(base, tmp_path / name, objective, steps=4, batch_size=2, grad_accum=2, lr=1e-3, eps=1e-3)
        argv = [flag for flag in argv if objective or not flag.startswith("--objective")]
        assert main(argv) == 0
    own, built_in = result(tmp_path / "own"), result(tmp_path / "loss")
    assert own["metric"] == "objective" and own["eval_metric_after"] == own["eval_loss_after"]
    assert own["eval_loss_before"] == pytest.approx(built_in["eval_loss_before"], rel=1e-5)
    change = built_in["eval_loss_after"] - built_in["eval_loss_before"]
    assert own["eval_loss_after"] - own["eval_loss_before"] == pytest.approx(change, rel=0.02)
    assert own["config"]["graphs"] == "never"


def test_rows_of_a_task_and_what_is_maximised(base, tmp_path, capsys):
    out = tmp_path / "run"
    few = dict(task="sst2", num_train=16, num_dev=8, num_eval=24, optimizer="lozo")
    assert main(flags(base, out, f"{MINE}:accuracy", "data", "--maximize", **few)) == 0
    written = result(out)
    assert written["metric"] == "accuracy" and written["prior_loss"] is None
    assert written["eval_loss_after"] == -written["eval_metric_after"]
    assert 0 < written["eval_metric_after"] < 1
    argv = ["eval", "--model", str(out / "model"), "--task", "sst2", "--data", str(base / "data"), "--num-eval", "24"]
    reports = [tmp_path / "own.json", tmp_path / "task.json"]
    assert main([*argv, "--objective", f"{MINE}:accuracy", "--maximize", "--output", str(reports[0])]) == 0
    assert main([*argv, "--output", str(reports[1])]) == 0
    own, task = (json.loads(path.read_text()) for path in reports)
    assert own["accuracy"] == task["accuracy"] == written["eval_metric_after"]


def test_example_f1_of_generated_answers_rises(base, tmp_path):
    """A model that leans to "terrible" where all answers are "great" learns from F1 alone: 0 to 1 on held-out rows."""
    model, tokenizer = leaning(base, tmp_path / "model")
    argv = flags(
        base, tmp_path / "run", f"{ROOT}/examples/f1_over_generation.py:f1", "pairs.jsonl", "--maximize", "--set",
        "probes=10", model=tmp_path / "model", optimizer="es", steps=6, batch_size=8, lr=0.1, eps=0.05, num_eval=6,
        eval_steps=6,
    )  # fmt: skip
    assert main([*argv, "--no-checkpoints"]) == 0
    written = result(tmp_path / "run")
    assert written["metric"] == "f1" and written["eval_metric_before"] < 0.2
    assert written["eval_metric_after"] > 0.8


def test_example_reward_of_sampled_words_rises(base, tmp_path):
    argv = flags(
        base, tmp_path / "run", f"{ROOT}/examples/word_reward.py:happy_words", "prompts.jsonl", "--maximize", "--set",
        "probes=10", optimizer="es", steps=10, batch_size=16, lr=0.1, eps=0.02, num_dev=1, num_eval=1, eval_steps=10,
    )  # fmt: skip
    assert main([*argv, "--no-checkpoints"]) == 0
    argv = ["eval", "--test-data", str(base / "prompts.jsonl"), "--maximize", "--objective", argv[3].split("=")[1]]
    shares = []
    for model in (base / "model", tmp_path / "run" / "model"):
        report = tmp_path / "report.json"
        assert main([*argv, "--model", str(model), "--output", str(report)]) == 0
        shares.append(json.loads(report.read_text())["happy_words"])
    assert shares[1] > 2 * shares[0]


def leaning(base, folder):
    """The tiny model after 40 steps of Adam on answers of which 55 % are "terrible" and 45 % "great"."""
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    optimizer, rng = torch.optim.Adam(model.parameters(), lr=1e-2), random.Random(0)
    for _ in range(40):
        texts = [row["prompt"] + rng.choices((" terrible", " great"), (55, 45))[0] + " . </s>" for row in PAIRS]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_faults_are_one_line_before_anything_is_written(base, tmp_path, capsys):
    out = tmp_path / "out"
    for name, words in (
        ("nothing", ("returned None",)),
        ("shaped", ("returned a Tensor of shape (4,)",)),
        ("infinite", ("returned nan for the first batch", "must be finite")),
        ("fails", ("objectives_of_tests.py:", "fails raised KeyError")),
        ("acuracy", ("did you mean",)),
    ):
        fails(capsys, flags(base, out, f"{MINE}:{name}"), *words)
    later = flags(base, tmp_path / "begun", f"{MINE}:fails_later")
    fails(capsys, later, "objectives_of_tests.py:", "fails_later raised ZeroDivisionError")
    good = f"{MINE}:loss"
    fails(capsys, flags(base, out, good, probing="paired"), "probing paired", "scratch or inplace")
    fails(capsys, flags(base, out, good, graphs="always"), "graphs always", "host")
    fails(capsys, flags(base, out, good, optimizer="forward-grad"), "differentiable")
    plain = [flag for flag in flags(base, out, good) if not flag.startswith("--objective")]
    fails(capsys, [*plain, "--maximize"], "maximize is for an objective of your own")
    assert not out.exists()
