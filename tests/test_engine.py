"""One step against its equations, the estimator's statistics, faults, and state."""

from __future__ import annotations

import math

import pytest
import torch
from models import tiny, tokens
from torch import nn

from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.optim import MeZO
from zo_finetuner.optimizer import ZOOptimizer
from zo_finetuner.params import trainable_blocks
from zo_kernels import ROUNDING_PROBE, Blocks, derive_seed, draw_noise, seed_tensor, tensor_ids, update_
from zo_kernels.noise import rounding_bits
from zo_kernels.rounding import round_stochastic

EPS, LR = 1e-3, 1e-2


class Quadratic(nn.Module):
    """f(theta) = 1/2 theta' diag(h) theta + b' theta over two blocks."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.second = nn.Parameter(torch.randn(7, generator=generator))
        self.h = torch.rand(19, generator=generator) + 0.5
        self.b = torch.randn(19, generator=generator)

    def theta(self) -> torch.Tensor:
        return torch.cat([self.first.flatten(), self.second])

    def forward(self) -> torch.Tensor:
        theta = self.theta().double()
        return (0.5 * self.h * theta * theta + self.b * theta).sum()

    def gradient(self) -> torch.Tensor:
        return (self.h * self.theta() + self.b).detach()


def directions(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    ids = tensor_ids(name for name, _ in model.named_parameters())
    return {n: draw_noise(tuple(p.shape), seed_tensor(seed), ids[n]) for n, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["inplace", "scratch", "paired"])
def test_a_step_is_mezo_to_fp32_rounding(mode):
    """Three steps against the equations with z materialised, on a small Llama."""
    ids = tokens()
    ours, dense = tiny("llama-tied"), tiny("llama-tied")
    engine = Engine(ours, MeZO(), eps=EPS, seed=3, probing=mode)

    def loss_of(model):
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss

    for step in range(3):
        engine.step(lambda: loss_of(ours), LR)
        z = directions(dense, derive_seed(3, step, 0))
        theta = {n: p.detach().clone() for n, p in dense.named_parameters()}
        losses = []
        for sign in (1, -1):
            for n, p in dense.named_parameters():
                p.data.copy_(theta[n] + sign * EPS * z[n])
            losses.append(loss_of(dense))
        g = (losses[0] - losses[1]) / (2 * EPS)
        # A loss near 4.6 has an ulp of 4.8e-7: the difference of two carries some 1e-6, g some 1e-6 / 2 eps.
        assert engine.projected_grad.item() == pytest.approx(g.item(), abs=2e-6 / (2 * EPS))
        g = engine.projected_grad
        for n, p in dense.named_parameters():
            p.data.copy_(theta[n] - LR * g * z[n])
    for (name, p), q in zip(ours.named_parameters(), dense.parameters(), strict=True):
        # In place, each step makes three roundings of numbers below 2 where the equations make one.
        assert (p - q).abs().max() <= 12 * 2**-24, name


def test_all_probing_agrees():
    ids = tokens()
    ends = []
    for mode in ("inplace", "scratch", "paired"):
        model = tiny("opt")
        engine = Engine(model, MeZO(), eps=EPS, probing=mode)
        losses = [
            engine.step(lambda model=model: model(input_ids=ids, labels=ids).loss.detach(), 1e-4) for _ in range(3)
        ]
        ends.append((torch.stack(losses), torch.cat([p.flatten() for p in model.parameters()])))
    for losses, weights in ends[1:]:
        assert (ends[0][0] - losses).abs().max() < 2e-6
        assert (ends[0][1] - weights).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["inplace", "scratch", "paired"])
def test_autocast_around_a_step_casts_the_weights_of_every_probe(mode):
    """Autocast would hand the second probe the 16-bit weights of the first, and a later step those of an earlier."""
    ids = tokens(2, 9)

    def run(outside: bool) -> list[float]:
        model = tiny("llama-tied")
        engine = Engine(model, MeZO(), eps=3e-2, probing=mode)

        def loss():
            with torch.autocast("cpu", torch.bfloat16, enabled=not outside, cache_enabled=False):
                return model(input_ids=ids, labels=ids).loss.float()

        gradients = []
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            if outside:
                model(input_ids=ids)  # fills the cache
            for _ in range(3):
                engine.step(loss if not outside else lambda: model(input_ids=ids, labels=ids).loss.float(), 1e-2)
                gradients.append(float(engine.projected_grad))
        return gradients

    want = run(outside=False)
    assert all(abs(g) > 1e-3 for g in want)
    assert run(outside=True) == want


def test_the_estimator_is_unbiased_with_the_right_variance():
    """E[g z] = gradient, z-test over 4,096 probes; E|g z|^2 = (d + 2) |gradient|^2 for normal z, within 10 %."""
    model = Quadratic()
    engine = Engine(model, MeZO(), eps=EPS, probing="inplace")
    gradient, samples = model.gradient(), []
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(4096):
        engine.step(lambda: model().detach(), 1.0)
        samples.append(torch.cat([theta["first"].flatten(), theta["second"]]) - model.theta().detach())
        for n, p in model.named_parameters():
            p.data.copy_(theta[n])
    samples = torch.stack(samples).double()
    z = (samples.mean(0) - gradient) / (samples.std(0) / math.sqrt(4096))
    assert z.abs().max() < 4.2  # 19 coordinates: P(|z| > 4.2) is 5e-4 in all
    second = samples.square().sum(1).mean() / gradient.double().square().sum()
    assert abs(second / (19 + 2) - 1) < 0.1


def test_a_step_goes_downhill():
    model = Quadratic()
    optimizer = ZOOptimizer(model, lr=1e-2, eps=EPS)
    before = model().item()
    for _ in range(300):
        optimizer.step(lambda: model().detach())
    assert model().item() < before - 0.5 * abs(before - (-0.5 * model.b**2 / model.h).sum().item())


def test_sixteen_bit_update_is_the_contracts_stochastic_rounding():
    model, ids = tiny("llama", torch.bfloat16), tokens()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = Engine(model, MeZO(), eps=EPS, seed=11)
    engine.step(lambda: model(input_ids=ids, labels=ids).loss.detach(), LR)
    z = directions(model, derive_seed(11, 0, 0))
    seed = seed_tensor(derive_seed(11, 0, ROUNDING_PROBE))
    coef = -torch.tensor(LR) * engine.projected_grad
    ids_of = tensor_ids(before)
    moved = 0
    for name, p in model.named_parameters():
        exact = (before[name].double() + coef.double() * z[name].double()).float()
        bits = rounding_bits(torch.arange(p.numel()), seed, ids_of[name]).view(p.shape)
        expected = round_stochastic(exact, bits, torch.bfloat16)
        # z is the backend's own, so only a double rounding (1 in 2^29) or its tie with the bits could differ.
        assert torch.equal(p, expected), name
        moved += (p != before[name]).sum().item()
    assert moved > 0


def test_small_bf16_updates_survive_in_the_mean():
    """Steps of 1e-3 on weights of 1 (spacing 2^-7 above, 2^-8 below): nearest rounding would lose every one."""
    weight = torch.ones(1 << 16, dtype=torch.bfloat16)
    blocks, signs = Blocks([("weight", weight)]), torch.zeros(1 << 16)
    for step in range(64):
        seed = seed_tensor([derive_seed(0, step, 0)])
        rounding_seed = seed_tensor(derive_seed(0, step, ROUNDING_PROBE))
        update_(blocks, seed, torch.tensor([1e-3]), rounding_seed=rounding_seed, dist="rademacher")
        signs += draw_noise(1 << 16, seed[0], blocks.ids[0], dist="rademacher")
    share = ((weight.float() - 1) * signs).sum() / (1e-3 * signs.square().sum())
    # An update's rounding has variance of about 2^-8 * 1e-3 an element: standard error 2 / 256 = .008.
    assert share.item() == pytest.approx(1, abs=0.04)


def test_a_step_is_reproducible_and_the_seed_matters():
    ids = tokens()

    def run(seed):
        model = tiny("llama", torch.bfloat16)
        engine = Engine(model, MeZO(), eps=EPS, seed=seed)
        for _ in range(3):
            engine.step(lambda: model(input_ids=ids, labels=ids).loss.detach(), LR)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_skips_the_update_and_says_so(mode, bad, caplog):
    model = Quadratic()
    engine = Engine(model, MeZO(), eps=EPS, probing=mode, weight_decay=0.1)
    before = model.theta().detach().clone()
    values = iter([1.0, bad, 2.0, 1.0])
    assert not torch.isfinite(engine.step(lambda: next(values), LR))
    # In place, +eps then -2 eps + eps leaves fp32 rounding of numbers below 4.
    assert (model.theta() - before).abs().max() <= (0 if mode == "scratch" else 6 * 2**-24)
    assert engine.metrics()["skipped_steps"] == 1
    with caplog.at_level("WARNING"):
        engine.step(lambda: next(values), LR)
    assert "step 0 was skipped" in caplog.text
    assert engine.metrics()["skipped_steps"] == 1
    assert (model.theta() - before).abs().max() > 1e-3


def test_weight_decay_is_decoupled():
    model = Quadratic()
    before = model.theta().detach().clone()
    Engine(model, MeZO(), eps=EPS, weight_decay=0.5, probing="scratch").step(lambda: 1.0, 0.1)  # equal losses: g = 0
    assert torch.equal(model.theta(), before * (1 - torch.tensor(0.1) * 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_bit_equal(dtype, tmp_path):
    ids = tokens()

    def run(optimizer, model, steps):
        for _ in range(steps):
            optimizer.step(lambda: model(input_ids=ids, labels=ids).loss.detach())

    whole = tiny("qwen2", dtype)
    run(ZOOptimizer(whole, lr=LR, seed=9), whole, 5)

    first = tiny("qwen2", dtype)
    optimizer = ZOOptimizer(first, lr=LR, seed=9)
    run(optimizer, first, 2)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = tiny("qwen2", dtype, seed=1)
    second.load_state_dict(saved["model"])
    optimizer = ZOOptimizer(second, lr=1.0, seed=0)
    optimizer.load_state_dict(saved["optimizer"])
    run(optimizer, second, 3)
    for (name, p), q in zip(second.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_resume_refuses_another_run():
    state = Engine(tiny("llama"), MeZO()).state_dict()
    with pytest.raises(InputError, match="ids differs"):
        Engine(tiny("opt"), MeZO()).load_state_dict(state)
    with pytest.raises(InputError, match="probed inplace, not scratch"):
        Engine(tiny("llama"), MeZO(), probing="scratch").load_state_dict(state)
    with pytest.raises(InputError, match="noise_version differs"):
        Engine(tiny("llama"), MeZO()).load_state_dict({**state, "noise_version": 2})


@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf])
def test_bad_rates_are_refused(value):
    with pytest.raises(InputError, match="eps must be positive"):
        Engine(tiny("llama"), MeZO(), eps=value)
    with pytest.raises(InputError, match="lr must be positive"):
        ZOOptimizer(tiny("llama"), lr=value)


def test_integer_weights_and_nothing_to_train_are_refused():
    model = Quadratic()
    model.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="table is int8"):
        trainable_blocks(model)
    frozen = Quadratic().requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        trainable_blocks(frozen)


def test_a_model_that_was_moved_is_told():
    model = Quadratic()
    optimizer = ZOOptimizer(model, lr=0.1)
    model.second.data = model.second.data.clone()
    with pytest.raises(RuntimeError, match="second has moved since the optimizer was made"):
        optimizer.step(lambda: model().detach())


def test_the_optimizer_needs_a_closure_and_takes_schedulers():
    model = Quadratic()
    optimizer = ZOOptimizer(model, lr=0.1)
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = model.theta().detach().clone()
    optimizer.step(lambda: model().detach())
    schedule.step()
    assert (model.theta() - before).abs().max() < 1e-6  # a rate of zero moves nothing but the probe's rounding


def test_lora_trains_its_adapter_only():
    peft = pytest.importorskip("peft")
    ids = tokens()
    base = tiny("llama", torch.bfloat16)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, adapter)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-2)
    adapters = set(optimizer.engine.blocks.names)
    assert adapters and all("lora_" in name for name in adapters)
    before = {n: model.get_parameter(n).detach().clone() for n in adapters}
    optimizer.step(lambda: model(input_ids=ids, labels=ids).loss.detach())
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    assert all(not torch.equal(model.get_parameter(n), p) for n, p in before.items())
