"""Pieces of a tensor, each moved by its own piece of the noise, are the whole tensor moved; so are FSDP2's."""

from __future__ import annotations

import pytest
import rank_checks
import torch
from test_ops import COEFS, SEEDS
from worlds import of_two_and_four

import zo_kernels as zk

CUTS = (0, 5, 128, 777, 1001, 1537, 1537, 2000)  # unaligned, aligned, and an empty piece

worlds = of_two_and_four  # a fixture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize("size", [0.5, 2.0], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("form", [None, "shifted", "weighted"])
def test_scratches_of_pieces_are_a_piece_of_the_scratch(backend, dtype, dist, size, form):
    generator = torch.Generator().manual_seed(0)
    theta, state = torch.randn(2000, generator=generator).to(dtype), torch.rand(2000, generator=generator) + 0.1
    near = COEFS[0].abs() * size

    def scratches(part, offset):
        made = {None: None, "shifted": zk.shifted(state[part], COEFS[1]), "weighted": zk.weighted(state[part])}[form]
        outs = [torch.empty_like(theta[part]) for _ in range(2)]
        own = theta[part].clone()
        zk.scratch(own, outs[0], 9, SEEDS[:2], COEFS[:2], mirror=outs[1], nearest_above=near, dist=dist, form=made,
                   offset=offset)  # fmt: skip
        return outs

    whole = scratches(slice(None), 3)
    for first, end in zip(CUTS, CUTS[1:], strict=False):
        pieces = scratches(slice(first, end), 3 + first)
        for piece, both in zip(pieces, whole, strict=True):
            assert torch.equal(piece, both[first:end])


def test_rows_have_no_offset():
    theta = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="a shard has an offset instead"):
        zk.scratch(theta, theta[:1].clone(), 1, SEEDS[0], COEFS[0], rows=torch.tensor([1]), offset=8)


SHARDED = [
    ("mezo", "float32", "auto"),
    ("mezo", "bfloat16", "auto"),
    ("zo-adam", "bfloat16", "auto"),
    ("ldsd-sgd", "float32", "scratch"),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", SHARDED, ids=lambda case: "-".join(case[:2]))
def test_sharded_weights_end_where_whole_ones_do(worlds, size, case):
    results = worlds[size].run(rank_checks.sharded, *case)
    losses, equal, _ = results[0][1]
    assert equal
    assert all(of_rank[0] == losses for of_rank in results)


def test_scales_from_statistics_of_pieces(worlds):
    """PertNN's inputs, joined from the pieces', are those of the whole to fp32 rounding: so are the weights."""
    results = worlds[2].run(rank_checks.sharded, "zo-finetuner", "float32", "auto")
    losses, _, far = results[0][1]
    assert results[0][0] == results[1][0] == pytest.approx(losses, abs=1e-5)
    assert far < 1e-4


def test_what_needs_whole_tensors_says_so(worlds):
    for told in worlds[2].run(rank_checks.refused_shards, ["lozo", "dizo", "sparse-mezo", "forward-grad", "mezo"]):
        assert all("does not go with sharded weights" in message for message in told[:4]) and told[4] == ""
