"""Pairs read the weights and never write them: after exceptions, Ctrl-C, and over a resume."""

from __future__ import annotations

import pytest
import torch
from models import tiny, tokens
from noted import Noted
from test_paired import DTYPES, EPS, LR

import zo_finetuner.scratch as scratch_module
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.optim import MeZO
from zo_finetuner.optimizer import ZOOptimizer


def snapshot(model):
    return {name: (p.detach().clone(), p.data_ptr()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.data_ptr() == before[name][1], name
    for module in model.modules():
        assert "forward" not in module.__dict__ and "_loss_function" not in module.__dict__
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probes_never_write_the_weights(dtype):
    model, ids = tiny("opt", dtype), tokens()
    before = snapshot(model)
    engine = Engine(model, MeZO(), eps=EPS, probing="paired")
    for _ in range(3):
        engine.step(lambda: model(input_ids=ids, labels=ids).loss, 0.0)
    assert engine.probing._trusted
    assert_untouched(model, before)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "model.layers.1.mlp", "lm_head", "model"])
def test_an_exception_in_a_pair_leaves_the_weights(place, exception):
    model, ids = tiny("llama-tied", torch.bfloat16), tokens()
    engine = Engine(model, MeZO(), eps=EPS, probing="paired")
    for _ in range(2):
        engine.step(lambda: model(input_ids=ids, labels=ids).loss, 0.0)
    assert engine.probing._trusted
    before = snapshot(model)

    def fail(module, args):
        raise exception("stop")

    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(exception):
        engine.step(lambda: model(input_ids=ids, labels=ids).loss, 0.0)
    handle.remove()
    assert_untouched(model, before)
    engine.step(lambda: model(input_ids=ids, labels=ids).loss, 0.0)  # and the next step works
    assert_untouched(model, before)


@pytest.mark.parametrize("exception", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3, 9])
def test_an_exception_in_the_kernel_or_between_the_halves(call, exception, monkeypatch):
    model, ids = tiny("llama", torch.bfloat16), tokens()
    engine = Engine(model, MeZO(), eps=EPS, probing="paired")
    loss_fn = lambda: model(input_ids=ids, labels=ids).loss  # noqa: E731
    engine.step(loss_fn, 0.0)
    before, kernel, norm = snapshot(model), scratch_module.scratch, type(model.model.norm).forward

    def failing(real):
        calls = []

        def fails(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise exception("stop")
            return real(*args, **kwargs)

        return fails

    monkeypatch.setattr(scratch_module, "scratch", failing(kernel))
    with pytest.raises(exception):
        engine.step(loss_fn, 0.0)
    assert_untouched(model, before)
    monkeypatch.setattr(scratch_module, "scratch", kernel)
    monkeypatch.setattr(type(model.model.norm), "forward", failing(norm))  # runs for + and for -: odd calls, even ones
    with pytest.raises(exception):
        engine.step(loss_fn, 0.0)
    assert_untouched(model, before)


def test_an_exception_in_the_closure_for_minus_forgets_the_pair():
    model, ids, calls = tiny("llama"), tokens(), []
    engine = Engine(model, Noted(), eps=EPS, probing="paired")

    def loss():
        value = model(input_ids=ids, labels=ids).loss
        calls.append(1)
        if len(calls) == 7:  # five of the first step, the pair of the second
            raise KeyboardInterrupt
        return value

    engine.step(loss, 0.0)
    with pytest.raises(KeyboardInterrupt):
        engine.step(loss, 0.0)
    other = tokens(seed=4)
    engine.step(lambda: model(input_ids=other, labels=other).loss, 0.0)
    fresh = Engine(tiny("llama"), Noted(), eps=EPS, probing="scratch")
    fresh.step_count = 1  # the step that was cut short is taken again
    fresh.step(lambda: fresh.model(input_ids=other, labels=other).loss.detach(), 0.0)
    assert torch.equal(engine.method.told[-1], fresh.method.told[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_bit_equal(dtype, tmp_path):
    ids = tokens()

    def go(optimizer, model, steps):
        for _ in range(steps):
            optimizer.step(lambda: model(input_ids=ids, labels=ids).loss.detach())

    whole = tiny("qwen2", dtype)
    go(ZOOptimizer(whole, lr=LR, seed=9, probing="paired"), whole, 5)
    first = tiny("qwen2", dtype)
    optimizer = ZOOptimizer(first, lr=LR, seed=9, probing="paired")
    go(optimizer, first, 2)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = tiny("qwen2", dtype, seed=1)
    second.load_state_dict(saved["model"])
    optimizer = ZOOptimizer(second, lr=1.0, probing="paired")
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.engine.probing._trusted  # the next step is paired at once, as the uninterrupted run's
    go(optimizer, second, 3)
    for (name, p), q in zip(second.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q), name
    with pytest.raises(InputError, match="probed paired, not scratch"):
        ZOOptimizer(tiny("qwen2", dtype), probing="scratch").load_state_dict(saved["optimizer"])
