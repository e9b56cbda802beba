"""The improved recipe and the closed form, on functions whose gradient and Hessian are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zo_finetuner.encoding import Encoded
from zo_finetuner.history import History
from zo_finetuner.learning.closed_form import batch_energy, closed_form_sigma
from zo_finetuner.learning.improved import WARM, ImprovedRecipe
from zo_finetuner.learning.profile import Estimate, Layout, Mean, Sample, divergence, sample
from zo_finetuner.learning.scoring import Point, measure, score
from zo_finetuner.learning.sources import LearningSet
from zo_finetuner.learning.streaming import Turn, Weights
from zo_finetuner.pertnn import PertNN, normalizer
from zo_finetuner.scale_net import ScaleNet
from zo_kernels import Blocks, derive_seed

EPS = torch.tensor(1e-3)
SIZES = {"layers.0.q_proj.weight": 8, "layers.0.v_proj.weight": 24, "layers.1.v_proj.weight": 40}


class Quadratic(nn.Module):
    """loss = c.x + x.Hx / 2 over three blocks, H positive with blocks that mix; a batch adds its own noise to c."""

    def __init__(self):
        super().__init__()
        for name, size in SIZES.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.zeros(size)))
        generator = torch.Generator().manual_seed(0)
        total = sum(SIZES.values())
        root = torch.randn(total, total, generator=generator) / math.sqrt(total)
        sharpness = torch.cat([torch.full((n,), k) for n, k in zip(SIZES.values(), (0.5, 3.0, 1.0), strict=True)])
        self.hessian = (root @ root.T) * sharpness.sqrt()[:, None] * sharpness.sqrt()
        self.slope = torch.randn(total, generator=generator) * sharpness
        self.noise = torch.cat([torch.full((n,), k) for n, k in zip(SIZES.values(), (3.0, 0.3, 0.3), strict=True)])

    def loss(self, batch):
        x = torch.cat([p for p in self.parameters()])
        own = torch.randn(len(x), generator=torch.Generator().manual_seed(1000 + batch)) * self.noise
        return (self.slope + own) @ x + x @ self.hessian @ x / 2

    def split(self, vector):
        return torch.stack([part.sum() for part in vector.split(list(SIZES.values()))])


@pytest.fixture(scope="module")
def estimated():
    """400 batches of a quadratic at its start: the estimate, and the model."""
    model = Quadratic()
    weights, estimate = Weights(model), Estimate(None, Mean())
    for k in range(400):
        taken = sample(weights, lambda k=k: model.loss(k), derive_seed(1, k, 0), derive_seed(2, k // 2, 0), EPS)
        estimate.add(taken)
    return model, estimate


def test_gain_energy_and_cost_are_what_they_are_called(estimated):
    """Within five standard errors of exact values; the errors themselves are a few per cent of them, so that a wrong
    factor of two would be twenty errors off."""
    model, estimate = estimated
    sizes = torch.tensor(list(SIZES.values()))
    exact = {
        "gain": model.split(model.slope.square()),
        "energy": model.split(model.slope.square() + model.noise.square()),
        "cost": model.split(model.hessian.diagonal()),
    }
    for name, value in exact.items():
        mean = getattr(estimate, name)
        assert ((mean.mean - value).abs() <= 5 * mean.error + 2e-3 * value).all(), name
        assert (mean.error < 0.15 * value.abs()).sum() >= 2, (name, mean.error / value)
    assert exact["energy"][0] > 3 * exact["gain"][0] and sizes.sum() == 72


def test_theta_is_where_it_was_and_moves_where_it_is_told():
    model = Quadratic()
    weights = Weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)

    def moving(energy):
        assert (energy > 0).all()

        def move(blocks, gradients):
            for block, gradient in zip(blocks, gradients, strict=True):
                weights.parameters[block].data.sub_(gradient)

        return move

    sample(weights, lambda: model.loss(0), 5, 6, EPS)
    assert all(((p - 0.5).abs() <= 2**-24).all() for p in model.parameters())
    gradient = torch.autograd.grad(model.loss(0), list(model.parameters()))
    sample(weights, lambda: model.loss(0), 5, 6, EPS, moving)
    for parameter, own in zip(model.parameters(), gradient, strict=True):
        # The gradient is taken at theta - eps z: H z eps off, at most |H|_row * eps.
        assert (parameter - (0.5 - own)).abs().max() <= 1e-3 * float(model.hessian.abs().sum(1).max()) + 1e-6


def test_divergence_and_its_gradient():
    gain, numels = torch.tensor([3.0, 1.0, 4.0]), torch.tensor([2.0, 5.0, 0.5])
    assert float(divergence(gain, numels, 7 * gain / numels)) == pytest.approx(0.0, abs=1e-6)
    logs = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    value = divergence(gain, numels, logs.exp())
    value.backward()
    share, noise = gain / 8, logs.detach().exp() * numels
    exact = (share * (share / (noise / noise.sum())).log()).sum()
    assert float(value.detach()) == pytest.approx(float(exact), rel=1e-6)
    assert torch.allclose(logs.grad, noise / noise.sum() - share, atol=1e-6)
    skipping = divergence(gain, numels, torch.tensor([1.5, 0.2, 0.0]))  # a block that is skipped takes no part
    assert float(skipping) == pytest.approx(0.0, abs=1e-6) and bool(skipping.isfinite())


def test_gains_have_floors():
    """Batches whose gradients point away from each other gain nothing, whatever their energy."""
    seen = dict(check_seed=1, losses=torch.ones(2), energy=torch.tensor([1.0, 2.0, 3.0]), cost=torch.ones(3))
    for second, gain in ((torch.ones(1, 3), torch.ones(3)), (-torch.ones(1, 3), 0.02 * seen["energy"])):
        estimate = Estimate(None, Mean())
        estimate.add(Sample(checks=torch.ones(1, 3), **seen))
        estimate.add(Sample(checks=second, **seen))
        assert torch.allclose(estimate.least_gain(), gain)
    other = Estimate(None, Mean())
    other.add(Sample(checks=torch.ones(1, 3), **seen))
    other.add(Sample(checks=torch.ones(1, 3), **seen | {"check_seed": 2}))
    assert other.gain.count == 0, "dots with different noise are not compared"


def test_a_vocabulary_earns_no_more_than_the_other_blocks():
    """100 for 40 elements of the others: 2.5 each, of which an embedding had more and a head less."""
    names = ["embed_tokens.weight", "layers.0.q_proj.weight", "layers.0.v_proj.weight", "lm_head.weight"]
    layout = Layout(Blocks((name, torch.zeros(count)) for name, count in zip(names, (1000, 10, 30, 50), strict=True)))
    gain = torch.tensor([9000.0, 10.0, 90.0, 20.0])
    assert torch.equal(layout.lasting(gain), torch.tensor([2500.0, 10.0, 90.0, 20.0]))
    alone = Layout(Blocks((name, torch.zeros(10)) for name in (names[0], names[3])))
    assert torch.equal(alone.lasting(gain[:2]), gain[:2])


def test_costs_that_scatter_are_drawn_to_their_kind():
    """Costs per element 2 +- 1 in one kind, measured with errors of .01 and of 10: kept, and pooled."""
    kinds = ["q_proj"] * 4 + ["v_proj"] * 4 + ["norm"]
    blocks = Blocks((f"layers.{i}.{kind}.weight", torch.zeros(10 * (i + 1))) for i, kind in enumerate(kinds))
    numels = torch.tensor(blocks.numels, dtype=torch.float32)
    true = torch.tensor([1.0, 3.0, 1.0, 3.0] * 2 + [7.0]) * numels
    layout = Layout(blocks)
    for error, reach in ((0.01, 0.02), (10.0, 10.0)):
        cost = Mean()
        scatter = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)) * error * 40**0.5 * numels
        for k in range(40):
            cost.add(true + scatter[k] - scatter.mean(0))
        assert torch.allclose(cost.error / numels, torch.full((9,), error), rtol=0.5)
        per_element = layout.pooled(cost) / numels
        per_element *= 7 / per_element[8]  # alone of its kind; together they are no less than their error
        if error < 1:
            assert (per_element - true / numels).abs().max() <= reach
        else:  # nothing is known but the mean of the kind: of four, weighted by how well each is known
            assert (per_element[:8] - 2).abs().max() < 0.5
    below = Mean()
    for k in range(3):
        below.add(torch.where(numels > 85, -5.0, 1.0) * numels + k * 1e-3)
    pooled = layout.pooled(below)
    assert (pooled >= 0.05 * pooled.sum() * numels / numels.sum() / 1.1).all()


def test_a_rate_stays_finite_where_the_trace_is_noise():
    """Costs together are no less than their error, whatever the sign of their sum."""
    layout = Layout(Blocks((f"layers.0.{k}.weight", torch.zeros(10)) for k in ("q_proj", "k_proj", "v_proj")))
    noise = torch.randn(30, 3, generator=torch.Generator().manual_seed(3))
    for mean in (-0.1, 0.0, 50.0):
        cost = Mean()
        for k in range(30):
            cost.add(mean + noise[k] - noise.mean(0))
        total = float(layout.pooled(cost).sum())
        assert total == pytest.approx(max(3 * mean, float(cost.error.norm())), rel=1e-2)


def test_equal_scales_until_something_is_learned():
    names, numels = list(SIZES), list(SIZES.values())
    weights = Weights(Quadratic())
    nets = ScaleNet.fresh(names, numels)
    history = History.start(3)
    for losses in (torch.tensor([4.0, 4.1]), torch.tensor([3.0, 2.9])):
        assert torch.equal(nets.scales(weights.stats(), history), torch.ones(3))
        history.remember(losses)
    assert float(history.progress) < 0


def test_the_improved_recipe_learns():
    """Away from s = 1 towards gain / elements, on a run that moves; noise-fed energy does not count as gain."""
    model = Quadratic()
    weights = Weights(model)
    names, numels = weights.blocks.names, weights.blocks.numels
    share = torch.tensor(numels, dtype=torch.float64)
    nets, costs = ScaleNet.fresh(names, numels), [Mean()]
    recipe = ImprovedRecipe(weights, nets, share, window=100, horizon=40, costs=costs, lr_mlp=0.05)
    gain, elements = model.split(model.slope.square()), torch.tensor(numels, dtype=torch.float32)
    history = History.start(3)
    before = float(divergence(gain, elements, recipe.energies(history).detach()))
    start = float(model.loss(0).detach())
    for k in range(WARM):
        recipe.step(Turn(lambda k=k: model.loss(k), 0, history, derive_seed(3, k, 0), 0.0))
    assert all((p.abs() <= 2**-24).all() for p in model.parameters()), "nothing moves while it is measured"
    assert torch.equal(recipe.nets.log_base, torch.zeros(3))
    for k in range(WARM, 100):
        recipe.step(Turn(lambda k=k: model.loss(k), 0, history, derive_seed(3, k, 0), k / 100))
    with torch.no_grad():
        assert float(model.loss(0)) < start - 0.05
    s = (normalizer(history.sigma, share) * history.sigma).square().float()
    after = float(divergence(gain, elements, s))
    assert before > 0.2 and after < before / 5, (before, after)
    assert float((share * s).sum()) == pytest.approx(float(share.sum()), rel=1e-5), "the normaliser holds"


def test_several_tasks_share_the_scales_and_keep_their_own_measurements():
    model = Quadratic()
    weights = Weights(model)
    names, numels = weights.blocks.names, weights.blocks.numels
    nets, costs = ScaleNet.fresh(names, numels), [Mean(), Mean()]
    recipe = ImprovedRecipe(weights, nets, torch.ones(3), window=20, horizon=10, costs=costs)
    histories = [History.start(3), History.start(3)]
    for k in range(2 * WARM):
        recipe.step(Turn(lambda k=k: (1 + k % 2) * model.loss(k), k % 2, histories[k % 2], derive_seed(4, k, 0), 0.0))
    one, other = recipe._estimates[0], recipe._estimates[1]
    assert one.count == other.count == WARM
    assert (other.energy.mean > 2 * one.energy.mean).all() and costs[0].count == costs[1].count == WARM


def test_closed_form_is_the_energy_per_element(estimated):
    model, _ = estimated
    weights = Weights(model)
    energy = batch_energy(weights, [lambda k=k: model.loss(k) for k in range(3)])
    gradients = [torch.autograd.grad(model.loss(k), list(model.parameters())) for k in range(3)]
    exact = torch.tensor([[float(g.double().square().sum()) for g in gs] for gs in gradients]).mean(0)
    assert torch.allclose(energy, exact, rtol=1e-5)
    numels, share = torch.tensor([8.0, 24.0, 40.0]), torch.tensor([8.0, 24.0, 40.0])
    for power in (0.0, 0.5, 1.0):
        s = closed_form_sigma(energy, numels, share, power).square()
        per_element = (energy / numels) ** power
        expected = per_element * share.sum() / (share * per_element).sum()
        assert torch.allclose(s, expected.clamp(1 / 16, 16), rtol=1e-5)
    extreme = closed_form_sigma(torch.tensor([0.0, 1.0, 1.0]), numels, share, 1.0)
    assert float(extreme[0]) == 0.25, "s is clipped to 1/16"


def test_a_classification_set_counts_a_vocabulary_as_others():
    """SST-2's rows say so, a text's do not; a point of the former has the gain of the latter, limited."""
    rows = [Encoded(kind, ((1, 2), (1, 3)), (1, 1), (0,), (1,)) for kind in ("classification", "generation")]
    few, many = (LearningSet("x", [row], [row]) for row in rows)
    assert few.few_answers and not many.few_answers
    model = nn.Module()
    model.embed_tokens, model.q_proj = nn.Linear(4, 1, bias=False), nn.Linear(3, 1, bias=False)
    weights, slope = Weights(model), torch.tensor([9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 1.0])

    def point(learning_set):
        loss = lambda k: lambda: slope @ torch.cat([p.flatten() for p in model.parameters()])  # noqa: E731
        return measure(weights, loss, History.start(2), Mean(), task=0, seed=9, eps=1e-3,
                       few_answers=learning_set.few_answers)  # fmt: skip

    wide, narrow = point(many).gain, point(few).gain
    assert narrow[1] == wide[1] and narrow[0] == pytest.approx(4 * float(wide[1]) / 3, rel=1e-6) and wide[0] > narrow[0]


def test_scores_rank_what_is_known(estimated):
    """Equal, best and random scales at a measured point; the point comes back from its state."""
    model, _ = estimated
    weights = Weights(model)
    names, numels, share = weights.blocks.names, weights.blocks.numels, torch.tensor([8.0, 24.0, 40.0])
    cost, elements = Mean(), torch.tensor(numels, dtype=torch.float32)
    point = measure(weights, lambda k: lambda: model.loss(k), History.start(3), cost, task=0, seed=9, eps=1e-3)
    assert cost.count == 8 and torch.allclose(point.gain, model.split(model.slope.square()), rtol=0.8)
    best = ScaleNet.fixed(names, numels, (point.gain / elements).sqrt(), source="")
    equal, random = ScaleNet.fresh(names, numels), PertNN.fresh(names, seed=1)
    values = [score([point], elements, nets, share) for nets in (best, equal, random)]
    assert values[0] == pytest.approx(0.0, abs=1e-5) and values[0] < min(values[1:]) - 0.05
    again = Point.from_state(point.state_dict())
    assert [score([again], elements, nets, share) for nets in (best, equal, random)] == values
    # A point where nothing is gained does not count, whatever its shares.
    still = Point(0, point.stats, point.history, point.gain.flip(0) * 1e-9)
    assert score([point, still], elements, equal, share) == pytest.approx(values[1], rel=1e-6)
    # Two learning sets count alike, whatever their gains.
    loud = Point(1, point.stats, point.history, point.gain * 100)
    assert score([point, loud], elements, equal, share) == pytest.approx(values[1], rel=1e-5)
