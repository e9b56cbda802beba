"""All probes of a low-rank step in one forward: the losses of a forward each, to rounding, from one product with W."""

from __future__ import annotations

import pytest
import torch
from models import BUILDERS, tiny, tokens
from references import ANSWERS, SINGLE
from test_paired_fallback import IDS, Centred, FirstToken, Model, Routed
from test_probing import assert_untouched, forward_loss, pointers, snapshot
from test_slices import ROWS, model_of
from torch import nn

from zo_finetuner import lowrank, slices
from zo_finetuner.encoding import collate
from zo_finetuner.engine import Engine
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method
from zo_finetuner.slices import slicing

EPS, LR = 1e-2, 1e-3
SETTINGS = {"lozo": {"period": 2}, "lozo-m": {"period": 2}, "subzero": {"period": 2}, "es-lowrank": {"limit": 6}}


def run(model, name, loss_fn, together=True, steps=4, lr=LR, **settings):
    """(losses of all probes, forwards of each step, the engine)."""
    engine = Engine(model, make_method(name, model, settings=SETTINGS[name] | settings), eps=EPS, seed=4)
    engine.probing.tokens = lowrank.TOKENS if together else 0
    told, tell, forwards, calls = [], engine.method.tell, [], []
    engine.method.tell = lambda losses: (told.append(losses), tell(losses))[1]
    handle = next(m for m in model.modules() if isinstance(m, nn.Embedding)).register_forward_pre_hook(
        lambda *_: calls.append(1))  # fmt: skip
    for _ in range(steps):
        calls.clear()
        engine.step(lambda: loss_fn(model), lr)
        forwards.append(len(calls))
    handle.remove()
    engine.flush()
    return torch.cat(told), forwards, engine


def assert_shared(build, name, loss_fn, tolerance=1e-5, **settings):
    alone, each, _ = run(build(), name, loss_fn, together=False, **settings)
    shared, forwards, engine = run(build(), name, loss_fn, **settings)
    assert engine.probing.reason == "" and engine.probing._trusted
    assert each == [engine.method.forwards] * 4 and forwards[1:] == [1, 1, 1]
    first = engine.method.forwards
    assert torch.equal(alone[:first], shared[:first])  # the first step takes a forward each
    assert (alone - shared).abs().max() < tolerance
    # An update by wrong losses, or of wrong members, would show in the probes of the next step.
    assert (alone[first:] - alone[:first].repeat(3)).abs().max() > 8 * tolerance


@pytest.mark.parametrize("name", BUILDERS)
def test_both_signs_in_one_forward(name):
    ids = tokens()
    if "moe" in name.lower() or "mixtral" in name.lower():  # tokens routed to experts have no known order
        _, forwards, _ = run(tiny(name), "lozo", lambda model: forward_loss(model, ids))
        assert forwards[1:] == [2, 2, 2]
        return
    assert_shared(lambda: tiny(name), "lozo", lambda model: forward_loss(model, ids))


@pytest.mark.parametrize("name", ["lozo-m", "subzero", "es-lowrank"])
@pytest.mark.parametrize("model", ["gpt2", "llama-tied"])
def test_every_method_and_a_whole_population(model, name):
    ids = tokens()
    assert_shared(lambda: tiny(model), name, lambda model: forward_loss(model, ids))


def test_in_16_bits():
    """Roundings of activations that other sums make differ by some 2^-9 of a loss between 4 and 5."""
    ids = tokens()
    assert_shared(lambda: tiny("llama", torch.bfloat16), "lozo", lambda model: forward_loss(model, ids), 5e-3, period=1)


@pytest.mark.parametrize("head", ["candidates", "slices"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "OPT", "GPT2"])
def test_packed_rows_and_some_rows_of_the_head(name, head, monkeypatch):
    monkeypatch.setattr(slices, "slice_rows", lambda model, head: ROWS)
    batch = collate(SINGLE if head == "candidates" else ANSWERS, 0, packed=True)

    def loss(model):
        total, weight = training_loss(model, batch)
        return total / weight

    assert slicing(model_of(name)).rows == ROWS
    assert_shared(lambda: model_of(name), "lozo", loss)


