"""Side products: the losses of weights moved along low-rank directions, from weights that nothing writes."""

from __future__ import annotations

import dense_low_rank as dense
import pytest
import torch
from models import BUILDERS, tiny, tokens
from references import ANSWERS, SINGLE
from test_probing import Nested, Outer, ReadsChild, assert_untouched, forward_loss, pointers, snapshot
from test_slices import ROWS, model_of
from torch import nn

from zo_finetuner import slices
from zo_finetuner.coverage import UncoveredWeightError
from zo_finetuner.encoding import collate
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.lowrank import LowRankProbing
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method
from zo_finetuner.optim.base import Direction, Probe
from zo_finetuner.params import trainable_blocks
from zo_finetuner.rows import head_rows
from zo_finetuner.slices import slicing
from zo_finetuner.subspace import Layout, Subspace
from zo_kernels import seed_tensor

RANK, SEED, SPACE, C = 2, 2**63 + 5, 11, 1e-2


def direction(blocks, two_sided=False, seed=SEED, subspace=SPACE, scale=None, limit=RANK) -> Direction:
    layout = Layout(blocks, RANK, two_sided=two_sided, limit=limit)
    return Direction(seed_tensor(seed), scale, subspace=Subspace(layout, seed_tensor(subspace)))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()


def logits_at(probing: LowRankProbing, d: Direction, ids: torch.Tensor, coef: float = C) -> torch.Tensor:
    with probing.at(Probe(d, torch.tensor(coef))):
        return logits(probing.model, ids)


def loss_at(probing: LowRankProbing, d: Direction, ids: torch.Tensor, coef: float = C) -> torch.Tensor:
    with probing.at(Probe(d, torch.tensor(coef))):
        return forward_loss(probing.model, ids)


