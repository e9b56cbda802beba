"""The ops against their definitions, on every CPU backend, for all dtypes and odd shapes.

`expected()` states an op in terms of z, `rounding.fma` and `rounding.round_stochastic`, which
test_rounding.py checks against exact arithmetic.  z is the backend's own, so that multiply-adds, order and
rounding must agree bit for bit.  One test compares normal updates of two backends, whose z may differ.
"""

from __future__ import annotations

import math

import pytest
import torch

import zo_kernels as zk
from zo_kernels import noise as contract
from zo_kernels.rounding import fma, round_stochastic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (7,), (5, 7), (6, 42, 123), (4099,))
DISTS = contract.DISTRIBUTIONS
SEEDS = zk.seed_tensor([2**63 + 5, 3, 2**64 - 1])
COEFS = torch.tensor([0.01, -0.003, 0.2])
ROUNDING_SEED = zk.seed_tensor(77)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def weights(shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def expected(
    theta, tensor_id, seeds, coefs, scale=None, decay=None, rounding_seed=None, dist="normal", offset=0
) -> torch.Tensor:
    acc = theta.float()
    if decay is not None:
        acc = acc * decay
    for seed, coef in zip(seeds, coefs, strict=True):
        z = zk.draw_noise(tuple(theta.shape), seed, tensor_id, start=offset, dist=dist)
        acc = fma(coef if scale is None else coef * scale, z, acc)
    if rounding_seed is None:
        return acc.to(theta.dtype)
    elements = torch.arange(theta.numel()).view(theta.shape) + offset
    return round_stochastic(acc, contract.rounding_bits(elements, rounding_seed, tensor_id), theta.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dist", DISTS)
def test_perturb_is_one_fma_rounded_to_nearest(backend, shape, dtype, dist):
    theta = weights(shape, dtype)
    blocks = zk.Blocks([("w", theta.clone())])
    zk.perturb_(blocks, SEEDS[0], COEFS[0], torch.tensor([0.7]), dist=dist)
    want = expected(theta, blocks.ids[0], SEEDS[:1], COEFS[:1], torch.tensor(0.7), dist=dist)
    assert torch.equal(bits(blocks.tensors[0]), bits(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("stochastic", (False, True))
def test_update_decays_sums_in_order_and_rounds_once(backend, shape, dtype, dist, stochastic):
    theta, decay = weights(shape, dtype), torch.tensor(0.999)
    rounding_seed = ROUNDING_SEED if stochastic else None
    offset = 2**33 + 12345
    blocks = zk.Blocks([("w", theta.clone())], offsets=[offset])
    zk.update_(blocks, SEEDS, COEFS, torch.tensor([0.5]), decay=decay, rounding_seed=rounding_seed, dist=dist)
    want = expected(theta, blocks.ids[0], SEEDS, COEFS, torch.tensor(0.5), decay, rounding_seed, dist, offset)
    assert torch.equal(bits(blocks.tensors[0]), bits(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("above", "stochastic"),
    ((None, False), (0.9, False), (1.0, False), (1.1, True)),
    ids=("nearest", "above", "equal", "below"),
)
def test_scratch_is_theta_perturbed_and_leaves_theta_alone(backend, shape, dtype, above, stochastic):
    """To nearest where |coef * scale| >= nearest_above, else stochastic, with the probe's own seed."""
    theta = weights(shape, dtype)
    before, out = theta.clone(), torch.empty_like(theta)
    step, scale = torch.tensor(-0.01), torch.tensor(0.7)
    nearest_above = None if above is None else (step * scale).abs() * above
    zk.scratch(theta, out, 9, SEEDS[0], step, scale, nearest_above=nearest_above)
    rounding_seed = SEEDS[0] if stochastic else None
    want = expected(theta, 9, SEEDS[:1], step.reshape(1), scale, rounding_seed=rounding_seed)
    assert torch.equal(bits(out), bits(want))
    assert torch.equal(bits(theta), bits(before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((50, 7), (50, 200), (11, 3, 65), (1000,)))
@pytest.mark.parametrize("dist", DISTS)
def test_scratch_rows_are_rows_of_the_whole(backend, shape, dtype, dist):
    theta = weights(shape, dtype)
    rows = torch.tensor([3, 0, shape[0] - 1, 3, 3, 8])
    whole, some = torch.empty_like(theta), torch.empty((len(rows), *shape[1:]), dtype=dtype)
    call = dict(nearest_above=torch.tensor(1.0), dist=dist)
    zk.scratch(theta, whole, 5, SEEDS[1], COEFS[0], **call)
    zk.scratch(theta, some, 5, SEEDS[1], COEFS[0], rows=rows, **call)
    assert torch.equal(bits(some), bits(whole[rows]))
    none = torch.empty((0, *shape[1:]), dtype=dtype)
    zk.scratch(theta, none, 5, SEEDS[1], COEFS[0], rows=rows[:0], **call)


@pytest.mark.parametrize("row", (-1, 50))
def test_a_row_outside_theta_is_an_index_error(backend, row):
    theta, out = weights((50, 7)), torch.empty(2, 7)
    with pytest.raises(IndexError):
        zk.scratch(theta, out, 5, SEEDS[1], COEFS[0], rows=torch.tensor([0, row]))


def mixed() -> list[tuple[str, torch.Tensor]]:
    """Dtypes and sizes together, one larger than the 65,536 elements of a chunk, one empty, one 0-dim."""
    shapes = ((3, 5), (70_001,), (), (128, 4), (0, 4), (1000,), (2, 65))
    return [(f"layers.{i}.w", weights(s, DTYPES[i % 3], seed=i)) for i, s in enumerate(shapes)]


def clones(named):
    return [(name, tensor.clone()) for name, tensor in named]


def update(named, scale, dist="normal", rounding_seed=ROUNDING_SEED) -> list[torch.Tensor]:
    blocks = zk.Blocks(clones(named))
    zk.update_(blocks, SEEDS, COEFS, scale, decay=torch.tensor(0.99), rounding_seed=rounding_seed, dist=dist)
    return blocks.tensors


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dist", DISTS)
def test_one_call_equals_a_call_per_block(backend, dist):
    named = mixed()
    scale = torch.linspace(0.5, 2.0, len(named))
    together = update(named, scale, dist)
    alone = [update([pair], scale[i : i + 1], dist)[0] for i, pair in enumerate(named)]
    assert_same_bits(together, alone)
    assert not torch.equal(together[1], named[1][1])


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_is_a_slice_of_the_whole(backend, dtype, dist):
    theta, cuts = weights((4099,), dtype), (0, 1, 1003, 1004, 3072, 4099)
    ids = {"w": 123}
    whole = zk.Blocks([("w", theta.clone())], ids)
    zk.update_(whole, SEEDS, COEFS, rounding_seed=ROUNDING_SEED, dist=dist)
    for a, b in zip(cuts, cuts[1:], strict=False):
        shard = zk.Blocks([("w", theta[a:b].clone())], ids, offsets=[a])
        zk.update_(shard, SEEDS, COEFS, rounding_seed=ROUNDING_SEED, dist=dist)
        assert torch.equal(bits(shard.tensors[0]), bits(whole.tensors[0][a:b]))


@pytest.mark.parametrize(
    "view", (lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[:, 3:40], lambda t: t[5]), ids="tsnr"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_is_updated_in_place_and_its_neighbours_are_not(backend, dtype, view):
    storage = weights((33, 65), dtype)
    before = storage.clone()
    tensor = view(storage)
    [want] = update([("w", tensor.clone().contiguous())], None)
    inside = torch.zeros_like(storage, dtype=torch.bool)
    view(inside).fill_(True)
    blocks = zk.Blocks([("w", tensor)])
    assert torch.allclose(zk.block_stats(blocks).mean[0], tensor.float().mean(), atol=1e-7)
    zk.update_(blocks, SEEDS, COEFS, decay=torch.tensor(0.99), rounding_seed=ROUNDING_SEED)
    assert torch.equal(bits(tensor), bits(want))
    assert torch.equal(bits(storage)[~inside], bits(before)[~inside])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic", (False, True))
def test_non_finite_weights_stay_what_they_are(backend, dtype, stochastic):
    """inf and NaN are converted, never rounded; 0 * z keeps the sign of a zero as IEEE 754 says."""
    values = [math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0, torch.finfo(dtype).max]
    theta = torch.tensor(values).repeat(200).to(dtype)
    rounding_seed = ROUNDING_SEED if stochastic else None
    for coef in (0.0, 1e-3):
        blocks = zk.Blocks([("w", theta.clone())])
        zk.update_(blocks, SEEDS[:1], torch.tensor([coef]), rounding_seed=rounding_seed)
        want = expected(theta, blocks.ids[0], SEEDS[:1], torch.tensor([coef]), rounding_seed=rounding_seed)
        finite = ~theta.isnan()
        assert blocks.tensors[0][~finite].isnan().all()
        assert torch.equal(bits(blocks.tensors[0])[finite], bits(want)[finite])
        assert torch.equal(blocks.tensors[0].isinf(), theta.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_coefficient_never_becomes_a_zero(backend, dtype):
    """0x7fffffff is a NaN; plus rounding bits it would be 0x8000...: -0."""
    coef = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    blocks = zk.Blocks([("w", weights((1000,), dtype))])
    zk.update_(blocks, SEEDS[:1], coef, rounding_seed=ROUNDING_SEED)
    assert blocks.tensors[0].isnan().all()


def test_results_do_not_depend_on_threads(cpu):
    named = mixed()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            stats = zk.block_stats(zk.Blocks(named))
            z = zk.draw_noise(200_003, SEEDS[0], 4, start=5)
            results.append([*update(named, None), *stats, z])
        finally:
            torch.set_num_threads(1)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_every_instruction_set_gives_the_same_bits(cpu):
    def run():
        out = [zk.words(1003, SEEDS[0], 4, 1), zk.draw_noise(100_003, SEEDS[0], 4, start=2**32 - 77)]
        for dist in DISTS:
            for rounding_seed in (None, ROUNDING_SEED):
                out += update(mixed(), None, dist, rounding_seed)
        return [*out, *zk.block_stats(zk.Blocks(mixed()))]

    best, results = cpu.isa(), {}
    try:
        for isa in cpu.isas():
            cpu.set_isa(isa)
            results[isa] = run()
    finally:
        cpu.set_isa(best)
    assert best == cpu.isas()[-1]
    for result in results.values():
        assert_same_bits(result, results["generic"])
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'; this machine has: generic"):
        cpu.set_isa("mmx")


def test_subnormals_survive_flush_to_zero(cpu):
    theta = torch.full((1000,), 1e-40)
    half = torch.full((1000,), 3e-7, dtype=torch.float16)
    want = update([("a", theta), ("b", half)], None)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        got = update([("a", theta), ("b", half)], None)
        still_flushing = (torch.tensor([1e-40]) * 1).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, want)
    assert still_flushing, "the caller's floating-point mode must be left as it was"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding_seed", (None, ROUNDING_SEED), ids=("nearest", "stochastic"))
def test_cpu_updates_are_the_reference_updates(cpu, dtype, rounding_seed):
    """Signs: equal bits.  Normals: fp32 within the contract's bound on z and the last rounding; 16 bits:
    1 ulp, rarely.  z differs by 2e-7, the step is 0.2 z, an fp16 ulp of the result 1e-4: one in 1e4 crosses a
    rounding boundary (measured 1.0e-4; bf16 1.7e-5).  One in 1e3 would be a defect."""
    named = [("w", weights((100_003,), dtype))]
    ours = {dist: update(named, None, dist, rounding_seed)[0] for dist in DISTS}
    with zk.use_backend("reference"):
        theirs = {dist: update(named, None, dist, rounding_seed)[0] for dist in DISTS}
        z = torch.stack([zk.draw_noise(100_003, s, zk.Blocks(named).ids[0]) for s in SEEDS])
    assert torch.equal(bits(ours["rademacher"]), bits(theirs["rademacher"]))
    ours, theirs = ours["normal"], theirs["normal"]
    step = zk.ulp(theirs.float(), dtype)
    difference = (ours.double() - theirs.double()).abs()
    if dtype == torch.float32:
        radius = math.sqrt(2 * math.log(2) * 33)
        assert z.abs().max() < radius
        budget = (COEFS.abs().double()[:, None] * (1e-6 + 2e-6 * radius)).sum(0) + 2 * step.double()
        assert (difference <= budget).all()
    else:
        assert (difference <= step * 1.001).all()
        assert (difference > 0).float().mean() < 1e-3
    assert (theirs != named[0][1]).float().mean() > 0.9
