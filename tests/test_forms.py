"""Forms of a direction and scratches of several directions, against their definitions, on every CPU backend.

`moved()` states a sum of directions with z materialised (the backend's own, so that bits must agree), `rounding.fma`
and fp32 operations of numpy."""

from __future__ import annotations

import numpy
import pytest
import torch
from test_ops import COEFS, DISTS, DTYPES, ROUNDING_SEED, SEEDS, assert_same_bits, bits, clones, weights

import zo_kernels as zk
from zo_kernels import noise as contract
from zo_kernels.rounding import fma, round_stochastic

FORMS = ("plain", "weighted", "below", "shifted", "shifted bf16")
C, LIMIT = torch.tensor(-0.03), torch.tensor(0.015)
SCALES = torch.tensor([0.5, 2.0, 1.0])
ABOVE = (COEFS[0] * SCALES[0]).abs()


def companions(name: str, theta: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """h or mu of a tensor: values over many binades; bf16 for the mean that says so."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(theta.shape, generator=generator).square().square() * 16 + 2.0**-12
    if name == "weighted":
        return spread
    mean = spread * (torch.rand(theta.shape, generator=generator) * 2 - 1)
    return mean.bfloat16() if name == "shifted bf16" else mean


def form_of(name: str, state, limit=LIMIT) -> zk.Form | None:
    """state: a tensor or a list of them."""
    if name == "plain":
        return None
    if name == "below":
        return zk.below(limit)
    return zk.weighted(state) if name == "weighted" else zk.shifted(state, C)


def moved(
    name, theta, state, tensor_id, seeds, steps, dist, *, decay=None, offset=0, sign=1, start=None
) -> torch.Tensor:
    """start: the value that the sum begins with, theta (decayed) unless given."""
    acc = theta.float() if decay is None else theta.float() * decay
    acc = acc if start is None else start
    if name.startswith("shifted"):
        acc = fma(sign * C, state.float(), acc)
    for seed, step in zip(seeds, steps, strict=True):
        z = zk.draw_noise(tuple(theta.shape), seed, tensor_id, start=offset, dist=dist)
        if name == "weighted":
            z = torch.from_numpy(z.numpy() / numpy.sqrt(state.numpy()))
        if name == "below":
            z = z * (theta.float().abs() <= LIMIT)
        acc = fma(sign * step, z, acc)
    return acc


def rounded(acc, tensor_id, seed, dtype, offset=0) -> torch.Tensor:
    if seed is None:
        return acc.to(dtype)
    elements = torch.arange(acc.numel()).view(acc.shape) + offset
    return round_stochastic(acc, contract.rounding_bits(elements, seed, tensor_id), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((5, 7), (2053,)))
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("above", (1.0, 1.1), ids=("nearest", "stochastic"))
@pytest.mark.parametrize("dist", DISTS)
def test_a_scratch_sums_its_directions_in_order(backend, shape, dtype, name, above, dist):
    """The first direction's step decides how it is rounded, and its seed gives the bits."""
    theta = weights(shape, dtype)
    before, state = theta.clone(), companions(name, theta)
    out, mirror = torch.empty_like(theta), torch.empty_like(theta)
    call = {"nearest_above": ABOVE * above, "dist": dist, "form": form_of(name, state)}
    zk.scratch(theta, out, 9, SEEDS, COEFS, SCALES, mirror=mirror, **call)
    rounding_seed = SEEDS[0] if above == 1.1 else None
    for sign, ours in ((1, out), (-1, mirror)):
        acc = moved(name, theta, state, 9, SEEDS, COEFS * SCALES, dist, sign=sign)
        assert torch.equal(bits(ours), bits(rounded(acc, 9, rounding_seed, dtype)))
    assert torch.equal(bits(theta), bits(before))
    again, one = torch.empty_like(theta), torch.tensor(0.5)
    zk.scratch(theta, out, 9, SEEDS[0], COEFS[0], one, **call)
    zk.scratch(theta, again, 9, SEEDS[:1], COEFS[:1], one.view(1), **call)
    assert torch.equal(bits(out), bits(again))
    zk.scratch(theta, again, 9, SEEDS, COEFS, **call)
    zk.scratch(theta, out, 9, SEEDS, COEFS, torch.tensor(1.0), **call)
    assert torch.equal(bits(out), bits(again))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1,), (5, 7), (2053,)))