@pytest.mark.parametrize("kind", ["lozo", "subzero"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_side_product_gives_the_loss_of_moved_weights(name, kind):
    model, ids = tiny(name), tokens()
    blocks = trainable_blocks(model)
    before, storages, still = snapshot(model), pointers(model), logits(model, ids)
    scale = torch.linspace(0.2, 2.0, len(blocks))
    d = direction(blocks, kind == "subzero", scale=scale)
    beside = logits_at(LowRankProbing(model, blocks), d, ids)
    assert_untouched(model, before, storages)
    moves = dense.direction(blocks, SEED, SPACE, RANK, kind)
    at = zip(dense.weights(blocks), moves, scale.tolist(), strict=True)
    dense.put(blocks, [theta + C * s * move for theta, move, s in at])
    error = (beside - logits(model, ids)).norm() / beside.norm()
    assert error < 5e-6 and (beside - still).norm() / beside.norm() > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_the_loss_of_the_dense_form(name, dtype):
    """In bf16 every activation and every copied weight is rounded to 2^-9 of itself: the logits, behind some ten
    layers, have errors of 1 to 2 % in either form, and the probe moves them by many times that."""
    model, ids = tiny(name, dtype), tokens()
    blocks = trainable_blocks(model)
    d, still = direction(blocks), logits(model, ids)
    copied, beside = LowRankProbing(model, blocks, copied=True), LowRankProbing(model, blocks)
    assert len(beside._sides) > 5 and not copied._sides
    found = logits_at(beside, d, ids)
    error = (found - logits_at(copied, d, ids)).norm() / found.norm()
    assert error < (5e-6 if dtype == torch.float32 else 0.02)
    assert (found - still).norm() / found.norm() > 8 * error
    assert abs(loss_at(beside, d, ids) - loss_at(copied, d, ids)) < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("head", ["candidates", "slices"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2", "OPT", "GPT2", "Phi"])
def test_packed_rows_and_some_rows_of_the_head(name, head, monkeypatch):
    """Only those rows of the head are computed, and only they move."""
    monkeypatch.setattr(slices, "slice_rows", lambda model, head: ROWS)
    model = model_of(name)
    batch = collate(SINGLE if head == "candidates" else ANSWERS, 0, packed=True)
    assert ("candidates" in batch) == (head == "candidates") and slicing(model).rows == ROWS
    blocks = trainable_blocks(model)
    d = direction(blocks)

    @torch.no_grad()
    def loss():
        total, weight = training_loss(model, batch)
        return total / weight

    still = loss()
    with LowRankProbing(model, blocks).at(Probe(d, torch.tensor(C))):
        beside = loss()
    moves = dense.direction(blocks, SEED, SPACE, RANK)
    dense.put(blocks, [theta + C * move for theta, move in zip(dense.weights(blocks), moves, strict=True)])
    assert abs(beside - loss()) < 2e-5
    assert abs(beside - still) > 2e-3


def test_a_head_with_a_bias():
    model = tiny("llama")
    model.lm_head = nn.Linear(32, 97)
    blocks, ids, rows = trainable_blocks(model), tokens(), torch.tensor([5, 90, 7])
    d = direction(blocks)

    found = []
    for is_copied in (False, True):
        with LowRankProbing(model, blocks, is_copied).at(Probe(d, torch.tensor(C))):
            with torch.no_grad(), head_rows(model, rows):
                found.append(logits(model, ids))
    beside, copied = found
    assert beside.shape[-1] == 3 and torch.allclose(beside, copied, atol=1e-5)


def test_under_autocast_the_product_has_the_dtype_of_the_output():
    model, ids = tiny("llama-tied"), tokens()
    blocks = trainable_blocks(model)
    probing, d = LowRankProbing(model, blocks), direction(blocks)
    exact = loss_at(probing, d, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(loss_at(probing, d, ids) - exact) < 5e-3


def test_frozen_tensors_change_nobodys_factors():
    found = []
    for freeze in (False, True):
        model, seen = tiny("llama"), []
        model.model.layers[0].self_attn.k_proj.weight.requires_grad_(not freeze)
        blocks = trainable_blocks(model)
        with LowRankProbing(model, blocks).at(Probe(direction(blocks), torch.tensor(C))):
            first = model.model.layers[0].self_attn
            for module in (first.q_proj, first.k_proj):  # after the hook of the side product
                module.register_forward_hook(lambda m, args, output, seen=seen: seen.append(output))
            forward_loss(model, tokens())
        found.append(seen)
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])


def test_inputs_by_keyword_and_in_inference_mode():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 4)

        def forward(self, ids):
            return self.out(input=self.embed(input=ids))

    model, ids = Model(), torch.tensor([[1, 2, 8]])
    blocks = trainable_blocks(model)
    d = direction(blocks)
    found = []
    for copied in (False, True):
        with torch.inference_mode(), LowRankProbing(model, blocks, copied).at(Probe(d, torch.tensor(C))):
            found.append(model(ids))
    assert torch.allclose(*found, atol=1e-6)


def test_a_matrix_of_an_unknown_module_is_copied():
    model, x = Nested(), torch.ones(2, 8)
    blocks = trainable_blocks(model)
    d = direction(blocks)
    probing = LowRankProbing(model, blocks)
    assert list(probing._sides) == [model.inner]
    with torch.no_grad(), probing.at(Probe(d, torch.tensor(C))):
        beside = model(x)
    moves = dense.direction(blocks, SEED, SPACE, RANK)
    dense.put(blocks, [theta + C * move for theta, move in zip(dense.weights(blocks), moves, strict=True)])
    assert torch.allclose(beside, model(x), atol=1e-5)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "model.layers.1.mlp", "lm_head"])
def test_an_exception_in_a_probe_leaves_the_weights_and_no_hook(place, exception):
    model, ids = tiny("llama-tied", torch.bfloat16), tokens()
    blocks = trainable_blocks(model)
    before, storages = snapshot(model), pointers(model)
    probing = LowRankProbing(model, blocks)

    def fail(module, args):
        raise exception("stop")

    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(exception):
        loss_at(probing, direction(blocks), ids)
    handle.remove()
    loss_at(probing, direction(blocks), ids)
    assert_untouched(model, before, storages)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_weight_read_outside_its_module_is_an_error_naming_both():
    model = Outer(ReadsChild())
    engine = Engine(model, make_method("lozo", model))
    with pytest.raises(UncoveredWeightError, match=r"inner\.child\.weight is read by .* in inner,"):
        engine.step(lambda: model(torch.ones(2, 8)).sum(), 1e-3)


def test_the_first_step_reports_a_share_of_one_for_matrices():
    model, ids = tiny("llama", torch.bfloat16), tokens()
    engine = Engine(model, make_method("lozo", model), eps=1e-2)
    engine.step(lambda: forward_loss(model, ids), 1e-4)
    share = dict(zip(engine.blocks.names, engine.realised_share.tolist(), strict=True))
    assert share["model.embed_tokens.weight"] == 1 and 0.5 < share["model.norm.weight"] < 1.5


@pytest.mark.parametrize("mode", ["scratch", "paired", "inplace"])
def test_another_probing_is_refused(mode):
    model = tiny("llama")
    with pytest.raises(InputError, match=f"lozo probes by side products of the forward, not {mode}"):
        Engine(model, make_method("lozo", model), probing=mode)
