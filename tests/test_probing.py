"""Probing through a scratch: the loss of the perturbed weights, and weights that nothing ever writes."""

from __future__ import annotations

import math

import pytest
import torch
from models import BUILDERS, tiny, tokens
from torch import nn

from zo_finetuner.coverage import UncoveredWeightError
from zo_finetuner.engine import Engine
from zo_finetuner.inplace import InPlaceProbing
from zo_finetuner.optim import MeZO
from zo_finetuner.optim.base import Direction, Probe
from zo_finetuner.params import trainable_blocks
from zo_finetuner.probing import make_probing
from zo_finetuner.scratch import ScratchProbing
from zo_kernels import derive_seed, perturb_, seed_tensor, ulp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor], storages: dict[str, int]) -> None:
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.data_ptr() == storages[name], f"{name} is not on its own storage"


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def probe(coef: float, seed: int = 7, scale: torch.Tensor | None = None) -> Probe:
    return Probe(Direction(seed_tensor(seed), scale), torch.tensor(coef))


@torch.no_grad()
def forward_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss.float()


@pytest.mark.parametrize("name", BUILDERS)
def test_scratch_loss_is_the_loss_of_perturbed_weights(name):
    model, ids = tiny(name), tokens()
    blocks = trainable_blocks(model)
    scale = torch.linspace(0.2, 2.0, len(blocks))
    p = probe(1e-2, scale=scale)
    with ScratchProbing(model, blocks).at(p):
        through_scratch = forward_loss(model, ids)
    perturb_(blocks, seed_tensor(7), p.coef, scale)
    # Same weights to the bit, so the same loss to the bit: every operator sees equal operands.
    assert torch.equal(through_scratch, forward_loss(model, ids))
    assert abs(through_scratch - forward_loss(tiny(name), ids)) > 1e-5  # the probe did something


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_scratch_never_writes_the_weights(name, dtype):
    model, ids = tiny(name, dtype), tokens()
    before, storages = snapshot(model), pointers(model)
    probing = ScratchProbing(model, trainable_blocks(model))
    for k in range(4):
        with probing.at(probe((-1) ** k * 1e-2, seed=derive_seed(0, 0, k))):
            forward_loss(model, ids)
    assert_untouched(model, before, storages)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "model.layers.1.mlp", "lm_head"])
def test_an_exception_in_a_probe_leaves_the_weights(place, exception):
    model, ids = tiny("llama-tied", torch.bfloat16), tokens()
    before, storages = snapshot(model), pointers(model)
    probing = ScratchProbing(model, trainable_blocks(model))

    def fail(module, args):
        raise exception("stop")

    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(exception), probing.at(probe(1e-2)):
        forward_loss(model, ids)
    assert_untouched(model, before, storages)
    handle.remove()
    with probing.at(probe(1e-2)):  # and the next probe works
        forward_loss(model, ids)
    assert_untouched(model, before, storages)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_exception_inside_the_scratch_kernel_leaves_the_weights(monkeypatch):
    model, ids = tiny("llama", torch.bfloat16), tokens()
    before, storages = snapshot(model), pointers(model)
    probing = ScratchProbing(model, trainable_blocks(model))
    import zo_finetuner.scratch as module

    calls, real = [], module.scratch

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "scratch", failing)
    with pytest.raises(MemoryError), probing.at(probe(1e-2)):
        forward_loss(model, ids)
    assert_untouched(model, before, storages)


def test_in_place_probe_is_undone_after_an_exception():
    model, ids = tiny("llama"), tokens()
    before = snapshot(model)
    engine = Engine(model, MeZO(), eps=1e-3, probing="inplace")
    calls = []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward_loss(model, ids)

    with pytest.raises(KeyboardInterrupt):
        engine.step(loss, 1e-3)
    for name, p in model.named_parameters():
        # three roundings to nearest (+eps, -2 eps, +eps) of numbers below 2, whose half ulp is 2^-24
        assert (p - before[name]).abs().max() <= 3 * 2**-24, name


def test_frozen_tensors_stay_and_change_nobodys_noise():
    ids = tokens()
    whole, part = tiny("llama"), tiny("llama")
    frozen = "model.layers.0.self_attn.q_proj.weight"
    part.get_parameter(frozen).requires_grad_(False)
    for model in (whole, part):
        Engine(model, MeZO(), probing="inplace").step(lambda: torch.tensor(0.0), 1.0)
        blocks = trainable_blocks(model)
        perturb_(blocks, seed_tensor(3), torch.tensor(0.1))
    fresh = snapshot(tiny("llama"))
    assert torch.equal(part.get_parameter(frozen), fresh[frozen])
    for name, p in part.named_parameters():
        if name != frozen:
            assert torch.equal(p, whole.get_parameter(name)), name
    with ScratchProbing(part, trainable_blocks(part)).at(probe(1e-2)):
        forward_loss(part, ids)


def test_embedding_rows_equal_the_whole_embedding(monkeypatch):
    model, ids = tiny("llama-tied", torch.bfloat16), tokens()
    probing = ScratchProbing(model, trainable_blocks(model))
    with probing.at(probe(1e-2)):
        by_rows = forward_loss(model, ids)
    import zo_finetuner.scratch as module

    monkeypatch.setattr(module, "rows_in_use", lambda *a: (None, None))
    with probing.at(probe(1e-2)):
        whole = forward_loss(model, ids)
    assert torch.equal(by_rows, whole)


