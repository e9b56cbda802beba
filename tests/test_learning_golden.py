"""The published trainer's learning-to-learn trace: fed the trace's z, the paper recipe ends at the trace's networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import zo_kernels.backends.reference as reference
from zo_finetuner.history import History
from zo_finetuner.learning.paper import PaperRecipe
from zo_finetuner.learning.streaming import Weights
from zo_finetuner.learning.trajectory import SGDTrajectory
from zo_finetuner.pertnn import PertNN, budget
from zo_kernels import use_backend

HALF_ULP = 2.0**-24  # relative, of fp32
PARTS = {"w1": "0.weight", "b1": "0.bias", "w2": "2.weight", "b2": "2.bias"}


class Trace:
    def __init__(self, path):
        self.data = np.load(path, allow_pickle=False)
        self.meta = json.loads(str(self.data["meta"]))
        self.names = [str(n) for n in self.data["names"]]

    def tensor(self, key):
        return torch.from_numpy(np.asarray(self.data[key], dtype=np.float32))

    def number(self, key):
        return float(self.data[key])

    def model(self):
        settings = {k: v for k, v in self.meta["config"].items() if k != "transformers_version"}
        config = transformers.AutoConfig.for_model(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        assert [n for n, _ in model.named_parameters()] == self.names
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self.tensor(f"theta0/{name}"))
        return model

    def nets(self, at="net0"):
        w1, b1, w2, b2 = (torch.stack([self.tensor(f"{at}/{n}/{part}") for n in self.names]) for part in PARTS.values())
        return PertNN(self.names, w1, b1, w2[:, 0], b2[:, 0])


@pytest.fixture
def trace(shared):
    return Trace(shared / "golden" / "l2l_trace_llama.npz")


@pytest.mark.parametrize("keep_gradients", [True, False])
def test_the_paper_recipe_reproduces_the_published_trace(trace, monkeypatch, keep_gradients):
    """Error budgets. A loss of 4.15 has half ulps of 2.4e-7; it is a sum of 44 logarithms behind some hundred fp32
    operations, and differs by two of them at most (measured: 2 at step 0, 0 later; allowed: 4). s_g is a difference of
    two losses over 2 eps and moves by 2 * 9.6e-7 / 2e-3 = 9.6e-4. The gradient of phi is proportional to s_g, the
    networks move by lr_mlp times it, and everything else is met to a few half ulps."""
    meta, model, nets = trace.meta, trace.model(), trace.nets()
    weights = Weights(model)
    share = budget(trace.names, weights.blocks.numels, hidden_size=meta["config"]["hidden_size"],
                   batch_size=meta["batch_size"])
    trajectory = SGDTrajectory(weights, momentum=meta["momentum"], max_norm=meta["max_grad_norm"],
                               keep_gradients=keep_gradients)
    recipe = PaperRecipe(weights, nets, share, trajectory, lr_mlp=meta["lr_mlp"], lr_update=meta["lr_update"],
                         lr_llm=meta["lr_llm"], eps=meta["eps"])
    history = History.start(len(trace.names))
    name_of = dict(zip(weights.blocks.ids, trace.names, strict=True))
    step, largest = 0, []

    def recorded(elements, seed, tensor_id, dist):
        z = trace.tensor(f"{step}/z/{name_of[tensor_id]}").flatten()
        return z[elements.flatten()].view(elements.shape)

    monkeypatch.setattr(reference, "directions", recorded)
    with use_backend("reference"):
        for step in range(meta["steps"]):
            ids = torch.from_numpy(trace.data[f"{step}/input_ids"])

            def loss_fn(ids=ids):
                return model(input_ids=ids, labels=ids).loss

            seen = recipe.meta_step(loss_fn, history, seed=0)
            sigma = trace.tensor(f"{step}/sigma")
            gradient = torch.cat([trace.tensor(f"{step}/grad_net/{n}/2.bias") for n in trace.names])
            losses = [trace.number(f"{step}/loss_plus"), trace.number(f"{step}/loss_minus")]
            drift = 9.6e-4 / abs((losses[0] - losses[1]) / (2 * meta["eps"]))  # relative, of s_g
            # A sum of 65 terms: two half ulps of the sum of their sizes, which is below 4 (tests/test_pertnn.py).
            assert (history.sigma - sigma).abs().max() <= 2 * HALF_ULP * 4
            assert float(seen.norm) == pytest.approx(trace.number(f"{step}/norm_factor"), rel=1e-6)
            assert seen.losses.tolist() == pytest.approx(losses, abs=9.6e-7)
            assert float(seen.meta_loss) == pytest.approx(trace.number(f"{step}/meta_loss"), abs=9.6e-7)
            # <gradient, z> of up to 1,024 products in fp32: 1e-6 of the largest.
            assert (nets.b2.grad - gradient).abs().max() <= (drift + 1e-6) * gradient.abs().max()
            largest.append(float(gradient.abs().max()) * drift)
            recipe.update()
            trajectory.step(loss_fn, meta["lr_llm"], seed=0)
    end, start = trace.nets("net_end"), trace.nets()
    for label in PARTS:
        reached, expected = getattr(nets, label), getattr(end, label)
        # Inputs of the networks, losses of 4.15, multiply the gradient of w1.
        rounding = 2 * HALF_ULP * float(expected.detach().abs().max()) * meta["steps"]
        budgeted = 4.15 * meta["lr_mlp"] * sum(largest) + rounding
        assert (reached - expected).abs().max() <= budgeted
        assert (expected - getattr(start, label)).abs().max() > 30 * HALF_ULP, "the trace moves its networks"
    for name, parameter in model.named_parameters():
        # Per step: six passes of a perturbation and its way back, and an update; numbers below 1.25.
        assert (parameter - trace.tensor(f"theta_end/{name}")).abs().max() <= 7 * 3 * HALF_ULP * 1.25, name
