"""`axpy_` of the Triton backend against the reference: updates of whole lists, two noises in one pass, odd tensors."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
import triton_target
from triton_target import DTYPES, assert_rounded, blocks_of, misfits, mixed, put, step_error, updated

from zo_kernels import noise as contract
from zo_kernels.backends import reference
from zo_kernels.blocks import Blocks
from zo_kernels.ops import seed_tensor
from zo_kernels.triton_kernels.table import chunk_starts

interpreted, target = triton_target.interpreted, triton_target.target  # fixtures


CASES = {  # coefs, decay, scale, rounding seed
    "1": ([1e-3], None, None, None),
    "1 stochastic": ([1e-3], 0.99, "block", 2**63 + 11),
    "2": ([1e-3, -3e-2], None, "direction", None),
    "2 stochastic": ([1e-3, -3e-2], 0.99, "block", 2**63 + 11),
    "any": ([1e-3, 2e-3, -1e-2], 0.99, None, None),
    "any stochastic": ([1e-3, 2e-3, -1e-2], None, "direction", 2**63 + 11),
}


def assert_updated(target, ours, plain, coefs, *, rounding, offsets=None, **options):
    """The updates `ours` by normals against the reference on fp32 copies of the tensors `plain`."""
    accs = updated(
        reference, [t.to(torch.float32, copy=True) for t in plain], coefs, "normal", offsets=offsets, **options
    )
    blocks = blocks_of(plain, offsets)
    for b, (actual, acc) in enumerate(zip(ours, accs, strict=True)):
        elements = torch.arange(acc.numel()).view(acc.shape) + blocks.offsets[b]
        bits = None if rounding is None else contract.rounding_bits(elements, seed_tensor(rounding), blocks.ids[b])
        assert_rounded(actual, acc, step_error(target, acc, coefs), bits)


@pytest.mark.parametrize("case", CASES)
def test_axpy_equals_the_reference(target, case):
    coefs, decay, scale, rounding = CASES[case]
    options = {"decay": decay, "scale": scale, "rounding": rounding}
    signs = updated(target.backend, mixed(target.device), coefs, "rademacher", **options)
    for ours, theirs in zip(signs, updated(reference, mixed(), coefs, "rademacher", **options), strict=True):
        assert torch.equal(ours, theirs)
    normals = updated(target.backend, mixed(target.device), coefs, "normal", **options)
    assert_updated(target, normals, mixed(), coefs, **options)
    for old, new in zip(mixed(), normals, strict=True):
        assert not torch.equal(old, new) or old.numel() == 1


def test_misaligned_and_strided_tensors_take_the_masked_form(target):
    tensors, offsets = misfits(target.device)
    options = {"offsets": offsets, "scale": "block", "rounding": 3}
    plain = [tensor.contiguous() for tensor in misfits()[0]]
    normals = updated(target.backend, tensors, [1e-2], "normal", **options)
    assert_updated(target, normals, plain, [1e-2], **options)
    signs = updated(target.backend, misfits(target.device)[0], [1e-2], "rademacher", **options)
    for ours, theirs in zip(signs, updated(reference, plain, [1e-2], "rademacher", **options), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 7), (torch.float16, 7)],
    ids=str,
)
def test_all_forms_give_the_same_bits(target, monkeypatch, dtype, rounding):
    """Tile and chunk size, warps, alignment, place in a shard, neighbours of another dtype and statistics that ride on
    the pass change no bit of a normal update."""
    size, shift = 3000, 256
    theta = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype)

    def run(*, block=2048, chunk=1 << 16, warps=4, form=None):
        monkeypatch.setitem(target.backend.launch.OPTIONS, "num_warps", warps)
        monkeypatch.setattr(target.backend.launch, "BLOCK", block)
        monkeypatch.setattr(target.backend.launch, "CHUNK", chunk)
        whole = theta.clone().to(target.device)
        options = {"scale": None, "rounding": rounding}
        if form == "misaligned":
            storage = torch.empty(size + 1, dtype=dtype, device=target.device)
            whole = storage[1:].copy_(whole)
        if form == "sharded":  # two shards, the second at an offset; same name, so same noise
            parts = [whole[:shift], whole[shift:]]
            for part, offset in zip(parts, (0, shift), strict=True):
                updated(target.backend, [part], [1e-2, 3e-2], "normal", offsets=[offset], **options)
            return whole.cpu()
        others = mixed(target.device)[::3] if form == "mixed" else []
        stats = triton_target.stats_of(1, target.device) if form == "statistics" else None
        return updated(target.backend, [whole, *others], [1e-2, 3e-2], "normal", stats=stats, **options)[0]

    expected = run()
    assert torch.equal(run(block=512, warps=8), expected)
    assert torch.equal(run(block=1024, chunk=1024), expected)
    for form in ("misaligned", "sharded", "mixed", "statistics"):
        assert torch.equal(run(form=form), expected), form


@pytest.mark.parametrize("scale", [None, "block", "direction"])
def test_two_noises_in_one_pass_are_the_passes_one_after_the_other(target, scale):
    """The way back, the update and the next perturbation of fp32 weights: two directions."""
    theta = torch.randn(3001, generator=torch.Generator().manual_seed(6)).to(target.device)
    scales = {None: None, "block": torch.tensor([1.5]), "direction": torch.tensor([[1.5], [0.5]])}[scale]

    def step(tensor, part):
        target.backend.axpy_(
            Blocks([("theta", tensor)]),
            seed_tensor([3, 4][part], target.device),
            put([-1e-3, 2e-3][part], target.device),
            put(scales[part] if scale == "direction" else scales, target.device),
            None,
            None,
            "normal",
            None,
        )

    together, apart = theta.clone(), theta.clone()
    step(together, slice(0, 2))
    step(apart, slice(0, 1))
    step(apart, slice(1, 2))
    assert torch.equal(together, apart) and not torch.equal(together, theta)


@pytest.mark.parametrize("rounding", [None, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_values_round_as_in_the_reference(target, dtype, rounding):
    """Subnormals, the binade borders, the largest finite values, infinity."""
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    edges = [0.0, -0.0, tiny / 2, -tiny / 2, tiny, -tiny, largest, -largest, math.inf, -math.inf]
    spread = tiny * torch.exp2(torch.linspace(-12, 2, 700))
    for coef in (tiny / 16, tiny * 0.7, largest / 300, math.inf):
        values = torch.cat([torch.tensor(edges).repeat(20), spread, -spread]).to(dtype)
        arguments = ([coef], "rademacher")
        expected = updated(reference, [values.clone()], *arguments, rounding=rounding)[0]
        with numpy.errstate(all="ignore"):  # the interpreter's overflows
            actual = updated(target.backend, [values.to(target.device)], *arguments, rounding=rounding)[0]
        assert torch.equal(actual.isnan(), expected.isnan())
        bits, expected_bits = (t[~expected.isnan()].view(torch.int16) for t in (actual, expected))
        assert torch.equal(bits, expected_bits)  # the sign of zero too


@pytest.mark.parametrize("rounding", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_a_nan(target, dtype, rounding):
    theta = torch.full((300,), math.nan, dtype=dtype, device=target.device)
    assert updated(target.backend, [theta], [1e-3], "normal", rounding=rounding)[0].isnan().all()
    theta = torch.ones(300, dtype=dtype, device=target.device)
    full = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # the NaN that a GPU computes
    assert updated(target.backend, [theta], full, "normal", rounding=rounding)[0].isnan().all()


def test_the_tables_of_a_list(interpreted):
    """One group for all that is aligned, whatever its dtypes; misfits are told by name; built once."""
    blocks = blocks_of(mixed())
    tables = interpreted._tables(blocks)
    (group,) = tables.groups
    assert group.aligned and len(group.dtypes) == 3
    assert interpreted.misfits(blocks) == []
    assert interpreted._tables(blocks) is tables
    (uniform,) = interpreted._tables(blocks_of(mixed()[:3])).groups
    assert len(uniform.dtypes) == 1
    tensors, offsets = misfits()
    both = blocks_of(mixed() + tensors, offsets=[0] * 9 + offsets)
    assert interpreted.misfits(both) == [f"block{i}" for i in range(9, 27)]
    groups = interpreted._tables(both).groups
    assert [(group.aligned, group.dims) for group in groups] == [(True, 0), (False, 3), (False, 2), (False, 0)]


def test_chunks_are_cut_at_multiples_in_the_global_index():
    assert chunk_starts(2048, 0, 1024).tolist() == [0, 1024]
    assert chunk_starts(2049, 0, 1024).tolist() == [0, 1024, 2048]
    assert chunk_starts(2000, 2**35 - 131, 1024).tolist() == [-125, 131, 1155]


def test_a_replaced_storage_is_found(target):
    """`param.data = ...` after the tables were built: the new storage is written, the old one is not."""
    parameter = torch.nn.Parameter(torch.ones(300, device=target.device), requires_grad=False)
    blocks = Blocks([("weight", parameter)])
    one = torch.ones(1, device=target.device)
    arguments = (seed_tensor([1], target.device), one, None, None, None, "rademacher", None)
    target.backend.axpy_(blocks, *arguments)
    old, kept = parameter.data, parameter.data.clone()
    parameter.data = torch.ones(300, device=target.device)
    target.backend.axpy_(blocks, *arguments)
    assert torch.equal(old, kept)
    assert torch.equal(parameter.data, kept)


def test_a_list_of_nothing_launches_nothing(target):
    device = target.device
    one = torch.ones(1, device=device)
    for blocks in (Blocks([]), Blocks([("empty", torch.empty(0, 4, device=device))])):
        target.backend.axpy_(blocks, seed_tensor([1], device), one, None, None, None, "normal", None)