def test_scratch_is_one_layer_not_the_model():
    model, ids = tiny("llama"), tokens()
    probing = ScratchProbing(model, trainable_blocks(model))
    with probing.at(probe(1e-2)):
        forward_loss(model, ids)
    held = sum(b.numel() for stack in probing._stacks.values() for b in stack._buffers)
    assert held == max(p.numel() * 4 for p in model.parameters())


class Nested(nn.Module):
    """Calls its children while its own parameter is in use, and reads it again afterwards."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x @ self.weight) @ self.weight


def test_a_module_keeps_its_scratch_while_children_run():
    model, x = Nested(), torch.ones(2, 8)
    blocks = trainable_blocks(model)
    with torch.no_grad(), ScratchProbing(model, blocks).at(probe(0.1)):
        through_scratch = model(x)
    perturb_(blocks, seed_tensor(7), torch.tensor(0.1))
    assert torch.equal(through_scratch, model(x))


def test_gradients_under_a_swap_are_an_error():
    model, ids = tiny("llama"), tokens()
    probing = ScratchProbing(model, trainable_blocks(model))
    before, storages = snapshot(model), pointers(model)
    with pytest.raises(RuntimeError, match="gradients are enabled"), probing.at(probe(1e-2)):
        model(input_ids=ids, labels=ids)
    assert_untouched(model, before, storages)


class ReadsChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return nn.functional.linear(x, self.child.weight)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), inner

    def forward(self, x):
        return self.inner(self.first(x))


def test_a_weight_read_outside_its_module_is_an_error_naming_both():
    model = Outer(ReadsChild())
    before, storages = snapshot(model), pointers(model)
    engine = Engine(model, MeZO(), probing="scratch")
    with pytest.raises(UncoveredWeightError, match=r"inner\.child\.weight is read by .* in inner,"):
        engine.step(lambda: model(torch.ones(2, 8)).sum(), 1e-3)
    assert_untouched(model, before, storages)


def test_torch_multihead_attention_is_caught():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = Attention()
    with pytest.raises(UncoveredWeightError, match="out_proj"):
        Engine(model, MeZO(), probing="scratch").step(lambda: model(torch.ones(3, 1, 8)).sum(), 1e-3)


def test_a_frozen_weight_may_be_read_from_anywhere():
    model = Outer(ReadsChild())
    model.inner.child.weight.requires_grad_(False)
    Engine(model, MeZO(), probing="scratch").step(lambda: model(torch.ones(2, 8)).sum(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.02, 1.0, 2.0])
@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_the_perturbation_is_really_made(dtype, size, eps):
    """<d, z>/<z, z> of the rounded perturbation d, per block: .98 to 1.02.

    Stochastic rounding of a step c on a lattice of spacing u has variance u |c z|, so one probe of 2^20 elements has
    standard error sqrt(1.6 u / c) / 2^10; enough probes are averaged to bring it to .004 (5 of them fit in .02)."""
    model = nn.Module()
    flat = torch.full((1 << 20,), size) if size >= 1 else torch.randn(1 << 20) * size
    model.weight = nn.Parameter(flat.to(dtype))
    blocks = trainable_blocks(model)
    probing = ScratchProbing(model, blocks)
    spacing = ulp(torch.tensor(size), dtype).item()
    probes = math.ceil(1.6 * spacing / eps / 2**20 / 0.004**2)
    shares = torch.stack([probing.realised_share(probe(eps, seed=k)) for k in range(probes)]).mean(0)
    assert ((shares > 0.98) & (shares < 1.02)).all(), shares


def test_first_probe_reports_the_realised_share():
    model, ids = tiny("llama", torch.bfloat16), tokens()
    engine = Engine(model, MeZO(), eps=1e-2)
    engine.step(lambda: forward_loss(model, ids), 1e-4)
    share = dict(zip(engine.blocks.names, engine.realised_share.tolist(), strict=True))
    assert 0.98 < share["model.embed_tokens.weight"] < 1.02
    assert len(share) == len(list(model.parameters()))


def test_rounding_thresholds_follow_weights_that_grow():
    """LoRA's B starts at zero, where rounding to nearest is right; at 1.0 a step of 1e-3 needs stochastic rounding."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1 << 18, dtype=torch.bfloat16))
    model.forward = lambda: torch.tensor(1.0)
    engine = Engine(model, MeZO(), eps=1e-3)
    engine.step(lambda: 1.0, 1e-3)
    model.weight.data.fill_(1.0)
    engine.step(lambda: 1.0, 1e-3)
    assert 0.9 < engine.probing.realised_share(probe(1e-3)).item() < 1.1


def test_auto_picks_by_dtype():
    for dtype, kind in ((torch.float32, InPlaceProbing), (torch.bfloat16, ScratchProbing)):
        model = tiny("llama", dtype)
        assert isinstance(make_probing("auto", model, trainable_blocks(model)), kind)
    with pytest.raises(ValueError, match="auto, scratch, paired, inplace"):
        make_probing("scrath", model, trainable_blocks(model))
