"""`zo learn` and `zo show`: from rows to a file that deploys; resume, refusals, one-line errors."""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import math
import random
import shutil

import pytest
import torch
from models import WORDS, save_model, save_rows

from zo_finetuner.cards import fingerprint
from zo_finetuner.errors import InputError
from zo_finetuner.learning import learner as learner_module
from zo_finetuner.learning.checkpoint import LEARNED, STATE
from zo_finetuner.learning.command import add_commands
from zo_finetuner.learning.run import learn
from zo_finetuner.learning.settings import LearnSettings
from zo_finetuner.learning.streaming import Weights
from zo_finetuner.loading import load_model
from zo_finetuner.optim import MeZO, ZOFineTuner, make_method
from zo_finetuner.optimizer import ZOOptimizer, create_zo_optimizer
from zo_finetuner.pertnn import PertNN
from zo_finetuner.pertnn_io import load_pertnn, save_pertnn
from zo_finetuner.scale_net import ScaleNet

FILES = [LEARNED, "log.jsonl", "result.json", "scales.png", STATE]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, its tokenizer, and rows of a task."""
    folder = tmp_path_factory.mktemp("learning")
    save_model(folder / "model")
    save_rows(folder / "data")
    (folder / "text").mkdir()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS[4:], k=39)) for _ in range(60)]
    (folder / "text" / "a.txt").write_text("\n".join(lines[:40]) + "\n\n")
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines[40:])
    (folder / "text" / "b.jsonl").write_text(rows)
    return folder


def settings(place, out, **changes):
    small = dict(tasks=("sst2",), data=(str(place / "data"),), batch_size=4, windows=2, window=10, num_train=24,
                 num_held_out=8, horizon=20)
    return LearnSettings(**{"model": str(place / "model"), "output_dir": str(out), **small, **changes})


def zo(*arguments):
    """The verbs as the command line has them."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(dest="verb", required=True))
    parsed = vars(parser.parse_args(list(map(str, arguments))))
    parsed.pop("run")(parsed)


@pytest.mark.parametrize("recipe", ["paper", "improved", "closed-form", "forward"])
def test_learn_deploy_show(place, tmp_path, capsys, recipe):
    out, learned = tmp_path / "out", recipe in ("paper", "improved")
    zo("learn", "--model", place / "model", "--task", "sst2", "--data", place / "data", "--recipe", recipe,
       "--out", out, "--batch-size", 4, "--window", 10, "--num-train", 24, "--num-held-out", 8, "--horizon", 20,
       *(["--windows", 2] if learned else []), *(["--forwards", 120] if recipe == "forward" else []))
    said = capsys.readouterr().out
    assert str(out / LEARNED) in said and "try --lr" in said
    assert ("99 forwards, on its own rows divergence" if recipe == "forward" else "held-out divergence") in said
    expected = [name for name in FILES if learned or name != STATE]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)

    model, _ = load_model(str(place / "model"), "float32")
    nets, card = load_pertnn(out / LEARNED)
    assert isinstance(nets, PertNN if recipe == "paper" else ScaleNet)
    assert (card.recipe, card.tasks, card.noise_contract) == (recipe, ("sst2",), 1)
    assert card.base_fingerprint == fingerprint(model) and card.base_model == str(place / "model")
    assert card.names == tuple(name for name, _ in model.named_parameters()) and len(card.sigma) == len(card.names)
    assert len(card.curve) == (3 if learned else 1)
    result = json.loads((out / "result.json").read_text())
    assert result["divergence"] == min(result["curve"]) and result["suggested_lr"] > 0
    assert card.metrics["suggested_lr"] == result["suggested_lr"]

    method = "zo-finetuner" if learned else "closed-form"
    optimizer = create_zo_optimizer(model, method, lr=1e-4, pertnn=out / LEARNED, batch_size=4)
    ids = torch.arange(3, 19).view(2, 8)
    before = [p.detach().clone() for p in model.parameters()]
    loss = optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    assert bool(loss.isfinite()) and all(not torch.equal(p, o) for p, o in zip(model.parameters(), before, strict=True))
    if not learned:  # what the card shows is what is applied, in fp16
        assert torch.allclose(optimizer.engine.method.scale, torch.tensor(card.sigma), rtol=1e-3)

    picture = tmp_path / "picture.png"
    zo("show", out / LEARNED, "--output", picture)
    said = capsys.readouterr().out
    assert f"bytes in a run, {(out / LEARNED).stat().st_size:,} on disk" in said
    assert f"recipe:                 {recipe}" in said and card.base_fingerprint in said and "learned on:" in said
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
    with pytest.raises(InputError, match="picture.png: exists; give --output another name"):
        zo("show", out / LEARNED, "--output", picture)
    with pytest.raises(InputError, match="is a .png; change the suffix"):
        zo("show", out / LEARNED, "--output", tmp_path / "picture.jpg")


