"""Collected updates: no pass over the weights between subspaces, and no reader that sees the weights without them."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
from models import tiny, tokens
from test_lowrank_methods import LR, NAMES, Dense, engine_of, two_point
from test_probing import forward_loss, snapshot

import zo_finetuner.pending as module
from zo_finetuner.optimizer import ZOOptimizer
from zo_kernels import ulp


def run(name: str, steps: int, read=lambda step, engine: None, dtype=torch.float32, **changes):
    model, ids = tiny("llama-tied", dtype), tokens()
    engine = engine_of(model, name, **changes)
    losses = []
    for step in range(steps):
        losses.append(engine.step(lambda: forward_loss(model, ids), LR))
        read(step, engine)
    engine.flush()
    return model, torch.stack(losses)


def passes(monkeypatch) -> list[int]:
    """Tensor ids of the matrices that a merge has written since."""
    written, real = [], module.add_product
    monkeypatch.setattr(module, "add_product", lambda *args, **kw: (written.append(args[3]), real(*args, **kw)))
    return written


@pytest.mark.parametrize(("name", "period"), [("lozo", 3), ("lozo-m", 3), ("subzero", 3)])
def test_matrices_are_written_when_a_subspace_begins_and_at_no_other_step(monkeypatch, name, period):
    written = passes(monkeypatch)
    model, ids = tiny("llama-tied", torch.bfloat16), tokens()
    engine = engine_of(model, name, period=period)
    matrices = [n for n, p in model.named_parameters() if p.dim() == 2]
    for step in range(7):
        before = snapshot(model)
        written.clear()
        engine.step(lambda: forward_loss(model, ids), LR)
        refresh = step > 0 and step % period == 0
        assert len(written) == (len(matrices) if refresh else 0)
        assert all(torch.equal(model.get_parameter(n), before[n]) for n in matrices) != refresh
        assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])  # vectors move at once


READERS = {
    "forward": lambda engine: forward_loss(engine.model, tokens()),
    "inner forward": lambda engine: engine.model(tokens()),
    "generate": lambda engine: engine.model.generate(tokens(), max_new_tokens=2, do_sample=False, pad_token_id=0),
    "state_dict": lambda engine: engine.model.state_dict(),
    "load_state_dict": lambda engine: engine.model.load_state_dict({}, strict=False),
    "engine.state_dict": lambda engine: engine.state_dict(),
    "flush": lambda engine: engine.flush(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_reader_finds_the_updates_in_the_weights(name, reader):
    """At random steps, against a run whose weights are written at every step."""
    at = random.Random(name + reader).sample(range(1, 6), 2)

    def read(step, engine):
        if step in at:
            READERS[reader](engine)
            assert engine.probing.pending.rank == 0
            seen[step] = snapshot(engine.model)

    def flush(step, engine):
        engine.flush()
        whole[step] = snapshot(engine.model)

    seen, whole = {}, {}
    start = snapshot(tiny("llama-tied"))
    run(name, 6, read)
    run(name, 6, flush)
    for step in at:
        for block, theta in whole[step].items():
            moved = (theta - start[block]).norm()
            assert moved > 0 and (seen[step][block] - theta).norm() < 0.02 * moved, block


@pytest.mark.parametrize("name", NAMES)
def test_when_a_merge_comes_changes_roundings_only(name):
    lazy, losses = run(name, 6, period=0 if name == "es-lowrank" else 50)
    eager, others = run(name, 6, lambda step, engine: engine.flush(), period=0 if name == "es-lowrank" else 50)
    assert torch.allclose(losses, others, atol=1e-5)
    for block, theta in snapshot(lazy).items():
        moved = (theta - tiny("llama-tied").get_parameter(block)).norm()
        assert (eager.get_parameter(block) - theta).norm() < 0.02 * moved, block


def test_a_copy_of_the_model_takes_its_updates_along():
    model, ids = tiny("llama-tied"), tokens()
    engine = engine_of(model, "lozo", period=50)
    for _ in range(3):
        engine.step(lambda: forward_loss(model, ids), LR)
    other = copy.deepcopy(model)
    assert torch.equal(forward_loss(other, ids), forward_loss(model, ids))
    assert all(torch.equal(other.get_parameter(n), p) for n, p in model.named_parameters())
    assert not torch.equal(model.lm_head.weight, tiny("llama-tied").lm_head.weight)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_the_weights_are_whole_when_an_exception_leaves_a_step(exception):
    model, ids = tiny("llama-tied"), tokens()
    engine, calls = engine_of(model, "lozo", period=50), []

    def loss():
        calls.append(1)
        if len(calls) == 8:  # in the third step: the first has five, with its rehearsal
            raise exception("stop")
        return forward_loss(model, ids)

    with pytest.raises(exception):
        for _ in range(3):
            engine.step(loss, LR)
    assert engine.probing.pending.rank == 0
    expected, _ = run("lozo", 2, period=50)
    for block, theta in snapshot(expected).items():
        assert torch.equal(model.get_parameter(block), theta), block
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._state_dict_pre_hooks for m in model.modules())


def test_another_optimizer_on_the_model_finds_whole_weights():
    model, ids = tiny("llama-tied"), tokens()
    first, second = engine_of(model, "lozo", period=50), engine_of(model, "subzero", period=50)
    first.step(lambda: forward_loss(model, ids), LR)
    second.step(lambda: forward_loss(model, ids), LR)
    assert first.probing.pending.rank == 0 and second.probing.pending.rank > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_to_the_bit_from_where_it_was_saved(name, dtype):
    ids = tokens()
    saved: dict = {}

    def save(step, engine):
        if step == 2:
            saved.update(model=copy.deepcopy(engine.model.state_dict()), engine=copy.deepcopy(engine.state_dict()))

    whole, losses = run(name, 6, save, dtype, **({} if name == "es-lowrank" else {"period": 4}))
    model = tiny("llama-tied", dtype, seed=1)
    engine = engine_of(model, name, **({} if name == "es-lowrank" else {"period": 4}))
    model.load_state_dict(saved["model"])
    engine.load_state_dict(saved["engine"])
    for step in range(3, 6):
        assert torch.equal(engine.step(lambda: forward_loss(model, ids), LR), losses[step])
    engine.flush()
    for block, theta in snapshot(whole).items():
        assert torch.equal(model.get_parameter(block), theta), block


def test_weight_decay_is_exact_and_merges_at_every_step():
    model, ids, decay = tiny("llama-tied"), tokens(), 10.0
    engine, dense = engine_of(model, "lozo"), Dense(tiny("llama-tied"), ids)
    engine.weight_decay = decay
    for step in range(3):
        engine.step(lambda: forward_loss(model, ids), LR)
        assert engine.probing.pending.rank == 0
        before = dense.theta
        two_point(dense, "lozo", step, None)
        dense.theta = [new - LR * decay * old for new, old in zip(dense.theta, before, strict=True)]
    for block, theta, wanted in zip(engine.blocks.names, engine.blocks.tensors, dense.theta, strict=True):
        moved = np.linalg.norm(wanted - tiny("llama-tied").get_parameter(block).detach().numpy())
        assert np.linalg.norm(theta.numpy() - wanted) < 0.01 * moved, block


def test_16_bit_weights_take_small_updates_on_average():
    """A merge of a seventh of the spacing of bf16 is kept by stochastic rounding."""
    rate, name = 1e-6, "model.layers.0.mlp.gate_proj.weight"
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = tiny("llama-tied", dtype), tokens()
        engine = engine_of(model, "lozo")
        start = snapshot(model)[name]
        for _ in range(2):
            engine.step(functools.partial(forward_loss, model, ids), rate)
        engine.flush()
        made[dtype] = model.get_parameter(name).detach().float() - start.float()
    wanted = made[torch.float32]
    assert wanted.abs().mean() < 0.2 * ulp(start.float(), torch.bfloat16).mean()
    assert 0.7 < (made[torch.bfloat16] * wanted).sum() / (wanted * wanted).sum() < 1.3


def test_an_optimizer_saves_whole_weights():
    model, ids = tiny("llama-tied"), tokens()
    method = engine_of(model, "lozo", period=50).method
    optimizer = ZOOptimizer(model, method, lr=LR)
    optimizer.step(lambda: forward_loss(model, ids))
    assert optimizer.engine.probing.pending.rank > 0
    optimizer.state_dict()
    assert optimizer.engine.probing.pending.rank == 0
