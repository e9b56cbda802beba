"""What only the native module has: chunks, threads, instruction sets, its table of a model, its floating-point mode."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from test_forms import FORMS, companions, form_of
from test_ops import COEFS, DISTS, DTYPES, ROUNDING_SEED, SEEDS, assert_same_bits, bits, weights
from test_states import numbers, states_of

import zo_kernels as zk

CHUNK, PIECE = 1 << 16, 1 << 11  # of csrc/cpu/ops.cpp and moments.h
SIZES = (1, 2, 15, 16, 17, 2047, 2048, 2049, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77)
OFFSETS = (0, 5, 127, 2**32 - 1001)  # a tile begins in the middle of 128 elements
SCALES = torch.tensor([0.5, 2.0, 1.0])
NEXT = (zk.seed_tensor(2**63 + 1), torch.tensor(-2e-3), torch.tensor(1.5))
STOCHASTIC = torch.tensor(1.0)  # above every step


def blocks() -> zk.Blocks:
    """Several chunks, and every offset, in every dtype."""
    named = [
        (f"{dtype} {offset}", weights((size,), dtype, seed=size))
        for dtype in DTYPES
        for size, offset in zip((2 * CHUNK + 77, 2049, CHUNK, 17), OFFSETS, strict=True)
    ]
    return zk.Blocks(named, offsets=OFFSETS * len(DTYPES))


def everything(dist: str) -> list[torch.Tensor]:
    """All that the native ops write."""
    model = blocks()
    scale = torch.linspace(0.5, 2.0, 3 * len(model)).view(3, -1)
    options = {"decay": torch.tensor(0.99), "rounding_seed": ROUNDING_SEED, "dist": dist}
    results = [zk.words(1003, SEEDS[0], 4, 1), zk.draw_noise(200_003, SEEDS[0], 4, start=2**32 - 77, dist=dist)]
    results += zk.update_(model, SEEDS, COEFS, scale, stats=True, **options)
    zk.update_(model, SEEDS, COEFS, dist=dist)
    dots, stats = zk.dot_noise(model, SEEDS, dist=dist, stats=True)
    results += [dots, *stats, *zk.block_stats(model)]
    for theta in model.tensors:
        for above in (None, STOCHASTIC):
            pair = [torch.empty_like(theta) for _ in range(2)]
            call = {"mirror": pair[1], "nearest_above": above, "dist": dist}
            results += zk.scratch(theta, pair[0], 9, SEEDS[0], COEFS[0], stats=True, **call)
            results += pair
        pair, rows = [torch.empty(4, theta.numel()) for _ in range(2)], torch.tensor([1, 0, 2, 1])
        table = weights((3, theta.numel()))
        zk.scratch(table, pair[0], 9, SEEDS[0], COEFS[0], mirror=pair[1], rows=rows, dist=dist)
        results += pair
        pair = [torch.empty_like(theta) for _ in range(2)]
        call = {"mirror": pair[1], "nearest_above": STOCHASTIC, "stats": True, **options}
        results += zk.update_scratch_(theta, pair[0], 9, SEEDS, COEFS, SCALES, *NEXT, **call)
        results += pair
    return [(r.view(torch.int32) if r.dtype == torch.int64 else r).contiguous() for r in results + model.tensors]


@functools.cache
def of_blocks(name: str) -> list:
    """The states of a form or a rule, drawn once."""
    if name in zk.RULES:
        return states_of(name, blocks().tensors)
    return [companions(name, tensor, seed=b) for b, tensor in enumerate(blocks().tensors)]


def forms_and_rules(dist: str) -> list[torch.Tensor]:
    """All that updates in a form, scratches of several directions and rules that keep state write."""
    results, options = [], {"rounding_seed": ROUNDING_SEED, "dist": dist}
    scale = torch.linspace(0.5, 2.0, 12)
    for name in FORMS[1:]:
        model, states = blocks(), of_blocks(name)
        form = form_of(name, states, torch.linspace(0.01, 0.03, 12))
        zk.update_(model, SEEDS, COEFS, scale, form=form, **options)
        zk.update_state_(model, "sign", [], SEEDS, COEFS, scale, numbers=numbers("sign"), form=form, **options)
        theta, pair = model.tensors[4], [torch.empty_like(model.tensors[4]) for _ in range(2)]
        call = {"mirror": pair[1], "nearest_above": STOCHASTIC, "dist": dist, "form": form_of(name, states[4])}
        zk.scratch(theta, pair[0], 9, SEEDS, COEFS, SCALES, **call)
        results += [*pair, *model.tensors]
    for rule in zk.RULES:
        model, states = blocks(), [[state.clone() for state in of_rule] for of_rule in of_blocks(rule)]
        zk.update_state_(model, rule, states, SEEDS, COEFS, scale, numbers=numbers(rule), **options)
        results += [*model.tensors, *(tensor for state in states for tensor in state)]
    return results


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("everything", (everything, forms_and_rules))
def test_threads_never_change_a_bit(cpu, dist, everything):
    results = {}
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results[threads] = everything(dist)
        finally:
            torch.set_num_threads(1)
    assert_same_bits(results[2], results[1])
    assert_same_bits(results[5], results[1])


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("everything", (everything, forms_and_rules))
def test_every_instruction_set_gives_the_same_bits(cpu, dist, everything):
    best, results = cpu.isa(), {}
    assert best == cpu.isas()[-1]
    try:
        for isa in cpu.isas():
            cpu.set_isa(isa)
            results[isa] = everything(dist)
    finally:
        cpu.set_isa(best)
    for result in results.values():
        assert_same_bits(result, results["generic"])


def test_an_unknown_instruction_set_is_named(cpu):
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'; this machine has: generic"):
        cpu.set_isa("mmx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dist", DISTS)
def test_a_fused_pass_over_several_chunks_is_the_calls_it_replaces(cpu, dtype, dist):
    theta = weights((2 * CHUNK + 77,), dtype)
    options = {"decay": torch.tensor(0.99), "rounding_seed": ROUNDING_SEED, "dist": dist}
    probing = {"nearest_above": STOCHASTIC, "dist": dist}
    apart = zk.Blocks([("w", theta.clone())], {"w": 9})
    zk.update_(apart, SEEDS, COEFS, SCALES[:, None], **options)
    signs = [torch.empty_like(theta) for _ in range(2)]
    for out, coef in zip(signs, (NEXT[1], -NEXT[1]), strict=True):
        zk.scratch(apart.tensors[0], out, 9, NEXT[0], coef, NEXT[2], **probing)
    fused, out, mirror = theta.clone(), torch.empty_like(theta), torch.empty_like(theta)
    call = {"mirror": mirror, "nearest_above": STOCHASTIC, "stats": True, **options}
    stats = zk.update_scratch_(fused, out, 9, SEEDS, COEFS, SCALES, *NEXT, **call)
    assert_same_bits([fused, out, mirror], [apart.tensors[0], *signs])
    assert_same_bits(stats[:3], zk.block_stats(apart)[:3])


@pytest.mark.parametrize("offset", OFFSETS)
def test_riding_statistics_have_the_bits_of_block_stats_at_every_border(cpu, offset):
    for dtype in DTYPES:
        named = [(str(size), weights((size,), dtype, seed=size)) for size in SIZES]
        named[3][1][7] = math.nan
        model = zk.Blocks(named, offsets=[offset] * len(named))
        before = zk.block_stats(model)
        assert before.nonfinite.tolist() == [0, 0, 0, 1] + [0] * (len(SIZES) - 4)
        _, riding = zk.dot_noise(model, SEEDS, stats=True)
        assert_stats(riding, before)
        riding = zk.update_(model, SEEDS, COEFS, rounding_seed=ROUNDING_SEED, stats=True)
        assert_stats(riding, zk.block_stats(model))
        assert not torch.equal(riding.mean, before.mean)


def assert_stats(ours: zk.BlockStats, theirs: zk.BlockStats) -> None:
    assert_same_bits(ours[:3], theirs[:3])
    assert torch.equal(ours.nonfinite, theirs.nonfinite)


def test_statistics_are_rounded_once(cpu):
    """Sums in fp64 err by 1e-10 at most in a piece (csrc/cpu/moments.h) and by less between pieces, and fp32 by half an
    ulp: 2^-24 of the value.  Also where the first value, around which a piece is summed, lies far out."""
    tensors = [1 + 1e-4 * torch.randn(size) for size in SIZES[1:]]
    tensors += [weights((size,)) for size in SIZES[1:]]
    for size in (2048, 2049, CHUNK + 1):
        tensors.append(weights((size,)))
        tensors[-1][0] = -1e6
        tensors.append(weights((size,)))
        tensors[-1][0] = 3e-8
    stats = zk.block_stats(zk.Blocks([(str(i), tensor) for i, tensor in enumerate(tensors)]))
    for i, tensor in enumerate(tensors):
        x = tensor.tolist()
        mean = math.fsum(x) / len(x)
        rms = math.sqrt(math.fsum(v * v for v in x) / len(x))
        want = math.fsum((v - mean) ** 2 for v in x) / (len(x) - 1)
        assert abs(stats.mean[i].item() - mean) <= 2**-24 * abs(mean) + 1e-15 * rms
        assert stats.var[i].item() == pytest.approx(want, rel=2**-24 + 2e-10)
        assert stats.norm[i].item() == pytest.approx(rms * math.sqrt(len(x)), rel=2**-24 + 1e-10)


def test_non_finite_values_are_counted_wherever_they_are(cpu):
    places = [0, 1, 511, 512, PIECE - 1, PIECE, CHUNK - 1, CHUNK, CHUNK + PIECE, 2 * CHUNK + 76]
    for count in range(1, len(places) + 1):
        theta = weights((2 * CHUNK + 77,))
        theta[places[:count]] = torch.tensor([math.inf, -math.inf, math.nan]).repeat(4)[:count]
        for offset in (0, 3):
            stats = zk.block_stats(zk.Blocks([("w", theta)], offsets=[offset]))
            assert stats.nonfinite.item() == count
            assert all(value.isnan().all() for value in stats[:3])
    stats = zk.block_stats(zk.Blocks([("w", torch.full((5000,), math.nan))]))
    assert stats.nonfinite.item() == 5000


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_dot_with_noise_is_rounded_once(cpu, dist, offset):
    """Products are exact in fp64.  At most 32 additions in a lane of a tile, 4 between lanes, 129 between tiles of a
    chunk, 3 between chunks: 168 * 2^-53 of the products' sizes; then half an ulp of fp32."""
    model = zk.Blocks([(str(size), weights((size,), seed=size)) for size in SIZES], offsets=[offset] * len(SIZES))
    dots = zk.dot_noise(model, SEEDS, dist=dist)
    for k, seed in enumerate(SEEDS):
        for b, x in enumerate(model.tensors):
            z = zk.draw_noise(tuple(x.shape), seed, model.ids[b], start=offset, dist=dist)
            products = x.double() * z.double()
            exact = math.fsum(products.tolist())
            budget = 168 * 2.0**-53 * products.abs().sum().item() + 2.0**-24 * abs(exact)
            assert abs(dots[k, b].item() - exact) <= budget


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_stochastic_rounding_is_the_references_in_every_binade(cpu, dtype):
    """Signs, so that bits are equal: steps from far below the smallest subnormal to far beyond the largest value."""
    exponents = range(-160, 140, 3) if dtype == torch.bfloat16 else range(-60, 20)
    scale = torch.ldexp(torch.full((len(exponents),), 1.7), torch.tensor(list(exponents)))
    patterns = torch.randint(0, 1 << 16, (len(exponents), 500), generator=torch.Generator().manual_seed(1))
    theta = patterns.to(torch.int16).view(dtype)
    named = [(str(e), t[t.isfinite()]) for e, t in zip(exponents, theta, strict=True)]
    results = []
    for backend in ("cpu", "reference"):
        with zk.use_backend(backend):
            model = zk.Blocks([(name, tensor.clone()) for name, tensor in named])
            zk.update_(model, SEEDS[:1], torch.ones(1), scale, rounding_seed=ROUNDING_SEED, dist="rademacher")
            results.append(model.tensors)
    assert_same_bits(*results)
    everything = torch.cat(results[0])
    assert everything.isinf().any() and not everything.isnan().any()