@pytest.mark.parametrize("recipe", ["paper", "improved"])
def test_resume_is_bit_equal(place, tmp_path, recipe, monkeypatch):
    """A task and a text, stopped in the second window: the files end byte for byte as without the stop, and as a run of
    one window that was given another."""
    changes = dict(recipe=recipe, texts=(str(place / "text"),), text_length=12)
    learn(settings(place, tmp_path / "whole", **changes), progress=False)
    steps, real = [], learner_module.Learner._require_sane

    def stop(self, *arguments):
        steps.append(1)
        if len(steps) == 10 * 2 + 7:
            raise KeyboardInterrupt
        real(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner_module.Learner, "_require_sane", stop)
        learn(settings(place, tmp_path / "cut", **changes), progress=False)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [STATE]
    learn(settings(place, tmp_path / "cut", **changes, resume=True), progress=False)
    assert (tmp_path / "cut" / LEARNED).read_bytes() == (tmp_path / "whole" / LEARNED).read_bytes()
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 2 * 10 * 2

    learn(settings(place, tmp_path / "more", **changes, windows=1), progress=False)
    before = (tmp_path / "more" / LEARNED).read_bytes()
    learn(settings(place, tmp_path / "more", **changes, resume=True), progress=False)
    assert before != (tmp_path / "more" / LEARNED).read_bytes() == (tmp_path / "whole" / LEARNED).read_bytes()

    before = (tmp_path / "cut" / LEARNED).read_bytes()
    with pytest.raises(InputError, match="holds a run; choose another, or give --resume or --overwrite"):
        learn(settings(place, tmp_path / "cut", **changes), progress=False)
    with pytest.raises(InputError, match="cannot resume .*: eps was 0.001 and is 0.01"):
        learn(settings(place, tmp_path / "cut", **changes, resume=True, eps=1e-2), progress=False)
    (tmp_path / "cut" / STATE).write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(InputError, match="state.safetensors: is not a safetensors file, or is truncated"):
        learn(settings(place, tmp_path / "cut", **changes, resume=True), progress=False)
    assert (tmp_path / "cut" / LEARNED).read_bytes() == before



def test_overwrite_replaces_a_run_and_the_seed_decides(place, tmp_path):
    out = tmp_path / "out"
    found = []
    for seed, overwrite in ((0, False), (1, True), (0, True)):
        learn(settings(place, out, seed=seed, overwrite=overwrite), progress=False)
        found.append((out / LEARNED).read_bytes())
    assert found[0] == found[2] != found[1]
    card = load_pertnn(out / LEARNED)[1]
    assert max(card.sigma) / min(card.sigma) > 1.05, "it moves the scales"


@pytest.mark.parametrize("wild", [dict(recipe="paper", lr_llm=5.0), dict(horizon=4000)])
def test_a_diverging_window_is_started_again_at_half_the_rate(place, tmp_path, caplog, wild):
    wild |= dict(windows=1, window=12)
    with caplog.at_level(logging.WARNING):
        result = learn(settings(place, tmp_path / "out", **wild), progress=False)
    slower = result["slower"]
    told = [record.getMessage() for record in caplog.records if "window 0 diverged (sst2: loss" in record.getMessage()]
    assert slower in (0.5, 0.25, 0.125, 0.0625) and len(told) == -math.log2(slower)
    assert told[-1].endswith(f"started again at {slower:g} of the rate")
    assert result["steps"] == 12, "what was learned on the way out does not count"
    if "lr_llm" in wild:  # as if the rate had been that from the start
        learn(settings(place, tmp_path / "slow", **wild | {"lr_llm": 5.0 * slower}), progress=False)
        ours, theirs = (load_pertnn(tmp_path / name / LEARNED)[0].state_dict() for name in ("out", "slow"))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_short_window_that_diverges_is_started_again_too(place, tmp_path, caplog):
    """One of fewer steps than a mean has; one whose last step is the bad one, which the held-out rows show."""
    wild = dict(recipe="paper", lr_llm=30.0, windows=1, window=5)
    with caplog.at_level(logging.WARNING):
        result = learn(settings(place, tmp_path / "a", **wild), progress=False)
    assert result["slower"] < 1 and "after 5 steps" in caplog.records[0].getMessage()
    with pytest.raises(InputError, match="diverges in window 0 .*no finite gain on held-out rows after 1 steps"):
        learn(settings(place, tmp_path / "b", **wild | dict(lr_llm=1e30, window=1)), progress=False)


