"""Captured steps against eager ones, bit for bit, on an emulation of CUDA graphs; what drops or refuses a capture."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from emulated_graphs import EmulatedCapturer
from models import VOCAB, tiny

import zo_kernels as zk
from zo_finetuner import calls
from zo_finetuner.engine import Engine
from zo_finetuner.graphs import GraphedSteps
from zo_finetuner.masks import positions_as_given
from zo_finetuner.optim import MeZO, make_method
from zo_finetuner.params import trainable_blocks
from zo_finetuner.scale_net import ScaleNet

SHAPES = [(2, 5), (3, 4)]


def quick_words(seed, counters):
    """Instead of Philox, whose 200 operators a block would be most of what is noted and replayed."""
    c0, c1, c2, c3 = counters
    mixed = (c0 * 2654435761 + c2 * 40503 + c3 * 977 + c1 + seed % 1000003) % 4294967291
    return torch.stack([(mixed * odd + 12345) & 0xFFFFFFFF for odd in (1, 69069, 1103515245, 134775813)], dim=-1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Torch's operators only, and no tensor is looked at because it lies in the host's memory."""
    monkeypatch.setattr(calls, "COMPARED_AT_ONCE", ())
    monkeypatch.setattr(zk.noise, "philox", quick_words)
    with zk.use_backend("reference"):
        yield


def batches(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, SHAPES[i % 2], generator=generator)
        made.append({"input_ids": ids, "labels": ids.clone(), "weight": torch.ones(())})
    return made


class Run:
    """An engine on a small model, with or without graphs."""

    def __init__(self, method="mezo", probing="scratch", dtype=torch.float32, graphed=True, weight_decay=0.0):
        self.model = tiny("llama-tied", dtype)
        del self.model.model.layers[1:]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.endswith(("embed_tokens.weight", "v_proj.weight", "input_layernorm.weight")))
        if method == "closed-form":
            blocks = trainable_blocks(self.model)
            sigma = torch.linspace(0.5, 2, len(blocks))
            nets = ScaleNet.fixed(blocks.names, blocks.numels, sigma, source="a test")
            method = make_method(method, self.model, pertnn=nets)
        elif isinstance(method, str):
            method = make_method(method, self.model)
        self.engine = Engine(self.model, method, eps=1e-2, seed=5, probing=probing, weight_decay=weight_decay)
        self.graphs = GraphedSteps(self.engine, EmulatedCapturer()) if graphed else None
        self.losses = []

    def loss_of(self, inputs):
        ids, labels = inputs["input_ids"], inputs["labels"]
        with positions_as_given():
            return self.model(input_ids=ids, labels=labels, use_cache=False).loss * inputs["weight"]

    def step(self, inputs, lr=1e-2):
        step = self.engine.step_on if self.graphs is None else self.graphs.step
        self.losses.append(step(self.loss_of, inputs, lr))

    def weights(self):
        return torch.cat([p.detach().flatten().float() for p in self.model.parameters()])


def same(a: Run, b: Run) -> None:
    assert torch.equal(torch.stack(a.losses).nan_to_num(-1), torch.stack(b.losses).nan_to_num(-1))
    assert torch.equal(a.weights(), b.weights())
    left, right = a.engine.state_dict(), b.engine.state_dict()
    for name, value in left["method_state"].items():
        assert torch.equal(value, right["method_state"][name]), name
    for name in ("skipped", "last_loss", "step"):
        assert left[name] == right[name]
    for name, value in a.engine.metrics().items():
        assert value == b.engine.metrics()[name], name


CASES = [
    ("mezo", "scratch", torch.float32, 0.0),
    ("mezo", "scratch", torch.bfloat16, 0.1),
    ("mezo", "inplace", torch.float32, 0.1),
    ("mezo", "paired", torch.bfloat16, 0.0),
    ("zo-finetuner", "scratch", torch.bfloat16, 0.0),
    ("zo-finetuner", "inplace", torch.float32, 0.0),
    ("zo-finetuner", "paired", torch.float32, 0.0),
    ("sigma-one", "scratch", torch.float32, 0.0),
    ("closed-form", "paired", torch.bfloat16, 0.1),
]


@pytest.mark.parametrize(("method", "probing", "dtype", "decay"), CASES, ids=str)
def test_replays_have_the_bits_of_eager_steps(method, probing, dtype, decay):
    """Eight steps on two buckets in turn, the rate changing, one loss that is not finite, weights read in between."""
    eager = Run(method, probing, dtype, graphed=False, weight_decay=decay)
    graphed = Run(method, probing, dtype, weight_decay=decay)
    for i, inputs in enumerate(batches(8)):
        if i == 6:
            inputs["weight"].fill_(math.nan)
        for run in (eager, graphed):
            run.step(inputs, lr=1e-2 / (1 + i))
        if i in (2, 5, 6, 7):
            same(eager, graphed)
    assert not graphed.graphs.reason
    assert graphed.graphs.captures == 2 and graphed.graphs.replays >= 3
    assert int(eager.engine.skipped) == 1
