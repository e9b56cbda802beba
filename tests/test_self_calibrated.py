"""Scales that calibrate themselves: the drawn group, the estimate, the unbiased step, state; from forwards alone."""

from __future__ import annotations

import pytest
import torch
from models import tiny, tokens
from torch import nn

from zo_finetuner.block_kinds import block_groups
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.optim import SelfCalibrated, make_method
from zo_finetuner.optim.group_gains import PRIOR, GroupGains
from zo_finetuner.optim.self_calibrated import CLIP, EXPLORE, Calibrated, tempered
from zo_kernels import derive_seed, seed_tensor

SIZES = (8, 24, 40)


class Linear(nn.Module):
    """loss = c.x over three blocks: the gradient is c whatever x is."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in SIZES])
        self.c = [size * torch.randn(n, generator=generator) for n, size in zip(SIZES, (3.0, 0.1, 0.5), strict=True)]

    def forward(self) -> torch.Tensor:
        return sum((c.double() * p.double()).sum() for c, p in zip(self.c, self.parts, strict=True))


def method_of(power: float = 0.5) -> SelfCalibrated:
    elements = torch.tensor(SIZES, dtype=torch.float64)
    return SelfCalibrated(scales=Calibrated(torch.arange(3), elements, elements.clone(), power))


def test_gains_are_found_and_scales_follow():
    """400 steps: the energies within 3 standard errors (sqrt(2 / observations)), s = (G / D)^p in its budget."""
    model, method = Linear(), method_of()
    engine = Engine(model, method, seed=1, probing="inplace")
    for _ in range(400):
        engine.step(lambda: model().detach(), 1e-3)
    gains = method.scales.gains
    truth = torch.tensor([c.double().square().sum() for c in model.c])
    assert (gains.seen > 15).all()
    assert ((gains.energy / gains.seen / truth - 1).abs() < 3 * (2 / gains.seen).sqrt()).all()
    s, pi = method.scales.policy()
    assert torch.allclose((s * method.scales.share).sum(), method.scales.share.sum()) and s.min() >= 1 / CLIP
    energy = gains.gains / method.scales.elements
    assert torch.allclose(s / s[0], (energy / energy[0]).sqrt())
    assert torch.allclose(pi.sum(), torch.ones((), dtype=torch.float64)) and pi.min() >= EXPLORE / 3


def test_the_step_is_unbiased_and_moves_one_group():
    """Mean of 3,000 first steps against -lr s c, z-test; a step moves the blocks of one group, by what it probed."""
    model, method, steps = Linear(), method_of(), []
    method.scales.gains.energy.copy_(torch.tensor([9.0, 1.0, 4.0]))
    method.scales.gains.seen.fill_(2.0)
    start = {name: value.clone() for name, value in method.state_dict().items()}
    s = method.scales.policy()[0]
    engine = Engine(model, method, seed=5, probing="inplace")
    for _ in range(3000):
        method.load_state_dict(start)
        engine.step(lambda: model().detach(), 1.0)
        moved = torch.cat([p.detach().flatten() for p in model.parts])
        assert [bool(p.count_nonzero()) for p in model.parts].count(True) == 1
        steps.append(moved)
        for p in model.parts:
            p.data.zero_()
    steps = torch.stack(steps).double()
    expected = -torch.cat([s[i] * c for i, c in enumerate(model.c)])
    z = (steps.mean(0) - expected) / (steps.std(0) / 3000**0.5)
    assert z.abs().max() < 4.5  # 72 coordinates: P(|z| > 4.5) is 5e-4 in all


def test_a_loss_that_is_not_finite_is_forgotten():
    model, method = Linear(), method_of()
    engine = Engine(model, method, probing="inplace")
    engine.step(lambda: model().detach(), 1e-3)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    engine.step(lambda: torch.tensor(float("inf")), 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_the_prior_and_the_memory():
    gains = GroupGains(torch.tensor([10.0, 30.0], dtype=torch.float64), memory=4)
    assert torch.equal(gains.gains, gains.elements)
    gains.add(torch.tensor(0), torch.tensor(50.0, dtype=torch.float64))
    assert gains.gains.tolist() == pytest.approx([50.0, 150.0]), "one observation sets the level of all"
    for _ in range(200):
        gains.add(torch.tensor(1), torch.tensor(15.0, dtype=torch.float64))
    assert gains.seen.tolist() == pytest.approx([0.0, 4.0], abs=1e-9)
    assert gains.gains[0].item() == pytest.approx(15 / 30 * 10), "long forgotten: the level of what is known"
    assert gains.gains[1].item() == pytest.approx((PRIOR * 15 + 4 * 15) / (PRIOR + 4))


def test_temper_clips():
    s = tempered(torch.tensor([1e9, 1.0]).double(), torch.ones(2).double(), torch.ones(2).double(), 1.0)
    assert s.tolist() == pytest.approx([2.0, 1 / CLIP])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal(dtype, tmp_path):
    ids = tokens()

    def run(model, engine, steps):
        for _ in range(steps):
            engine.step(lambda: model(input_ids=ids, labels=ids).loss.detach(), 1e-3)

    def made():
        model = tiny("llama", dtype)
        return model, Engine(model, make_method("self-calibrated", model), seed=3)

    whole, engine = made()
    run(whole, engine, 12)
    half, first = made()
    run(half, first, 5)
    torch.save({"model": half.state_dict(), "engine": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    rest, second = made()
    rest.load_state_dict(saved["model"])
    second.load_state_dict(saved["engine"])
    run(rest, second, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    mine, theirs = engine.method.state_dict(), second.method.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine) and float(mine["scales.seen"].sum()) > 11


def test_scales_are_a_function_of_the_seed_and_fit_fp16():
    model = tiny("opt")
    method = make_method("self-calibrated", model)
    engine, drawn = Engine(model, method), set()

    def context():
        engine.inputs.fill(1e-3, 0, engine.step_count)
        return engine._context(engine.step_count)

    for step in range(60):
        engine.step_count = step
        scale = method.ask(context())[0].direction.scale
        assert torch.equal(scale, scale.half().float())
        drawn.add(int(method.scales.group))
        chosen = method.scales.groups == method.scales.group
        assert scale[chosen].min() == scale[chosen].max() > 0 == scale[~chosen].abs().max()
    assert len(drawn) > 8
    engine.step_count = 7
    again = [method.ask(context())[0].direction.scale for _ in range(2)]
    assert torch.equal(*again)
    assert seed_tensor(derive_seed(0, 7, 0)).dtype == torch.int64


def test_groups():
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for layer in range(6):
        names += [f"model.layers.{layer}.{n}.weight" for n in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
    numbers, labels = block_groups(names)
    assert labels == ["embedding", "norm", "q 1/3", "up 1/3", "q 2/3", "up 2/3", "q 3/3", "up 3/3"]
    assert [labels[n] for n in numbers[2:5]] == ["q 1/3", "up 1/3", "norm"] and numbers[-3:] == [6, 7, 1]
    assert block_groups(names, most=5)[1] == ["embedding", "norm", "q", "up"]
    from bench.shapes import CONFIGS, shapes

    assert {model: len(block_groups([n for n, _ in shapes(model)])[1]) for model in CONFIGS} == {
        "llama-1b": 23, "llama-8b": 24, "opt-30b": 21}  # fmt: skip


def test_it_takes_no_nets():
    with pytest.raises(InputError, match="pertnn is given, but self-calibrated has no nets"):
        make_method("self-calibrated", tiny("llama"), pertnn="x")


def test_energies_and_costs_from_forwards_alone():
    """loss = c.x + x.Hx / 2, H diagonal: G within 4 standard errors, T exact to fp32, the weights back, forwards."""
    from zo_finetuner.learning.forward_only import measure_forward
    from zo_finetuner.learning.profile import Mean
    from zo_finetuner.learning.streaming import Weights

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(10, 8, bias=False), nn.Linear(10, 4, bias=False)
            generator = torch.Generator().manual_seed(1)
            self.c = [scale * torch.randn(p.shape, generator=generator).double()
                      for scale, p in zip((1.0, 5.0), self.parameters(), strict=True)]

        def forward(self):
            parts = zip((3.0, 0.5), self.c, self.parameters(), strict=True)
            return sum((c * p.double()).sum() + h * p.double().square().sum() / 2 for h, c, p in parts)

    model, cost = Bowl(), Mean()
    weights, rounds = Weights(model), 200
    before = [p.detach().clone() for p in model.parameters()]
    loss_fn = lambda: model()  # noqa: E731
    found = measure_forward(weights, lambda number: loss_fn, cost, forwards=5 * rounds + 4, eps=1e-2, seed=3)
    assert found.forwards == 5 * rounds
    slopes = [c + h * p.double() for h, c, p in zip((3.0, 0.5), model.c, before, strict=True)]
    truth = torch.tensor([s.square().sum() for s in slopes])
    assert ((found.energy / truth - 1).abs() < 4 * (2 / rounds) ** 0.5).all()
    traces = torch.tensor([3.0 * 80, 0.5 * 40])
    assert ((cost.mean - traces).abs() < 4 * cost.error).all() and (cost.error < 0.05 * traces).all()
    assert found.trace == pytest.approx(260, rel=0.1) and found.trace_error < 5
    assert all((p - b).abs().max() < 1e-5 for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(InputError, match="forwards must be at least 5 for the 2 groups of blocks here, got 4"):
        measure_forward(weights, lambda number: loss_fn, Mean(), forwards=4, eps=1e-2, seed=3)


def test_bytes_at_opt_30b(tmp_path):
    """Every learned optimizer holds less than the 2 MB that the paper states for OPT-30B, in a run and on disk."""
    from bench.shapes import shapes
    from zo_finetuner.cards import RECIPES, Card
    from zo_finetuner.learning.show import held_bytes
    from zo_finetuner.pertnn import PertNN
    from zo_finetuner.pertnn_io import save_pertnn
    from zo_finetuner.scale_net import ScaleNet

    names = [name for name, _ in shapes("opt-30b")]
    numels = [torch.Size(shape).numel() for _, shape in shapes("opt-30b")]
    nets = {"paper": PertNN.fresh(names), "improved": ScaleNet.fresh(names, numels),
            "closed-form": ScaleNet.fixed(names, numels, torch.ones(len(names)), source="")}  # fmt: skip
    held = {}
    for recipe, net in nets.items():
        card = Card(source="zo learn", recipe=recipe, inputs=RECIPES[recipe], sigma=(0.123456,) * len(names))
        save_pertnn(tmp_path / "f.safetensors", net, card)
        held[recipe] = held_bytes(net), (tmp_path / "f.safetensors").stat().st_size
    number, labels = block_groups(names)
    sums = (torch.ones(len(labels), dtype=torch.float64) for _ in range(2))
    method = SelfCalibrated(scales=Calibrated(torch.tensor(number), *sums))
    held["self-calibrated"] = sum(t.nbytes for t in method.state_dict().values()), 0
    assert held["paper"][0] == 4 * (772 * 449 + 772 + 4)
    assert all(max(sizes) < 2_000_000 for sizes in held.values()), held
    assert held["self-calibrated"][0] == 16 * 21 and held["improved"][0] < 100_000
