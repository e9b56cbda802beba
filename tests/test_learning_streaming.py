"""Streaming: the meta-gradient of plain autograd, without a copy of the model, in the memory of the formula."""

from __future__ import annotations

import pytest
import torch
from models import BUILDERS, tiny, tokens
from torch import nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from zo_finetuner.errors import InputError
from zo_finetuner.history import History
from zo_finetuner.learning.base import BaseWeights
from zo_finetuner.learning.improved import WARM, ImprovedRecipe
from zo_finetuner.learning.paper import PaperRecipe
from zo_finetuner.learning.profile import Mean
from zo_finetuner.learning.streaming import NoiseDots, Turn, Weights
from zo_finetuner.learning.trajectory import SGDTrajectory
from zo_finetuner.pertnn import PertNN, budget, normalizer
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import derive_seed, draw_noise, seed_tensor

HALF_ULP = 2.0**-24


def loss_of(model, ids):
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def paper(model, lr_update, **trajectory):
    weights = Weights(model)
    names = weights.blocks.names
    share = budget(names, weights.blocks.numels, hidden_size=32, batch_size=2)
    sgd = SGDTrajectory(weights, **trajectory)
    return PaperRecipe(weights, PertNN.fresh(names, seed=3), share, sgd, lr_mlp=0.1, lr_update=lr_update)


def plain_meta_gradient(model, recipe, ids, seed, seen):
    """As the published code: theta' as graph tensors of a copy, z stored, one backward through all of it."""
    weights, nets = recipe.weights, recipe.nets
    nets.zero_grad()
    sigma = nets.scales(weights.stats(), History.start(len(weights.blocks)))
    norm = normalizer(sigma.detach(), recipe.share)
    moved = {}
    for b, (name, theta) in enumerate(zip(weights.blocks.names, weights.parameters, strict=True)):
        z = draw_noise(theta.numel(), seed_tensor(seed), weights.blocks.ids[b]).view_as(theta)
        step = recipe.lr_update * seen.projected_grad * norm * sigma[b]
        moved[name] = theta.detach() - step.float() * z
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    loss = functional_call(model, moved, (), inputs, tie_weights=True).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in nets.parameters()]


@pytest.mark.parametrize("name", BUILDERS)
def test_equal_to_plain_autograd(name):
    """At .1 the step to theta' is as large as the weights, and a stale tied head or a wrong sign shows.

    Both sides add the same numbers in other orders, and theta' is rounded once here and twice there: measured up to
    8.4e-7 of the largest gradient over all models, allowed 3e-6."""
    for lr_update in (0.1, 1e-6):
        _compare(tiny(name), lr_update)


def test_equal_to_plain_autograd_on_every_backend(backend):
    _compare(tiny("llama-tied"), 0.1)


def _compare(model, lr_update):
    recipe, ids = paper(model, lr_update), tokens()
    before = [p.detach().clone() for p in model.parameters()]
    seed = derive_seed(5, 0, 0)
    seen = recipe.meta_step(loss_of(model, ids), History.start(len(before)), seed)
    streamed = [p.grad.clone() for p in recipe.nets.parameters()]
    with torch.no_grad():
        for parameter, own in zip(model.parameters(), before, strict=True):
            parameter.copy_(own)
    loss, plain = plain_meta_gradient(model, recipe, ids, seed, seen)
    assert float(seen.meta_loss) == pytest.approx(float(loss), rel=4e-6)
    for ours, theirs in zip(streamed, plain, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= 3e-6 * theirs.abs().max()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("keep_gradients", [True, False])
def test_the_trajectory_is_torch_sgd_with_clipping(keep_gradients):
    model, twin = tiny("llama-tied", seed=1), tiny("llama-tied", seed=1)
    trajectory = SGDTrajectory(Weights(model), keep_gradients=keep_gradients)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.8)
    for step in range(3):
        ids = tokens(seed=step)
        loss = trajectory.step(loss_of(model, ids), 0.5, seed=7)
        sgd.zero_grad()
        expected = loss_of(twin, ids)()
        expected.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        assert norm > 1.0, "clipping is at work"
        sgd.step()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        # The clip's norm is summed in another order: 1e-6 of the way, and an fp32 rounding per step.
        assert (ours - theirs).abs().max() <= 1e-5 * 0.5 * 3 + 3 * HALF_ULP * theirs.abs().max()


def test_the_zeroth_order_trajectory_is_the_deployed_step():
    """theta -= lr s_g nu sigma_b z_b, besides the probes' roundings."""
    model, ids = tiny("llama"), tokens()
    recipe = paper(model, 1e-6)
    recipe.zeroth_order, recipe.lr_llm = True, 0.02
    weights, history, seed = recipe.weights, History.start(len(recipe.nets.names)), derive_seed(2, 0, 0)
    own = [p.detach().clone() for p in weights.parameters]
    with torch.no_grad():
        sigma = recipe.nets.scales(weights.stats(), history)
    scale = (normalizer(sigma, recipe.share) * sigma).float()
    loss = recipe.step(Turn(loss_of(model, ids), 0, history, seed, place=0.5))
    assert float(loss) == pytest.approx(float(history.losses.mean()), rel=1e-6)
    size = 0.02 * 0.5 * float(history.losses[0] - history.losses[1]) / 2e-3
    for b, (parameter, before) in enumerate(zip(weights.parameters, own, strict=True)):
        z = draw_noise(parameter.numel(), seed_tensor(seed), weights.blocks.ids[b]).view_as(before)
        expected = before - size * scale[b] * z
        moved = (expected - before).abs().max()
        assert moved > 1e-6
        assert (parameter - expected).abs().max() <= 8 * HALF_ULP * expected.abs().max() + 1e-5 * moved