def test_trained_biases_beside_frozen_matrices_and_a_head_with_a_bias():
    def build():
        model = tiny("gpt2")
        model.lm_head = nn.Linear(model.config.n_embd, model.config.vocab_size)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("c_fc.weight" not in name and "wte" not in name)
            if parameter.dim() == 1:
                parameter.data.normal_()
        return model

    ids = tokens()
    torch.manual_seed(0)
    state = build().state_dict()

    def same():
        model = build()
        model.load_state_dict(state)
        return model

    assert_shared(same, "lozo", lambda model: forward_loss(model, ids))


def test_a_population_is_shared_as_far_as_tokens_go(monkeypatch):
    ids = tokens(2, 8)
    for limit, forwards in ((15, 8), (47, 4), (16 * 8, 1)):
        monkeypatch.setattr(lowrank, "TOKENS", limit)
        losses, counts, engine = run(tiny("llama"), "es-lowrank", lambda model: forward_loss(model, ids))
        assert counts[1:] == [forwards] * 3
        assert bool(engine.probing._trusted) == (forwards < 8)
        alone, _, _ = run(tiny("llama"), "es-lowrank", lambda model: forward_loss(model, ids), together=False)
        assert (losses - alone).abs().max() < 1e-5


def test_a_window_of_micro_batches():
    first, second = tokens(2, 8), tokens(3, 5, seed=9)
    build = lambda: tiny("llama")  # noqa: E731
    loss = lambda model: forward_loss(model, first) + 2 * forward_loss(model, second)  # noqa: E731
    alone, _, _ = run(build(), "es-lowrank", loss, together=False)
    shared, forwards, _ = run(build(), "es-lowrank", loss)
    assert forwards[1:] == [2, 2, 2] and (alone - shared).abs().max() < 3e-5


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Routed, "block.experts.0 (Linear) a tensor of shape"),
        (Centred, "block (Centred) mixes the rows of a batch"),
        (FirstToken, "block.inner (Linear) a tensor of shape (8,)"),
    ],
)
@pytest.mark.parametrize("name", ["lozo", "es-lowrank"])
def test_what_cannot_be_shared_takes_a_forward_each(name, block, reason, caplog):
    loss = lambda model: model(IDS).square().mean()  # noqa: E731
    alone, _, _ = run(Model(block), name, loss, together=False)
    losses, forwards, engine = run(Model(block), name, loss)
    assert torch.equal(alone, losses) and forwards[1:] == [engine.method.forwards] * 3
    assert reason in caplog.text


def test_other_inputs_for_another_member_are_computed(caplog):
    def losses(together):
        count = iter(range(100))

        def loss(model):
            call = next(count)
            if not together and call == 2:  # the closures of the rehearsal
                call = [next(count) for _ in range(3)][-1]
            return forward_loss(model, tokens(2, 8, seed=call if call > 4 else 0))

        return run(tiny("llama"), "lozo", loss, together, lr=0.0)[0]

    assert (losses(True) - losses(False)).abs().max() < 1e-5
    assert "other inputs for - than it gave for +" in caplog.text


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "model.layers.1.input_layernorm", "lm_head"])
def test_an_exception_in_a_shared_forward_leaves_the_weights_and_no_hook(place, exception):
    model, ids = tiny("llama-tied", torch.bfloat16), tokens()
    engine = Engine(model, make_method("lozo", model), eps=EPS)
    for _ in range(2):
        engine.step(lambda: forward_loss(model, ids), LR)
    engine.flush()
    before, storages = snapshot(model), pointers(model)

    def fail(module, args):
        raise exception("stop")

    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(exception):
        engine.step(lambda: forward_loss(model, ids), LR)
    handle.remove()
    assert_untouched(model, before, storages)
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in model.modules())
    assert torch.isfinite(engine.step(lambda: forward_loss(model, ids), LR))


def test_other_inputs_in_a_resumed_run_are_no_foreign_reads():
    """The first step of a resumed run watches who reads the weights, and shares at once."""
    model, ids = tiny("llama"), tokens()
    _, _, engine = run(model, "lozo", lambda model: forward_loss(model, ids), steps=2)
    resumed = Engine(model, make_method("lozo", model, settings=SETTINGS["lozo"]), eps=EPS, seed=4)
    resumed.load_state_dict(engine.state_dict())
    count = iter(range(100))
    loss = lambda: forward_loss(model, tokens(seed=next(count)))  # noqa: E731
    assert torch.isfinite(resumed.step(loss, LR))
