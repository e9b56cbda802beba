"""LDSD's mean learns: it aligns with the gradient where it should, and not with the published code's defect."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zo_finetuner.update as update
from zo_finetuner.engine import Engine
from zo_finetuner.guards import Limits
from zo_finetuner.optim.ldsd import LDSD
from zo_kernels import derive_seed, seed_tensor


class Slope(nn.Module):
    """A linear loss over 776 weights in several tensors: its gradient never changes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        for i, shape in enumerate([(16, 24), (24, 8), (8, 16), (72,)]):
            self.register_parameter(f"w{i}", nn.Parameter(torch.zeros(shape)))
        self.gradient = torch.randn(776, generator=generator)

    def forward(self):
        return self.gradient @ torch.cat([p.flatten() for p in self.parameters()])


class Published(LDSD):
    """Pairs the advantages with directions of other seeds, as a stream that goes on from the best candidate's does."""

    def _mean_terms(self):
        terms = []
        for j, (direction, coef) in enumerate(super()._mean_terms()):
            other = seed_tensor(derive_seed(int(self._star.seed) & (2**64 - 1), j, 0))
            terms.append((type(direction)(other, direction.scale, direction.dist), coef))
        return terms


def alignment(kind, steps=300, **settings):
    """Cosine of the mean with the gradient, weights as good as frozen.  The rate is large: a_j is eps |g| std."""
    model = Slope()
    engine = Engine(model, kind(mean_lr=4.0, **settings), eps=1e-2, seed=1, probing="scratch")
    for _ in range(steps):
        engine.step(model, 1e-9)
    mean = torch.cat([mu.float().flatten() for mu in engine.method.states["mu"]])
    return torch.cosine_similarity(mean, model.gradient, dim=0).item()


CHANCE = 776**-0.5  # .036: the standard deviation of the cosine of a random direction


@pytest.mark.parametrize("settings", [{}, {"mean_dtype": "bfloat16"}, {"dist": "rademacher"}], ids=str)
def test_the_mean_points_downhill(settings):
    # After n steps of K = 5: signal n (K - 1) / K |g|, noise sqrt(n K d) / K |g| or so: cosine near -.78.
    assert alignment(LDSD, **settings) < -0.6


def test_the_published_pairing_does_not():
    assert abs(alignment(Published)) < 4 * CHANCE


def test_a_learned_mean_beats_a_plain_search():
    """The same rate of theta and the same seeds: with the mean the loss falls further."""
    ends = []
    for rate in (4.0, 0.0):
        model = Slope()
        engine = Engine(model, LDSD(mean_lr=rate), eps=1e-2, seed=1, probing="inplace")
        for _ in range(200):
            engine.step(model, 1e-4)
        ends.append(model().item())
    assert ends[0] < 1.3 * ends[1] < 0


def test_the_mean_is_kept_once():
    model = Slope()
    method = LDSD()
    Engine(model, method)
    assert sum(mu.nbytes for mu in method.states["mu"]) == 776 * 4
    small = LDSD(mean_dtype="bfloat16")
    Engine(model, small)
    assert [name for name in small.state_dict()] == ["mu"] and small.states["mu"][0].dtype == torch.bfloat16


@pytest.mark.parametrize("probing", ["scratch", "inplace"])
@pytest.mark.parametrize("settings", [{}, {"mean_dtype": "bfloat16"}], ids=str)
def test_a_clip_is_of_the_weights_step_and_not_of_the_means(settings, probing):
    moved, means, sizes = [], [], []
    for clip in (0.0, 1.0):
        model = Slope()
        engine = Engine(model, LDSD(**settings), eps=1e-2, seed=1, probing=probing, limits=Limits(clip=clip))
        engine.step(model, 1e-3)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        means.append(torch.cat([mu.flatten() for mu in engine.method.states["mu"]]))
        sizes.append(float(engine.projected_grad.abs()))
    assert sizes[0] == sizes[1] > 2
    assert torch.allclose(moved[1] * sizes[0], moved[0], rtol=1e-4, atol=1e-6 if probing == "inplace" else 0)
    assert torch.equal(*means) and means[0].any()


@pytest.mark.parametrize("probing, there_and_back", [("scratch", 0), ("inplace", 4)])
@pytest.mark.parametrize("dtype, passes", [("float32", ["shifted-mean"]), ("bfloat16", ["update", "update"])])
def test_weights_and_mean_are_updated_in_one_pass(probing, there_and_back, dtype, passes, monkeypatch):
    """The way back from the last probe is in it."""
    made, plain, ruled = [], update.update_, update.update_state_
    monkeypatch.setattr(update, "update_", lambda *a, **k: (made.append("update"), plain(*a, **k)))
    monkeypatch.setattr(update, "update_state_", lambda b, rule, *a, **k: (made.append(rule), ruled(b, rule, *a, **k)))
    model = Slope()
    Engine(model, LDSD(candidates=3, mean_dtype=dtype), eps=1e-2, seed=1, probing=probing).step(model, 1e-3)
    assert made == ["update"] * there_and_back + passes


def test_a_step_beyond_fp16_is_skipped():
    model = Slope().half()
    engine = Engine(model, LDSD(), eps=1e-2, seed=1, limits=Limits(explosion=0))
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 1e6])
    engine.step(lambda: next(losses), 1.0)  # lr g is 5e7
    assert engine.metrics()["skipped_steps"] == 1 and not any(p.any() for p in model.parameters())