def test_theta_returns_and_does_not_drift():
    """An element comes back exactly unless theta' is in a larger binade; then within half an ulp of theta'."""
    model = tiny("llama-tied")
    weights = Weights(model)
    own = [p.detach().clone() for p in weights.parameters]
    steps, eps = 100, torch.tensor(1e-3)
    for step in range(steps):
        with weights.displaced(seed_tensor(derive_seed(1, step, 0)), eps):
            pass
    changed = sum(int((p != o).sum()) for p, o in zip(weights.parameters, own, strict=True))
    elements = sum(weights.blocks.numels)
    for parameter, before in zip(weights.parameters, own, strict=True):
        reach = before.abs() + 7e-3  # 6.76 sigma of noise
        assert ((parameter - before).abs() <= steps * HALF_ULP * reach).all()
        error = (parameter - before).double()
        # Roundings are not biased: their mean is a random walk's, below 5 standard errors of one half ulp a step.
        assert abs(error.mean()) <= 5 * HALF_ULP * float(reach.max()) * (steps / parameter.numel()) ** 0.5
    assert changed < 0.35 * elements, "seven of ten elements are bit for bit their own after 100 times"
    one = tiny("llama-tied")
    held = Weights(one)
    with held.displaced(seed_tensor(3), eps):
        assert all(not torch.equal(p, o) for p, o in zip(held.parameters, own, strict=True))
    same = sum(int((p == o).sum()) for p, o in zip(held.parameters, own, strict=True)) / elements
    assert same > 0.94


def test_theta_returns_and_gradients_go_after_an_exception():
    model, ids = tiny("llama"), tokens()
    weights = Weights(model)
    own = [p.detach().clone() for p in weights.parameters]

    def fail(blocks, gradients):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), weights.displaced(seed_tensor(1), torch.tensor(1e-3)):
        weights.backward(loss_of(model, ids)(), fail)
    for parameter, before in zip(weights.parameters, own, strict=True):
        assert parameter.grad is None
        assert (parameter - before).abs().max() <= HALF_ULP * (before.abs().max() + 7e-3)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def peak_bytes(function):
    """Largest sum of what `function` has allocated and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()
    del kept
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("tied", [False, True])
def test_peak_memory_is_the_formula(tied):
    """On top of the weights (and the momentum): activations + 9/8 of the largest gradient + a tied embedding's
    gradient, which autograd holds from the head's backward to the embedding's; and 100 kB of numbers and networks."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
                         num_attention_heads=4, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval()
    weights, ids = Weights(model), torch.arange(3, 35).view(2, 16)
    loss_fn, history = loss_of(model, ids), History.start(len(weights.blocks))
    sizes = {name: p.nbytes for name, p in zip(weights.blocks.names, weights.parameters, strict=True)}
    weights.backward(loss_fn(), lambda blocks, gradients: None)  # rotary caches and the like
    activations = peak_bytes(loss_fn)
    formula = activations + 9 * max(sizes.values()) // 8 + (sizes["model.embed_tokens.weight"] if tied else 0) + 100_000

    names, numels = weights.blocks.names, weights.blocks.numels
    sgd, equal = SGDTrajectory(weights, keep_gradients=False), torch.ones(len(names))
    steps = {
        "paper": PaperRecipe(weights, PertNN.fresh(names), None, sgd, lr_mlp=0.1),
        "improved": ImprovedRecipe(weights, ScaleNet.fresh(names, numels), equal, window=20, costs=[Mean()]),
    }
    for name, recipe in steps.items():
        for k in range(WARM + 1):  # the momentum is there, and the improved recipe moves theta
            recipe.step(Turn(loss_fn, 0, history, derive_seed(1, k, 0), 0.0))
        peak = peak_bytes(lambda recipe=recipe: recipe.step(Turn(loss_fn, 0, history, 77, 0.0)))
        assert formula - max(sizes.values()) < peak <= formula, name
    plain = peak_bytes(lambda: loss_fn().backward())
    assert plain > 2.5 * formula, "the bound means something: plain autograd holds every gradient"


def test_noise_dots_are_those_of_kept_gradients(backend):
    model, ids = tiny("llama-tied"), tokens()
    weights, seeds = Weights(model), seed_tensor([4, 9])
    dots = NoiseDots(weights.blocks, seeds)
    weights.backward(loss_of(model, ids)(), dots)
    loss_of(model, ids)().backward()
    for b, parameter in enumerate(weights.parameters):
        gradient = parameter.grad.flatten().double()
        for k in range(2):
            z = draw_noise(parameter.numel(), seeds[k], weights.blocks.ids[b]).double()
            size = float((gradient * z).abs().sum())
            assert abs(float(dots.dots[k, b]) - float(gradient @ z)) <= 1e-6 * size
        assert float(dots.energy[b]) == pytest.approx(float(gradient @ gradient), rel=1e-5)


def test_weights_that_cannot_be_learned_on():
    with pytest.raises(InputError, match="model.embed_tokens.weight is bfloat16: learning needs fp32 weights"):
        Weights(tiny("llama", torch.bfloat16))
    model = tiny("llama").requires_grad_(False)
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="lm_head.weight is int8"):
        Weights(model)


@pytest.mark.parametrize("on_disk", [True, False])
def test_base_weights_come_back_bit_for_bit(tmp_path, on_disk):
    model = tiny("llama-tied")
    if on_disk:
        model.save_pretrained(tmp_path)
    weights = Weights(model)
    own = [p.detach().clone() for p in weights.parameters]
    base = BaseWeights(weights, tmp_path)
    assert base.on_disk == on_disk
    with torch.no_grad():
        for parameter in weights.parameters:
            parameter.add_(1)
    base.restore()
    assert all(torch.equal(p, o) for p, o in zip(weights.parameters, own, strict=True))
