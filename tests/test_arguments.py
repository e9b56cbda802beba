"""What the ops refuse, before any kernel runs: each message names the argument or the tensor."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch

import zo_kernels as zk

SEED = zk.seed_tensor(1)
SEEDS = zk.seed_tensor([1, 2])
COEF, COEFS = torch.tensor(0.1), torch.tensor([0.1, 0.2])


def blocks(**kwargs) -> zk.Blocks:
    return zk.Blocks([("a.weight", torch.zeros(3, 4)), ("a.bias", torch.zeros(4))], **kwargs)


def refuses(message: str):
    return pytest.raises(ValueError, match=message)


@pytest.mark.parametrize(
    "bad",
    (
        torch.ones(3),
        torch.ones(2, 1),
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, device="meta"),
    ),
)
def test_a_scale_has_one_fp32_value_per_block_on_the_blocks_device(bad):
    with refuses(r"scale must be float32 of shape \((?:1, )?2,?\) on cpu, got"):
        zk.perturb_(blocks(), SEED, COEF, bad)
    with refuses(r"scale must be float32 of shape \((?:2, )?2,?\) on cpu, got"):
        zk.update_(blocks(), SEEDS, COEFS, bad)


def test_a_scale_is_contiguous():
    with refuses("scale must be contiguous"):
        zk.perturb_(blocks(), SEED, COEF, torch.ones(4)[::2])


@pytest.mark.parametrize(
    ("seeds", "coefs", "message"),
    (
        (SEED, COEFS, "seeds must be int64"),
        (SEEDS.float(), COEFS, "seeds must be int64"),
        (SEEDS[:0], COEFS[:0], "seeds must be int64"),
        (SEEDS, COEFS[:1], "coefs must be float32"),
        (SEEDS, COEFS.double(), "coefs must be float32"),
    ),
)
def test_seeds_and_coefficients_go_in_pairs(seeds, coefs, message):
    with refuses(message):
        zk.update_(blocks(), seeds, coefs)


def test_decay_and_rounding_seed_are_single_values():
    with refuses("decay must be float32"):
        zk.update_(blocks(), SEEDS, COEFS, decay=torch.ones(1))
    with refuses("rounding_seed must be int64"):
        zk.update_(blocks(), SEEDS, COEFS, rounding_seed=SEEDS)


def test_an_unknown_distribution_is_named():
    theta = torch.zeros(4)
    for call in (
        lambda: zk.perturb_(blocks(), SEED, COEF, dist="cauchy"),
        lambda: zk.scratch(theta, theta.clone(), 1, SEED, COEF, dist="cauchy"),
        lambda: zk.draw_noise(4, SEED, 1, dist="cauchy"),
    ):
        with refuses("unknown distribution 'cauchy'; there are: normal, rademacher"):
            call()


def test_a_scratch_has_thetas_dtype_and_shape():
    theta, rows = torch.zeros(5, 4), torch.tensor([0, 2])
    for out in (torch.zeros(4, 5), torch.zeros(5, 4, dtype=torch.bfloat16)):
        with refuses(r"out must be float32 of shape \(5, 4\)"):
            zk.scratch(theta, out, 1, SEED, COEF)
    with refuses(r"out must be float32 of shape \(2, 4\)"):
        zk.scratch(theta, torch.zeros(5, 4), 1, SEED, COEF, rows=rows)
    with refuses("rows must be int64"):
        zk.scratch(theta, torch.zeros(2, 4), 1, SEED, COEF, rows=rows.int())
    with refuses("theta must be a contiguous"):
        zk.scratch(theta.t(), torch.zeros(4, 5), 1, SEED, COEF)
    with refuses("out must be contiguous"):
        zk.scratch(theta, torch.zeros(4, 5).t(), 1, SEED, COEF)
    with refuses("nearest_above must be float32"):
        zk.scratch(theta, theta.clone(), 1, SEED, COEF, nearest_above=torch.ones(1))


def test_a_tensor_that_does_not_float_is_named():
    with refuses("q_proj.weight is int8: .*freeze it, or train an adapter"):
        zk.Blocks([("a", torch.zeros(3)), ("q_proj.weight", torch.zeros(3, dtype=torch.int8))])


def test_two_devices_are_refused():
    with refuses("b is on meta, a on cpu"):
        zk.Blocks([("a", torch.zeros(3)), ("b", torch.zeros(3, device="meta"))])


def test_memory_is_listed_once():
    storage = torch.zeros(10)
    with refuses("block 'a' is listed twice"):
        zk.Blocks([("a", torch.zeros(3)), ("a", torch.zeros(3))])
    for first, second in ((storage, storage), (storage[:6], storage[5:]), (storage, storage[3:4])):
        with refuses("head and embed share memory|embed and head share memory"):
            zk.Blocks([("embed", first), ("head", second)])
    assert len(zk.Blocks([("left", storage[:5]), ("right", storage[5:])])) == 2


def test_a_block_that_lost_its_storage_is_named():
    """A sharding wrapper frees storages behind the parameter's back; nothing is written to any block."""
    named = blocks()
    named.tensors[1].untyped_storage().resize_(0)
    for call in (
        lambda: zk.perturb_(named, SEED, COEF),
        lambda: zk.dot_noise(named, SEEDS),
        lambda: zk.block_stats(named),
    ):
        with refuses("a.bias has lost its storage .*gather or reload it"):
            call()
    assert not named.tensors[0].any()