def test_a_moved_tensor_is_found_and_its_old_storage_left_alone(cpu):
    theta = torch.nn.Parameter(weights((1000,)), requires_grad=False)
    other = weights((500,))
    model = zk.Blocks([("theta", theta), ("other", other)])
    zk.update_(model, SEEDS, COEFS)
    old, seen = theta.data, theta.data.clone()
    theta.data = weights((1000,))
    for _ in range(2):
        want = zk.Blocks([("theta", theta.data.clone())])
        zk.update_(want, SEEDS, COEFS)
        zk.update_(model, SEEDS, COEFS)
        assert torch.equal(theta.data, want.tensors[0])
    assert torch.equal(old, seen)


def test_a_tensor_that_becomes_strided_where_it_is_keeps_its_order(cpu):
    theta = torch.nn.Parameter(weights((33, 65)), requires_grad=False)
    model = zk.Blocks([("theta", theta), ("other", weights((7,)))])
    zk.update_(model, SEEDS, COEFS)
    theta.data = theta.data.t()
    want = zk.Blocks([("theta", theta.data.contiguous())])
    zk.update_(want, SEEDS, COEFS)
    stats = zk.update_(model, SEEDS, COEFS, torch.tensor([1.0, 0.0]), stats=True)
    assert torch.equal(theta.data, want.tensors[0])
    assert stats.norm[0] == zk.block_stats(want).norm[0]