def test_a_run_that_diverges_at_every_rate_is_given_up(place, tmp_path):
    with pytest.raises(InputError, match="diverges in window 0 even at 0.0156 of the rate .* a smaller --lr-llm"):
        learn(settings(place, tmp_path / "out", recipe="paper", lr_llm=300.0, windows=1, window=12), progress=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(recipe="papre"), r'unknown recipe "papre" \(did you mean "paper"\?\)'),
        (dict(tasks=(), data=()), "nothing to learn on: give --task or --text"),
        (dict(tasks=("sst2", "sst2")), "a task is given twice"),
        (dict(tasks=("sst2", "copa"), data=("a", "b", "c")), "3 --data folders for 2 tasks"),
        (dict(eps=0.0), "eps must be positive"),
        (dict(window=3), "window must be at least 10 with recipe improved, got 3"),
        (dict(windows=0), "windows must be at least 1"),
        (dict(text_length=1), "text_length must be at least 2"),
        (dict(seed=-1), "seed and data_seed must be between"),
        (dict(batch_size=20), "sst2: 8 rows to hold out are fewer than a batch of 20; give more rows"),
        (dict(num_held_out=0), "sst2: 0 rows to hold out are fewer than a batch of 4"),
        (dict(texts=("nowhere.txt",)), "nowhere.txt: no such file"),
        (dict(model="nowhere/"), "model nowhere/"),
        (dict(recipe="forward", forwards=20), "forwards must be at least 33 for the 16 groups of blocks here, got 20"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, tmp_path, changes, match):
    with pytest.raises(InputError, match=match) as caught:
        learn(settings(place, tmp_path / "out", **changes), progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method, match", [("gptq", "cannot be loaded|is quantised"), ("unheard of", "is quantised")])
def test_a_quantised_base_is_refused(place, tmp_path, method, match):
    """Whichever package is missing or there: one line, nothing written.  Integer weights: test_loading, test_engine."""
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=match) as caught:
        learn(settings(place, tmp_path / "out", model=str(tmp_path / "model")), progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    model, _ = load_model(str(place / "model"), "float32")
    model.config.quantization_config = {"quant_method": method}
    with pytest.raises(InputError, match="the base model is quantised: learning needs its unquantised checkpoint"):
        Weights(model)


def test_text_that_cannot_be_learned_on(place, tmp_path):
    from zo_finetuner.learning.text import text_windows

    _, tokenizer = load_model(str(place / "model"), "float32")

    def windows(content, name="x.txt", counts=(2, 1)):
        path = tmp_path / name
        path.write_bytes(content)
        return text_windows(path, tokenizer, 8, seed=0, counts=counts)

    line = " ".join(WORDS[4:20]).encode() + b"\n"
    train, held_out = windows(line * 3)
    assert [len(e.sequences[0]) for e in train + held_out] == [8] * 3
    assert all(e.option_lengths == (7,) for e in train)
    train, held_out = windows(lzma.compress(line * 3), "x.txt.xz")
    assert len(train) == 2 and len(held_out) == 1
    for content, name, match in (
        (line, "x.txt", "1 documents give 2 windows of 8 tokens, 3 are asked for"),
        (b"\n\n", "x.txt", "holds no text"),
        (b"\xff\xfe" + line, "x.txt", r"x.txt:1: byte 1 \(0xff\) is not UTF-8"),
        (b'{"text": 3}\n', "x.jsonl", 'x.jsonl:1: has no "text" field'),
        (b"{}\n{", "x.jsonl", 'x.jsonl:1: has no "text" field'),
        (b"nonsense", "x.txt.xz", "x.txt.xz: cannot be read"),
    ):
        with pytest.raises(InputError, match=match):
            windows(content, name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no .txt, .txt.xz or .jsonl file"):
        text_windows(tmp_path / "empty", tokenizer, 8, seed=0, counts=(1,))


def test_documents_are_in_one_list_only(place):
    from zo_finetuner.learning.text import text_windows

    _, tokenizer = load_model(str(place / "model"), "float32")
    train, held_out = text_windows(place / "text", tokenizer, 12, seed=3, counts=(30, 30))
    again = text_windows(place / "text", tokenizer, 12, seed=3, counts=(30, 30))
    assert (train, held_out) == again and len(train) == len(held_out) == 30
    assert text_windows(place / "text", tokenizer, 12, seed=4, counts=(30, 30)) != again
    assert not {e.sequences for e in train} & {e.sequences for e in held_out}


def test_a_card_of_another_model_is_refused(place, tmp_path):
    learn(settings(place, tmp_path / "out", recipe="closed-form", windows=0), progress=False)
    path = tmp_path / "out" / LEARNED
    model, _ = load_model(str(place / "model"), "float32")
    model.resize_token_embeddings(40)
    for method in ("zo-finetuner", "closed-form"):
        with pytest.raises(InputError, match="tensors have other names or shapes than those of"):
            make_method(method, model, pertnn=path)
    derivative, _ = load_model(str(place / "model"), "float32")
    with torch.no_grad():
        for parameter in derivative.parameters():
            parameter.mul_(1.01)
    assert make_method("closed-form", derivative, pertnn=path).name == "closed-form"


def test_the_controls_are_methods(place, tmp_path):
    """sigma-one is MeZO bit for bit; a closed form needs its scales; zero scales freeze their blocks."""
    ids = torch.arange(3, 19).view(2, 8)
    ends = []
    for method in (MeZO(), "sigma-one"):
        model, _ = load_model(str(place / "model"), "float32")
        made = method if isinstance(method, MeZO) else make_method(method, model)
        optimizer = ZOOptimizer(model, made, lr=1e-2, seed=4)
        for _ in range(2):
            optimizer.step(lambda model=model: model(input_ids=ids, labels=ids).loss)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    with pytest.raises(InputError, match="closed-form needs its scales: .zo learn --recipe closed-form. measures them"):
        make_method("closed-form", model)
    with pytest.raises(InputError, match="pertnn is given, but sigma-one has no nets"):
        make_method("sigma-one", model, pertnn="x")
    learn(settings(place, tmp_path / "out", prune=0.9), progress=False)
    with pytest.raises(InputError, match="holds networks, not constant scales: use --optimizer zo-finetuner"):
        make_method("closed-form", model, pertnn=tmp_path / "out" / LEARNED)

    nets, card = load_pertnn(tmp_path / "out" / LEARNED)
    zero = [name for name, sigma in zip(card.names, card.sigma, strict=True) if sigma == 0]
    assert zero and list(nets.skipped()) == zero and card.metrics["zero_blocks"] == len(zero)
    method = make_method("zo-finetuner", model, pertnn=tmp_path / "out" / LEARNED)
    assert isinstance(method, ZOFineTuner) and len(method.sigma) == len(card.names) - len(zero)
    optimizer = ZOOptimizer(model, method, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == [name for name in card.names if name not in zero]


def test_scales_round_trip(tmp_path):
    from zo_finetuner.cards import RECIPES, Card

    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    nets = ScaleNet.fixed(names, [320, 64, 8], torch.tensor([0.5, 0.0, 2.0]), source="")
    card = Card(source="zo learn", recipe="closed-form", inputs=RECIPES["closed-form"], sigma=(0.5, 0.0, 2.0))
    save_pertnn(tmp_path / "s.safetensors", nets, card)
    again, card = load_pertnn(tmp_path / "s.safetensors")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in nets.state_dict().items())
    assert card.names == tuple(names) and card.hidden == 1
    assert again.select(names[1:]).skipped() == (names[1],)
    with pytest.raises(InputError, match="no network for other.weight of the model's 1 trainable blocks"):
        again.select(["other.weight"])
    with pytest.raises(InputError, match='"sigma" in the card has 2 numbers for 3 blocks'):
        save_pertnn(tmp_path / "t.safetensors", nets, Card(**{**card.__dict__, "sigma": (1.0, 2.0)}))
    with pytest.raises(InputError, match="a ScaleNet is no optimizer of recipe 'paper'"):
        save_pertnn(tmp_path / "t.safetensors", nets, Card(source="x"))
    with torch.no_grad():
        nets.kept[0] = 0.5
    with pytest.raises(InputError, match='"kept" is not 0 or 1 for every block'):
        save_pertnn(tmp_path / "t.safetensors", nets, card)
    assert not (tmp_path / "t.safetensors").exists()
