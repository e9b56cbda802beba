"""Replay: the weights of a run, rebuilt from its base and its journal, are those of the run to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny, tokens

from zo_finetuner.journal import read_journal
from zo_finetuner.optim import METHODS, make_method
from zo_finetuner.optimizer import create_zo_optimizer
from zo_finetuner.replay import engine_of, replay, rerun

STEPS = 7
SUMS = {  # methods whose updates are sums of dense directions
    "mezo", "zo-finetuner", "sigma-one", "self-calibrated", "zo-sign", "zo-conservative", "fzoo", "mezo-gv", "bszo",
    "es", "forward-grad",
}  # fmt: skip
REBUILT_IN_PLACE = SUMS - {"mezo-gv", "bszo"}  # their probes are along directions that the losses choose


def loss_of(model, step):
    batch = tokens(seed=step % 3)
    return lambda: model(input_ids=batch, labels=batch).loss


def run(path, name="mezo", dtype=torch.float32, probing="auto", steps=STEPS, arch="llama-tied", **options):
    """Trains; returns (base, weights after every step, optimizer)."""
    model = tiny(arch, dtype)
    if name == "forward-grad":
        model.config._attn_implementation = "eager"
    base = copy.deepcopy(model)
    settings = {} if "settings" not in options else {"settings": options.pop("settings")}
    optimizer = create_zo_optimizer(model, name, lr=1e-3, eps=1e-2, seed=5, probing=probing, journal=path, **options,
                                    **settings)  # fmt: skip
    weights = [snapshot(model)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        optimizer.step(loss_of(model, step))
        if not optimizer.engine.method.low_rank:
            weights.append(snapshot(model))
    if optimizer.engine.method.low_rank:
        weights = [weights[0]] * steps + [snapshot(model)]
    optimizer.close()
    return base, weights, optimizer


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, weights):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def options_of(name):
    small = {
        "fzoo": {"probes": 3}, "es": {"probes": 3}, "es-lowrank": {"probes": 2}, "lozo": {"period": 3},
        "lozo-m": {"period": 3}, "subzero": {"rank": 2, "period": 3}, "dizo": {"period": 3, "rounds": 2},
    }  # fmt: skip
    return {"settings": small[name]} if name in small else {}


@pytest.mark.parametrize("name", [m for m in METHODS if m != "closed-form"])
@pytest.mark.parametrize(("probing", "dtype"), [("scratch", torch.bfloat16), ("inplace", torch.float32)], ids=str)
def test_every_method_is_rebuilt_to_the_bit(tmp_path, name, probing, dtype):
    method = make_method(name, tiny("llama-tied"))
    if probing == "inplace" and method.scratch_only:
        pytest.skip(method.scratch_only)
    probing = "auto" if method.low_rank else probing
    base, weights, _ = run(tmp_path / "j.zoj", name, dtype, probing, **options_of(name))
    journal = read_journal(tmp_path / "j.zoj")
    assert journal.steps == STEPS and journal.cut == 0
    fast = REBUILT_IN_PLACE if probing == "inplace" else SUMS
    assert (journal.header.kind == "sum") == (name in fast)
    assert replay(copy.deepcopy(base), journal, 0) == 0
    for step in (STEPS,) if method.low_rank else (3, STEPS):
        model = copy.deepcopy(base)
        replay(model, journal, step)
        assert_same(model, weights[step])


def test_learned_nets_rerun_to_the_runs_own_memory(tmp_path):
    """What a resume needs: not only the weights, also what the method remembers."""
    base, weights, optimizer = run(tmp_path / "j.zoj", "zo-finetuner", torch.bfloat16)
    journal = read_journal(tmp_path / "j.zoj")
    engine = engine_of(base, journal)
    rerun(engine, journal)
    assert_same(base, weights[STEPS])
    ours, theirs = engine.method.state_dict(), optimizer.engine.method.state_dict()
    assert ours.keys() == theirs.keys() and engine.step_count == STEPS
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