@pytest.mark.parametrize("width", (7, 0))
def test_a_bad_row_is_named_before_anything_is_written(cpu, width):
    theta = weights((50, width))
    out, mirror = torch.full((3, width), 5.0), torch.full((3, width), 5.0)
    with pytest.raises(IndexError, match=r"rows\[1\] is 50, outside theta's 50 rows"):
        zk.scratch(theta, out, 5, SEEDS[1], COEFS[0], mirror=mirror, rows=torch.tensor([0, 50, -1]))
    assert (out == 5).all() and (mirror == 5).all()


def test_every_pass_keeps_subnormals_where_torch_flushes_them(cpu):
    """Seven threads: more than any test before, so that some begin with the flushing mode of this one."""
    inputs = torch.full((20 * CHUNK,), 1e-40), torch.full((1000,), 3e-7, dtype=torch.float16)
    one, tiny = torch.tensor(1.0), torch.tensor(1e-40)
    call = {"rounding_seed": ROUNDING_SEED, "nearest_above": one, "stats": True}

    def run():
        theta, half = (tensor.clone() for tensor in inputs)
        model = zk.Blocks([("theta", theta), ("half", half)])
        results = [*zk.block_stats(model)[:3], zk.dot_noise(model, SEEDS, dist="rademacher")]
        for tensor in (theta, half):
            out, mirror = torch.empty_like(tensor), torch.empty_like(tensor)
            stats = zk.update_scratch_(
                tensor, out, 3, SEEDS[:1], one.view(1), tiny, SEEDS[1], tiny, one, mirror=mirror, **call
            )
            results += [tensor, out, mirror, *stats[:3]]
        return results

    want = run()
    assert (want[0] > 0).all() and want[3].all() and want[4].count_nonzero() > 19 * CHUNK
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        torch.set_num_threads(7)
        got = run()
        still_flushing = (torch.tensor([1e-40]) * 1).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)
    assert_same_bits(got, want)
    assert still_flushing, "the caller's floating-point mode must be left as it was"


