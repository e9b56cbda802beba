"""Replay: the weights of a run, rebuilt from its base and its journal, are those of the run to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import tiny, tokens

from zo_finetuner.errors import InputError
from zo_finetuner.journal import read_journal
from zo_finetuner.optim import METHODS, make_method
from zo_finetuner.optim.composed import Composed
from zo_finetuner.optim.rules import Momentum
from zo_finetuner.optim.scales import Constant
from zo_finetuner.optimizer import ZOOptimizer, create_zo_optimizer
from zo_finetuner.params import trainable_blocks
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


def test_merges_that_an_evaluation_asked_for_are_repeated(tmp_path):
    """LOZO: reading the model between steps merges what was collected, which rounds 16-bit weights once more."""
    model = tiny("llama-tied", torch.bfloat16)
    base, twin = copy.deepcopy(model), copy.deepcopy(model)
    for name, trained, evaluates in (("plain", twin, False), ("evaluated", model, True)):
        optimizer = create_zo_optimizer(trained, "lozo", lr=1e-2, eps=1e-2, journal=tmp_path / name)
        for step in range(4):
            optimizer.step(loss_of(trained, step))
            if evaluates and step == 1:
                loss_of(trained, step)()
        optimizer.close()
    assert any(not torch.equal(a, b) for a, b in zip(snapshot(twin).values(), snapshot(model).values(), strict=True))
    replay(base, read_journal(tmp_path / "evaluated"))
    assert_same(base, snapshot(model))


DOC = Path(__file__).resolve().parent.parent / "docs" / "journal.md"


def test_the_table_of_methods_is_what_the_journals_say(tmp_path):
    lines = [line for line in DOC.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    told = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    for name in METHODS:
        if name == "closed-form":  # needs a file of scales
            continue
        assert told[name] == (row := method_row(tmp_path, name)), f"| `{name}` | " + " | ".join(row) + " |"


def method_row(folder, name):
    """How a run is rebuilt that is probed through a scratch, in place, and the bytes of a step of the former."""
    cells, kinds = [], {"sum": "from the records", "rerun": "by its rule"}
    for probing in ("inplace", "scratch"):
        low_rank = make_method(name, tiny("llama-tied")).low_rank and probing == "scratch"
        try:
            run(folder / f"{name}-{probing}", name, probing="auto" if low_rank else probing, steps=1)
        except InputError:
            cells.append("-")
        else:
            header = read_journal(folder / f"{name}-{probing}").header
            cells.append(kinds[header.kind])
    layout = header.record
    scales = " + 2 a block" if layout.scales and layout.scale_bytes == 2 else ""
    return [cells[1], cells[0], f"{layout.size - layout.scales * layout.scale_bytes}{scales}"]


def test_a_method_made_by_hand_is_rebuilt_from_the_records_or_asked_for(tmp_path):
    model = tiny("llama-tied", torch.bfloat16)
    base, path = copy.deepcopy(model), tmp_path / "fixed.zoj"
    fixed = Constant(torch.linspace(0.3, 3.0, len(trainable_blocks(model))))
    optimizer = ZOOptimizer(model, Composed(scales=fixed), lr=1e-3, eps=1e-2, journal=path)
    for step in range(3):
        optimizer.step(loss_of(model, step))
    journal = read_journal(path)
    assert journal.header.record.scales == 0 and len(journal.header.fixed_scales) == 4 * len(fixed.fixed)
    replay(copied := copy.deepcopy(base), journal)
    assert_same(copied, snapshot(model))

    model = copy.deepcopy(base)
    optimizer = ZOOptimizer(model, Composed(rule=Momentum()), lr=1e-3, eps=1e-2, journal=tmp_path / "momentum.zoj")
    for step in range(3):
        optimizer.step(loss_of(model, step))
    journal = read_journal(tmp_path / "momentum.zoj")
    with pytest.raises(InputError, match=r"made by hand: call replay\(model, journal, method=...\)"):
        replay(base, journal)
    replay(base, journal, method=Composed(rule=Momentum()))
    assert_same(base, snapshot(model))


def test_a_journal_of_fewer_losses_than_its_method_asks_for_leaves_the_weights(tmp_path):
    base, _, _ = run(tmp_path / "j.zoj", "zo-adam", steps=2)
    before = snapshot(base)
    greedy = make_method("zo-adam", base, settings={"probes": 3})
    with pytest.raises(InputError, match="has 2 losses a step"):
        replay(base, read_journal(tmp_path / "j.zoj"), method=greedy)
    for name, tensor in base.state_dict().items():
        assert (tensor - before[name]).abs().max() < 1e-6, name  # in place, so to rounding