def test_a_block_that_changed_since_it_was_listed_is_named():
    named, parameter = blocks(), torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    later = zk.Blocks([("w", parameter)])
    parameter.data = torch.zeros(5)
    with refuses("w has 5 elements now, 4 when it was listed: list it again"):
        zk.update_(later, SEEDS, COEFS)
    parameter.data = torch.zeros(4, dtype=torch.int32)
    with refuses("w is int32: "):
        zk.update_(later, SEEDS, COEFS)
    first = named.refresh()
    assert named.refresh() is first  # what backends key their tables on
    square = torch.nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    later = zk.Blocks([("w", square)])
    first, square.data = later.refresh(), square.data.t()  # at the same address
    assert later.refresh() is not first


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))), ids=("copy", "pickle"))
def test_a_copy_of_blocks_works_on_its_own_tensors(duplicate):
    own = blocks()
    zk.perturb_(own, SEED, COEF)
    other = duplicate(own)
    before = [tensor.clone() for tensor in own.tensors]
    zk.perturb_(other, SEED, -COEF)
    assert all(map(torch.equal, own.tensors, before))
    assert all(tensor.abs().max() < 1e-6 for tensor in other.tensors)


def test_an_expanded_view_is_refused():
    with refuses(r"w repeats its elements \(an expanded view\)"):
        zk.Blocks([("w", torch.zeros(3, 1).expand(3, 4))])


def test_a_scratch_is_not_part_of_theta():
    storage = torch.zeros(20)
    for out, mirror, message in (
        (storage[:10], None, "theta and out share memory|out and theta share memory"),
        (storage[5:15], None, "theta and out share memory|out and theta share memory"),
        (storage[10:], storage[10:], "out and mirror share memory|mirror and out share memory"),
    ):
        with refuses(message):
            zk.scratch(storage[:10], out, 1, SEED, COEF, mirror=mirror)
        with refuses(message):
            zk.update_scratch_(storage[:10], out, 1, SEEDS, COEFS, None, SEED, COEF, mirror=mirror)
    assert not storage.any()


