"""LDSD's mean learns: it aligns with the gradient where it should, and not with the published code's defect."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zo_finetuner.engine import Engine
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
