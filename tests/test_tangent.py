"""Exact derivatives along a direction against autograd's, and a model that is left as it was."""

from __future__ import annotations

import pytest
import torch
from models import tiny, tokens
from references import ANSWERS, SINGLE, make

from zo_finetuner.encoding import collate
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import Direction
from zo_finetuner.params import trainable_blocks
from zo_finetuner.tangent import directional_derivative
from zo_kernels import below, draw_noise, seed_tensor


def expected(model, blocks, loss, scale, form=None):
    grads = torch.autograd.grad(loss(), [model.get_parameter(name) for name in blocks.names])
    total = 0.0
    for b, grad in enumerate(grads):
        z = draw_noise(tuple(grad.shape), seed_tensor(4), blocks.ids[b]) * scale[b]
        if form is not None:
            z = z * (blocks.tensors[b].abs() <= form.value[b])
        total += (grad.double() * z.double()).sum().item()
    return total


@pytest.mark.parametrize("name", ["llama-tied", "opt", "gpt2", "gemma2"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_derivative_is_autograds(name, masked):
    model, ids = tiny(name), tokens()
    next(iter(model.parameters())).requires_grad_(False)
    blocks = trainable_blocks(model)
    scale = torch.linspace(0.5, 1.5, len(blocks))
    form = below(torch.full((len(blocks),), 0.02)) if masked else None

    def loss():
        return model(input_ids=ids, labels=ids).loss

    places = [(module, [(n, id(p)) for n, p in module._parameters.items()]) for module in model.modules()]
    with torch.no_grad():
        got = directional_derivative(model, blocks, Direction(seed_tensor(4), scale, form=form), loss)
    assert got[0].item() == pytest.approx(loss().item(), abs=2e-6)
    assert got[1].item() == pytest.approx(expected(model, blocks, loss, scale, form), rel=1e-4, abs=1e-4)
    assert places == [(module, [(n, id(p)) for n, p in module._parameters.items()]) for module in model.modules()]


@pytest.mark.parametrize("rows", [SINGLE, ANSWERS], ids=["one pass for all candidates", "answers"])
def test_the_trainings_own_loss_has_a_derivative(rows):
    model = make("Llama")
    blocks = trainable_blocks(model)
    batch = collate(rows, pad_id=0, packed=True)

    def loss():
        total, weight = training_loss(model, batch)
        return total / weight

    with torch.no_grad():
        got = directional_derivative(model, blocks, Direction(seed_tensor(4)), loss)
    ones = torch.ones(len(blocks))
    assert got[1].item() == pytest.approx(expected(model, blocks, loss, ones), rel=1e-3)


def test_a_loss_without_a_derivative_is_told_and_the_model_left_whole():
    model, ids = tiny("llama"), tokens()
    blocks, own = trainable_blocks(model), list(model.named_parameters())
    direction = Direction(seed_tensor(1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="no derivative along the weights"):
        directional_derivative(model, blocks, direction, lambda: model(input_ids=ids, labels=ids).loss.detach())
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        directional_derivative(model, blocks, direction, lambda: 1 / 0)
    after = list(model.named_parameters())
    assert [(name, id(p)) for name, p in own] == [(name, id(p)) for name, p in after]