def test_a_fused_update_names_the_argument_that_is_wrong():
    theta, out = torch.zeros(8), torch.ones(8)
    good = {"seeds": SEEDS, "coefs": COEFS, "scale": None, "next_seed": SEED, "next_coef": COEF}
    for name, bad in (
        ("coefs", COEFS[:1]), ("scale", torch.ones(3)), ("next_seed", SEEDS), ("next_coef", COEFS),
        ("next_scale", COEFS), ("decay", COEFS), ("rounding_seed", SEEDS), ("nearest_above", COEFS),
    ):  # fmt: skip
        with refuses(f"{name} must be"):
            zk.update_scratch_(theta, out, 1, **good | {name: bad})
    with refuses("mirror must be float32 of shape"):
        zk.update_scratch_(theta, out, 1, **good, mirror=torch.ones(4))
    with refuses("seeds must be int64"):
        zk.dot_noise(blocks(), SEED)
    with refuses("stats need all of theta"):
        zk.scratch(torch.zeros(4, 4), torch.zeros(1, 4), 1, SEED, COEF, rows=torch.tensor([0]), stats=True)
    assert not theta.any()


def test_an_unknown_backend_is_named_with_those_that_exist(monkeypatch):
    message = r"unknown backend 'tpu'; there are: reference \(available\), cpu \(.*\), triton \(.*\)"
    with refuses(message), zk.use_backend("tpu"):
        pass
    monkeypatch.setenv("ZO_BACKEND", "tpu")
    with refuses(message):
        zk.perturb_(blocks(), SEED, COEF)


def test_an_unavailable_backend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zo_kernels._C", None)
    with refuses(r"backend 'cpu' is not available: zo_kernels._C is not built: install a C\+\+17 compiler"):
        with zk.use_backend("cpu"):
            pass
    monkeypatch.delenv("ZO_BACKEND", raising=False)
    with pytest.warns(UserWarning, match="ops on cpu tensors run in plain torch, slowly: zo_kernels._C is not built"):
        assert zk.backend_name("cpu") == "reference"


def test_a_gpu_too_old_for_the_cuda_module_gets_its_statistics_from_triton(monkeypatch):
    import zo_kernels.dispatch as dispatch

    def refuses_to_load(device):
        raise RuntimeError("block_stats: cudaErrorNoKernelImageForDevice")

    module = types.SimpleNamespace(load_kernels=lambda device: None, __spec__=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "zo_kernels._cuda", module)
    monkeypatch.setattr(zk, "_cuda", module, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "_loads", dispatch._loads.__wrapped__)
    monkeypatch.delenv("ZO_BACKEND", raising=False)
    assert zk.backend_name("cuda", "block_stats") == "cuda"
    assert zk.backend_name("cuda") != "cuda"
    module.load_kernels = refuses_to_load
    with pytest.warns(UserWarning, match="come from Triton, not from zo_kernels._cuda: .*NoKernelImage"):
        assert zk.backend_name("cuda", "block_stats") == "triton"


def test_a_backend_choice_ends_with_its_block(monkeypatch):
    monkeypatch.delenv("ZO_BACKEND", raising=False)
    before = zk.backend_name("cpu")
    with pytest.raises(KeyError), zk.use_backend("reference"):
        assert zk.backend_name("cpu") == "reference"
        raise KeyError
    assert zk.backend_name("cpu") == before


def test_the_cpu_backend_refuses_pointers_of_other_devices(monkeypatch):
    if reason := zk.why_unavailable("cpu"):
        pytest.skip(reason)
    from zo_kernels.backends import cpu

    monkeypatch.setattr("zo_kernels.ops.backend", lambda *_: cpu)  # shapes alone have a backend of their own
    theta, seed, coef = (t.to("meta") for t in (torch.zeros(4), SEED, COEF))
    with zk.use_backend("cpu"):
        for call in (
            lambda: zk.perturb_(zk.Blocks([("w", theta)]), seed, coef),
            lambda: zk.scratch(theta, theta.clone(), 1, seed, coef),
            lambda: zk.draw_noise(4, seed, 1),
            lambda: zk.words(4, seed, 1, 0),
            lambda: zk.block_stats(zk.Blocks([("w", theta)])),
        ):
            with refuses("the cpu backend works on cpu tensors, got meta"):
                call()