def test_nothing_to_do_is_done(cpu):
    empty, rows = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    nothing = zk.Blocks([])
    assert zk.dot_noise(nothing, SEEDS).shape == (3, 0)
    assert len(zk.update_(nothing, SEEDS, COEFS, stats=True).mean) == 0
    out, mirror = torch.empty(0, 4), torch.empty(0, 4)
    stats = zk.update_scratch_(empty, out, 3, SEEDS, COEFS, SCALES, *NEXT, mirror=mirror, stats=True)
    assert stats.mean.isnan().all() and [value.item() for value in stats[1:]] == [0, 0, 0]
    zk.scratch(weights((5, 4)), out, 3, SEEDS[0], COEFS[0], rows=rows, mirror=mirror)
    assert zk.dot_noise(zk.Blocks([("w", empty)]), SEEDS).tolist() == [[0.0]] * 3


def test_the_bits_of_a_block_do_not_depend_on_its_neighbours(cpu):
    """One call over a model cuts it into chunks of one table."""
    together, alone = blocks(), blocks()
    dots, stats = zk.dot_noise(together, SEEDS, stats=True)
    zk.update_(together, SEEDS, COEFS, rounding_seed=ROUNDING_SEED)
    for b, (name, tensor) in enumerate(zip(alone.names, alone.tensors, strict=True)):
        one = zk.Blocks([(name, tensor)], offsets=[alone.offsets[b]])
        some, of_one = zk.dot_noise(one, SEEDS, stats=True)
        assert_same_bits([some[:, 0], *of_one[:3]], [dots[:, b], *(value[b : b + 1] for value in stats[:3])])
        zk.update_(one, SEEDS, COEFS, rounding_seed=ROUNDING_SEED)
        assert torch.equal(bits(tensor), bits(together.tensors[b]))
