"""A model on several devices: ops and steps call themselves on each part, and give what one call would.

Here matrices and vectors count as two devices: which part a tensor is in is all that differs from one list.
"""

from __future__ import annotations

import pytest
import torch
from models import tiny, tokens
from test_ops import COEFS, SEEDS

import zo_kernels as zk
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.optim import make_method

NAMED = {"a": (7, 9), "b": (11,), "c": (3, 50), "d": (130,)}


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.setattr("zo_kernels.parts.place_of", lambda tensor: tensor.dim())


def blocks(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return zk.Blocks((n, torch.randn(s, generator=generator).to(dtype)) for n, s in NAMED.items())


def ops():
    """What every op over blocks writes and returns."""
    made, scale = blocks(), torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    rounding = {"decay": torch.tensor(0.9), "rounding_seed": SEEDS[2]}
    limit = zk.below(torch.tensor([0.5, 0.1, 2.0, 1.0]))
    stats = [zk.update_(made, SEEDS[:2], COEFS[:2], scale, stats=True, form=limit, **rounding), zk.block_stats(made)]
    dots, own = zk.dot_noise(made, SEEDS[:2], stats=True)
    states = [[torch.zeros_like(t, dtype=torch.float32) for t in made.tensors]]
    numbers, weights = torch.tensor([0.1, 0.9]), zk.weighted([t.float().abs() + 1 for t in made.tensors])
    step = {"numbers": numbers, "form": weights, **rounding}
    zk.update_state_(made, "momentum", states, SEEDS[:1], COEFS[:1], scale[0], **step)
    zk.replay_(made, SEEDS[:2], COEFS[:2], scale, passes=[1, 1], decays=torch.tensor([0.9, 0.8]),
               rounding_seeds=SEEDS[:2])  # fmt: skip
    return [*made.tensors, *states[0], dots, *stats[0], *stats[1], *own]


def test_ops_over_parts_are_ops_over_the_list(apart, monkeypatch):
    parts = zk.parts_of(blocks())
    assert [part.blocks.names for part in parts] == [["a", "c"], ["b", "d"]]
    over_parts = ops()
    monkeypatch.undo()
    assert not zk.parts_of(blocks())
    for ours, theirs in zip(over_parts, ops(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_moved_tensor_is_sorted_again(apart):
    made = blocks()
    assert len(zk.parts_of(made)) == 2
    made.tensors[1] = made.tensors[1].view(1, 11).clone()
    made.refresh()
    assert [part.blocks.names for part in zk.parts_of(made)] == [["a", "b", "c"], ["d"]]


@pytest.mark.parametrize("name, dtype", [("mezo", "float32"), ("zo-adam", "bfloat16"), ("zo-finetuner", "bfloat16")])
def test_steps_of_a_model_in_parts(apart, monkeypatch, name, dtype):
    def steps():
        model, ids = tiny("llama-tied", getattr(torch, dtype)), tokens()
        engine = Engine(model, make_method(name, model), eps=1e-2, weight_decay=0.1)
        for _ in range(2):
            engine.step(lambda: model(input_ids=ids, labels=ids).loss, 1e-3)
        return list(model.parameters())

    in_parts = steps()
    monkeypatch.undo()
    for ours, theirs in zip(in_parts, steps(), strict=True):
        assert torch.equal(ours, theirs)


def test_low_rank_directions_are_of_one_device(apart):
    model = tiny("llama-tied")
    with pytest.raises(InputError, match="several devices"):
        Engine(model, make_method("lozo", model))