@pytest.mark.parametrize("name", FORMS[1:])
@pytest.mark.parametrize("rounding_seed", (None, ROUNDING_SEED), ids=("nearest", "stochastic"))
@pytest.mark.parametrize("dist", DISTS)
def test_an_update_in_a_form(backend, shape, dtype, name, rounding_seed, dist):
    theta, decay, offset = weights(shape, dtype), torch.tensor(0.99), 2**33 + 12345
    state = companions(name, theta)
    blocks = zk.Blocks([("w", theta.clone())], {"w": 9}, offsets=[offset])
    call = {"decay": decay, "rounding_seed": rounding_seed, "dist": dist}
    form = form_of(name, [state], LIMIT.reshape(1))
    stats = zk.update_(blocks, SEEDS, COEFS, SCALES[:, None], form=form, stats=True, **call)
    acc = moved(name, theta, state, 9, SEEDS, COEFS * SCALES, dist, decay=decay, offset=offset)
    assert torch.equal(bits(blocks.tensors[0]), bits(rounded(acc, 9, rounding_seed, dtype, offset)))
    assert torch.equal(stats.norm, zk.block_stats(blocks).norm)
    perturbed = zk.Blocks([("w", theta.clone())], {"w": 9})
    zk.perturb_(perturbed, SEEDS[0], COEFS[0], form=form, dist=dist)
    want = moved(name, theta, state, 9, SEEDS[:1], COEFS[:1], dist).to(dtype)
    assert torch.equal(bits(perturbed.tensors[0]), bits(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((50, 7), (11, 3, 65)))
@pytest.mark.parametrize("name", FORMS)
def test_rows_in_a_form_are_rows_of_the_whole(backend, shape, dtype, name):
    theta, rows = weights(shape, dtype), torch.tensor([3, 0, shape[0] - 1, 3, 3, 8])
    call = {"nearest_above": torch.tensor(1.0), "form": form_of(name, companions(name, theta))}
    whole = [torch.empty_like(theta) for _ in range(2)]
    some = [torch.empty((len(rows), *shape[1:]), dtype=dtype) for _ in range(2)]
    zk.scratch(theta, whole[0], 5, SEEDS, COEFS, mirror=whole[1], **call)
    zk.scratch(theta, some[0], 5, SEEDS, COEFS, mirror=some[1], rows=rows, **call)
    assert_same_bits(some, [w[rows] for w in whole])


def mixed() -> list[tuple[str, torch.Tensor]]:
    """Dtypes and sizes together, one empty, one 0-dim."""
    shapes = ((3, 5), (2053,), (), (128, 4), (0, 4), (1000,), (2, 65))
    return [(f"layers.{i}.w", weights(s, DTYPES[i % 3], seed=i)) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("name", FORMS[1:])
@pytest.mark.parametrize("dist", DISTS)
def test_one_call_over_blocks_equals_a_call_per_block(backend, name, dist):
    """Every block its own state and limit."""
    named = mixed()
    states = [companions(name, tensor, seed=i) for i, (_, tensor) in enumerate(named)]
    limits, scale = torch.linspace(0.001, 0.03, len(named)), torch.linspace(0.5, 2.0, len(named))
    call = {"decay": torch.tensor(0.99), "rounding_seed": ROUNDING_SEED, "dist": dist}
    together = zk.Blocks(clones(named))
    zk.update_(together, SEEDS, COEFS, scale, form=form_of(name, states, limits), **call)
    for b, pair in enumerate(clones(named)):
        alone = zk.Blocks([pair])
        form = form_of(name, states[b : b + 1], limits[b : b + 1])
        zk.update_(alone, SEEDS, COEFS, scale[b : b + 1], form=form, **call)
        assert torch.equal(bits(alone.tensors[0]), bits(together.tensors[b]))
    plain = zk.Blocks(clones(named))
    zk.update_(plain, SEEDS, COEFS, scale, **call)
    assert not torch.equal(plain.tensors[1], together.tensors[1])


@pytest.mark.parametrize("name", FORMS[1:])
@pytest.mark.parametrize("view", (lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[:, 3:40]), ids="tsn")
def test_the_state_of_a_view_counts_its_elements_in_order(backend, name, view):
    storage = weights((33, 65), torch.bfloat16)
    before, tensor = storage.clone(), view(storage)
    state = companions(name, tensor)
    form, ids = form_of(name, [state], LIMIT.reshape(1)), {"w": 9}
    whole = zk.Blocks([("w", tensor.clone().contiguous())], ids)
    for blocks in (whole, zk.Blocks([("w", tensor)], ids)):
        zk.update_(blocks, SEEDS, COEFS, rounding_seed=ROUNDING_SEED, form=form)
    assert torch.equal(bits(tensor), bits(whole.tensors[0]))
    inside = torch.zeros_like(storage, dtype=torch.bool)
    view(inside).fill_(True)
    assert torch.equal(bits(storage)[~inside], bits(before)[~inside])


def test_a_limit_keeps_all_or_nothing(backend):
    theta = weights((4099,))
    theta[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    for limit, plain in ((float("inf"), True), (-1.0, False)):
        out, want = torch.empty_like(theta), theta.clone()
        zk.scratch(theta, out, 9, SEEDS, COEFS, form=zk.below(torch.tensor(limit)))
        if plain:
            zk.scratch(theta, want, 9, SEEDS, COEFS)
        assert torch.equal(out[1:], want[1:]) and out[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_the_cpu_forms_are_the_references(cpu, dtype, name):
    """Signs: equal bits, for all that a list and a scratch write."""
    results = []
    for module in ("cpu", "reference"):
        with zk.use_backend(module):
            named = [(str(n), weights((n,), dtype, seed=n)) for n in (1, 127, 2049, 70_001)]
            states = [companions(name, tensor, seed=i) for i, (_, tensor) in enumerate(named)]
            blocks, limits = zk.Blocks(clones(named), offsets=[5, 0, 127, 2**32 - 1001]), LIMIT.repeat(4)
            form = form_of(name, states, limits)
            zk.update_(blocks, SEEDS, COEFS, rounding_seed=ROUNDING_SEED, dist="rademacher", form=form)
            outs = [torch.empty_like(named[3][1]) for _ in range(2)]
            form = form_of(name, states[3])
            call = {"nearest_above": ABOVE * 3, "dist": "rademacher", "form": form}
            zk.scratch(named[3][1], outs[0], 9, SEEDS, COEFS, mirror=outs[1], **call)
            results.append([*blocks.tensors, *outs])
    assert_same_bits(*results)


@pytest.mark.parametrize("dist", DISTS)
def test_noise_of_other_streams(backend, dist):
    """The numbers of low-rank factors are those of stream 2 of the contract; another stream, other numbers."""
    elements = torch.arange(5003) + 2**32 - 1001
    draw = contract.normal if dist == "normal" else contract.rademacher
    seen = []
    for stream in (contract.DIRECTION, zk.LOW_RANK, zk.MASK):
        z = zk.draw_noise(5003, SEEDS[0], 7, start=2**32 - 1001, dist=dist, stream=stream)
        want = draw(elements, SEEDS[0], 7, stream)
        assert torch.equal(z, want) or (dist == "normal" and (z - want).abs().max() < 1.5e-5)
        seen.append(z)
    assert all((seen[i] != seen[j]).float().mean() > 0.4 for i, j in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(ValueError, match="no noise comes from stream 1"):
        zk.draw_noise(4, SEEDS[0], 7, stream=contract.ROUNDING)


def test_what_a_form_refuses(backend):
    theta, out = torch.zeros(5, 4), torch.zeros(5, 4)
    blocks = zk.Blocks([("a.weight", torch.zeros(3, 4)), ("a.bias", torch.zeros(4))])
    good = [torch.ones(3, 4), torch.ones(4)]
    for form, message in (
        (zk.weighted(torch.ones(4, 5)), r"h must be float32 of shape \(5, 4\) on cpu, got float32 \(4, 5\)"),
        (zk.weighted(torch.ones(5, 4).half()), r"h must be float32 of shape"),
        (zk.weighted(torch.ones(4, 5).t()), "h must be contiguous"),
        (zk.shifted(torch.ones(5, 4).half(), C), r"mu must be float32 or bfloat16 of shape \(5, 4\)"),
        (zk.shifted(torch.ones(5, 4), C.view(1)), r"c must be float32 of shape \(\)"),
        (zk.below(torch.ones(1)), r"limit must be float32 of shape \(\)"),
        (zk.Form("cauchy"), "unknown form 'cauchy'; there are: weighted, below, shifted"),
    ):
        with pytest.raises(ValueError, match=message):
            zk.scratch(theta, out, 1, SEEDS, COEFS, form=form)
    for form, message in (
        (zk.weighted(good[0]), "h must be a list of 2 tensors, one per block, got one tensor"),
        (zk.weighted(good[:1]), "h must be a list of 2 tensors, one per block, got 1"),
        (zk.weighted(good[::-1]), r"h of a.weight must be float32 of shape \(3, 4\)"),
        (zk.weighted([good[0], good[1].double()]), "h of a.bias must be float32"),
        (zk.shifted([good[0], good[1].bfloat16()], C), r"mu of a.bias must be float32 of shape \(4,\)"),
        (zk.below(LIMIT), r"limit must be float32 of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            zk.update_(blocks, SEEDS, COEFS, form=form)
    for seeds, coefs, scale, message in (
        (SEEDS[:0], COEFS[:0], None, "seeds must be int64"),
        (SEEDS, COEFS[:2], None, r"coefs must be float32 of shape \(3,\)"),
        (SEEDS, COEFS[0], None, r"coefs must be float32 of shape \(3,\)"),
        (SEEDS[0], COEFS, None, r"coefs must be float32 of shape \(\)"),
        (SEEDS, COEFS, SCALES[:2], r"scale must be float32 of shape \(3,\)"),
        (SEEDS[0], COEFS[0], SCALES, r"scale must be float32 of shape \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            zk.scratch(theta, out, 1, seeds, coefs, scale)
    assert not out.any() and not any(tensor.any() for tensor in blocks.tensors)
