"""The published trainer's own traces: the engine, fed the trace's z, ends at the trace's weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import zo_kernels.backends.reference as reference
from zo_finetuner.engine import Engine
from zo_finetuner.optim import Learned, ZOFineTuner
from zo_finetuner.pertnn import PertNN, budget
from zo_kernels import use_backend


def trace(shared, name):
    data = np.load(shared / "golden" / f"{name}.npz", allow_pickle=False)
    return data, json.loads(str(data["meta"]))


def model_of(data, meta):
    settings = {k: v for k, v in meta["config"].items() if k != "transformers_version"}
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    names = [str(n) for n in data["names"]]
    assert [n for n, _ in model.named_parameters()] == names
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.from_numpy(data[f"theta0/{name}"]))
    return model, names


def nets_of(data, names):
    def stack(key):
        return torch.stack([torch.from_numpy(data[f"net/{n}/{key}"]) for n in names])

    return PertNN(names, stack("0.weight"), stack("0.bias"), stack("2.weight")[:, 0], stack("2.bias")[:, 0])


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
@pytest.mark.parametrize("name", ["zo_finetuner_trace_llama_normalized", "zo_finetuner_trace_opt_unnormalized"])
def test_deployment_reproduces_the_published_trace(shared, monkeypatch, name, mode):
    data, meta = trace(shared, name)
    model, names = model_of(data, meta)
    numels = [p.numel() for p in model.parameters()]
    c = budget(names, numels, hidden_size=meta["config"]["hidden_size"], batch_size=meta["batch_size"])
    if not meta["normalize"]:
        c = None
    method = ZOFineTuner(scales=Learned(nets_of(data, names), c, exact_scales=True))
    engine = Engine(model, method, eps=meta["eps"], probing=mode)
    name_of = dict(zip(engine.blocks.ids, names, strict=True))
    step = 0

    def recorded(elements, seed, tensor_id, dist):
        z = torch.from_numpy(data[f"{step}/z/{name_of[tensor_id]}"]).flatten()
        return z[elements.flatten()].view(elements.shape)

    monkeypatch.setattr(reference, "directions", recorded)
    with use_backend("reference"):
        for step in range(meta["steps"]):
            ids = torch.from_numpy(data[f"{step}/input_ids"])
            engine.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss.detach(), meta["lr"])
            sigma = torch.from_numpy(data[f"{step}/sigma"])
            # 64 products of fp32 in another order: a few ulp of sums of order 1
            assert torch.allclose(method.sigma.double(), sigma.double(), rtol=2e-6, atol=2e-7), step
            assert method.metrics["norm_factor"].item() == pytest.approx(data[f"{step}/norm_factor"].item(), rel=2e-6)
            losses = [data[f"{step}/loss_plus"].item(), data[f"{step}/loss_minus"].item()]
            assert method.losses.tolist() == pytest.approx(losses, abs=3e-6), step
    for name_, parameter in model.named_parameters():
        end = torch.from_numpy(data[f"theta_end/{name_}"])
        moved = (end - torch.from_numpy(data[f"theta0/{name_}"])).abs().max()
        difference = (parameter - end).abs().max()
        # Loss differences of 1 ulp (4.8e-7) move g by 2.4e-4 of |g| ~ 1 at eps 1e-3; the rest is 4 steps of
        # three fp32 roundings, of numbers below 2 (norm weights) or 0.25 (matrices).
        assert difference <= 12 * 2**-24 * end.abs().max().clamp(min=0.25) + 2e-3 * moved, (name_, difference, moved)
