"""The proof of docs/determinism.md on the CPU: one run, four ways to its weights, the same bits.

again        the same command in another folder
interrupted  stopped by Ctrl-C and resumed, from the journal or from a checkpoint
replayed     the base model and the journal, without a forward
"""

from __future__ import annotations

import os
import signal

import pytest
import torch
from models import save_model, save_rows
from safetensors.torch import load_file
from test_cli import flags, result
from test_run_folder import at_step
from transformers import AutoModelForCausalLM

from zo_finetuner.cli import main
from zo_finetuner.journal import read_journal
from zo_finetuner.replay import replay
from zo_finetuner.training import TaskTrainer

pytestmark = pytest.mark.usefixtures("without_pictures")

CASES = {
    "mezo in place": (torch.float32, dict(optimizer="mezo", lr_scheduler="cosine")),
    "mezo bf16": (torch.bfloat16, dict(optimizer="mezo", weight_decay=0.1)),
    "learned scales": (torch.bfloat16, dict(optimizer="zo-finetuner")),
    "low rank": (torch.float32, dict(optimizer="lozo", set="period=3")),
    "with a state": (torch.bfloat16, dict(optimizer="zo-adam", lr=1e-3)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("rows") / "data")


def saved(out) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", CASES)
def test_every_way_leads_to_the_same_bits(tmp_path, data, monkeypatch, case):
    dtype, settings = CASES[case]
    base = tmp_path / "base"
    save_model(base / "model", dtype)
    (base / "data").symlink_to(data)

    def run(name: str, *more: str) -> int:
        return main([*flags(base, tmp_path / name, steps=7, num_train=20, **settings), *more])

    assert run("once") == run("again") == 0
    once = saved(tmp_path / "once")
    first = AutoModelForCausalLM.from_pretrained(base / "model", dtype="auto")
    assert not same(once, dict(first.state_dict()))
    assert same(once, saved(tmp_path / "again"))
    assert result(tmp_path / "once")["eval_loss_after"] == result(tmp_path / "again")["eval_loss_after"]

    for name, more in (("journal", ()), ("checkpoint", ("--no-journal",))):
        monkeypatch.setattr(TaskTrainer, "training_step", at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
        assert run(name, *more) == 130
        monkeypatch.undo()
        assert run(name, *more, "--resume") == 0
        assert same(once, saved(tmp_path / name)), name

    journal = read_journal(tmp_path / "once" / "journal.zoj")
    replay(first, journal, result(tmp_path / "once")["best_step"])
    assert same(once, {name: tensor for name, tensor in first.state_dict().items() if name in once})
