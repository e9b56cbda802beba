"""`zo replay`, `zo train --branch` and `zo diff`, on a run of `zo train`."""

from __future__ import annotations

import shutil

import pytest
import torch
from models import save_model, save_rows, tiny
from test_replay import assert_same, run

from zo_finetuner.cli import main
from zo_finetuner.errors import InputError
from zo_finetuner.journal import read_journal
from zo_finetuner.journal_diff import compared
from zo_finetuner.loading import load_model
from zo_finetuner.replay import branch_off, differences, replay
from zo_kernels import use_backend


def flags(folder, out, *more):
    settings = {"model": folder / "base", "task": "sst2", "data": folder / "rows", "output-dir": out, "steps": 4,
                "batch-size": 4, "num-train": 32, "num-dev": 8, "num-eval": 8, "lr": 1e-3}  # fmt: skip
    return ["train", *(text for name, value in settings.items() for text in (f"--{name}", str(value))),
            "--no-checkpoints", *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base model, rows and a run of 4 steps."""
    folder = tmp_path_factory.mktemp("trained")
    save_model(folder / "base")
    save_rows(folder / "rows")
    assert main(flags(folder, folder / "run")) == 0
    return folder


def test_replay_writes_a_model_of_any_step(trained, tmp_path, capsys):
    base, journal = str(trained / "base"), str(trained / "run" / "journal.zoj")
    assert main(["replay", base, journal, "--to", "2", "--out", str(tmp_path / "two")]) == 0
    assert "after step 2" in (told := capsys.readouterr().out) and "the run's to the bit" in told
    model, _ = load_model(base)
    replay(model, read_journal(journal), 2)
    assert_same(model, load_model(str(tmp_path / "two"))[0].state_dict())
    assert main(["replay", base, journal, "--out", str(tmp_path / "all")]) == 0
    assert_same(load_model(str(tmp_path / "all"))[0], load_model(str(trained / "run" / "model"))[0].state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "two"]  # nothing unfinished is left


def test_an_adapter_is_rebuilt_from_its_base(trained, tmp_path):
    assert main(flags(trained, tmp_path / "run", "--lora-rank", "2")) == 0
    journal = str(tmp_path / "run" / "journal.zoj")
    assert main(["replay", str(trained / "base"), journal, "--out", str(tmp_path / "adapter")]) == 0
    ours, theirs = (torch_files(folder) for folder in (tmp_path / "adapter", tmp_path / "run" / "model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def torch_files(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "run/journal.zoj", "--to", "9", "--out", "new"], "holds steps 0 to 4, not 9"),
        (["base", "run/journal.zoj", "--out", "run"], "run: is there already"),
        (["base", "base/config.json", "--out", "new"], "is not a journal"),
        (["run/model", "run/journal.zoj", "--out", "new"], "began with other weights"),
        (["none", "run/journal.zoj", "--out", "new"], "none"),
    ],
)
def test_a_replay_that_cannot_be_is_told_in_one_line(trained, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert main(["replay", *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("zo: error: ") and message in told
    assert not (trained / "new").exists()


def test_a_branch_begins_where_the_run_was_and_is_rebuilt_itself(trained, tmp_path):
    place = f"{trained / 'run' / 'journal.zoj'}:2"
    assert main(flags(trained, tmp_path / "run", "--branch", place, "--seed", "7")) == 0
    journal = tmp_path / "run" / "journal.zoj"
    assert main(["replay", str(trained / "base"), str(journal), "--to", "0", "--out", str(tmp_path / "start")]) == 0
    model, _ = load_model(str(trained / "base"))
    branch_off(model, place)
    assert_same(model, load_model(str(tmp_path / "start"))[0].state_dict())
    replay(model, read_journal(journal))
    assert_same(model, load_model(str(tmp_path / "run" / "model"))[0].state_dict())
    with pytest.raises(InputError, match="give JOURNAL:STEP"):
        branch_off(model, "run/journal.zoj")


def test_diff_says_where_two_runs_part(tmp_path, capsys):
    for name, options in {"a": {}, "b": {}, "rate": {"weight_decay": 0.1}, "short": {"steps": 2}}.items():
        run(tmp_path / name, steps=options.pop("steps", 4), **options)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == "the same header and the same 4 steps\n"
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "short")]) == 1
    assert capsys.readouterr().out == "they part at step 2: one of them ends (4 / 2 steps)\n"
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "rate")]) == 1
    told = capsys.readouterr().out
    assert "weight_decay: 0.0 / 0.1" in told and "they part at step 0: decay of shape (0,) / (1,)" in told


def test_diff_names_the_step_and_the_field(tmp_path):
    import zlib

    run(tmp_path / "a", steps=4)
    journal = read_journal(tmp_path / "a")
    content = bytearray((tmp_path / "a").read_bytes())
    size = journal.header.record.size
    record = journal.start + 2 * size
    changed = journal.records[2:3].copy()
    changed["losses"][0, 1] += 1
    content[record : record + size - 4] = changed.tobytes()[:-4]
    content[record + size - 4 : record + size] = zlib.crc32(changed.tobytes()[:-4]).to_bytes(4, "little")
    (tmp_path / "b").write_bytes(content)
    text, same = compared(journal, read_journal(tmp_path / "b"))
    one, other = journal.records["losses"][2, 1], changed["losses"][0, 1]
    assert not same and text == f"they part at step 2: losses[1] {one} / {other} (4 steps)"


def test_what_is_not_the_runs_is_said(tmp_path):
    run(tmp_path / "normal", steps=1)
    run(tmp_path / "signs", steps=1, dist="rademacher")
    device = torch.device("cpu")
    normal, signs = (read_journal(tmp_path / name).header for name in ("normal", "signs"))
    assert differences(normal, device) == differences(signs, device) == []
    with use_backend("reference"):
        assert differences(normal, device) == ["backend cpu then, reference now"]
        assert differences(signs, device) == []  # sums of random signs are the same bits everywhere


@pytest.mark.parametrize("probing", ["scratch", "inplace"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_random_signs_replay_on_another_backend_to_the_bit_and_normals_nearly(tmp_path, probing, dtype):
    for dist in ("rademacher", "normal"):
        path = tmp_path / f"{dist}.zoj"
        base, weights, _ = run(path, dtype=dtype, probing=probing, dist=dist, steps=3, weight_decay=0.1)
        with use_backend("reference"):
            replay(base, read_journal(path))
        if dist == "rademacher":
            assert_same(base, weights[3])
            continue
        journal = read_journal(path)
        # A normal is off by 1.5e-5 at most (the contract's budget at 6.76), a step by that times its coefficients, and
        # every pass by a rounding that falls the other way: of the weight where it then is, below |theta| + 6.76 eps.
        reach = float(abs(journal.records["coefs"]).sum() + abs(journal.records["probes"]).sum())
        passes = 3 * (1 + journal.header.record.probes)
        for name, tensor in base.state_dict().items():
            ours, theirs = tensor.float(), weights[3][name].float()
            place = torch.maximum(ours.abs(), theirs.abs()) + 6.76e-2
            slack = reach * 1.5e-5 + passes * place * (2.0**-23 if dtype == torch.float32 else 2.0**-7)
            assert ((ours - theirs).abs() <= slack).all(), name
            assert dtype == torch.float32 or (ours != theirs).float().mean() < 0.02


def test_the_base_has_to_be_the_base(tmp_path):
    run(tmp_path / "j.zoj", steps=1)
    journal = read_journal(tmp_path / "j.zoj")
    for model, message in [
        (tiny("llama-tied", seed=1), "began with other weights"),
        (tiny("llama-tied", torch.bfloat16), "in its dtype"),
        (tiny("opt"), "trains .* which this model does not have"),
    ]:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(InputError, match=message):
            replay(model, journal)
        assert_same(model, before)
    shutil.rmtree(tmp_path)
