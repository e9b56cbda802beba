"""`update_state_` against its rules with z materialised, on every CPU backend, in fp64; to the bit what is exact."""

from __future__ import annotations

import numpy
import pytest
import torch
from test_forms import FORMS, companions, form_of, mixed, moved, rounded
from test_ops import COEFS, DISTS, DTYPES, ROUNDING_SEED, SEEDS, assert_same_bits, bits, clones, weights

import zo_kernels as zk

NUMBERS = {
    "momentum": [1e-2, 0.9],
    "adam": [1e-2, 0.9, 0.99, 1e-8, 0.19, 0.0199],
    "adamm": [1e-2, 0.9, 0.99, 1e-10],
    "sign": [1e-2],
    "sign-ema": [1e-2, 0.9],
    "curvature": [0.1, 0.7],
    "shifted-mean": [-0.3, 0.0, 0.02, 0.0],
}
RULES = tuple(zk.RULES)
SCALES = torch.tensor([0.5, 2.0, 1.0])


def numbers(rule: str) -> torch.Tensor:
    return torch.tensor(NUMBERS[rule])


def states_of(rule: str, tensors, seed: int = 3) -> list[list[torch.Tensor]]:
    """A state as after some steps: signed means, positive squares (vmax partly below the next v)."""
    found = []
    for place, name in enumerate(zk.RULES[rule].states):
        generator = torch.Generator().manual_seed(seed + place)
        values = [torch.randn(t.shape, generator=generator) * 0.1 for t in tensors]
        found.append([v.square() + 0.01 if name in ("v", "vmax", "h") else v for v in values])
    return found


def run(named, rule, *, keep=None, offsets=None, ids=None, seed=3, **options):
    """(blocks, states) after one call over copies; `options` may replace any argument."""
    blocks = zk.Blocks(clones(named), ids, offsets)
    states = states_of(rule, blocks.tensors, seed)
    arguments = {"numbers": numbers(rule), "decay": torch.tensor(0.99), "rounding_seed": ROUNDING_SEED} | options
    zk.update_state_(blocks, rule, states, SEEDS, arguments.pop("coefs", COEFS), keep=keep, **arguments)
    return blocks.tensors, states


def in_fp64(rule, theta, states, zs, steps, numbers, weights=None):
    """(theta, states) after a step, written from the papers' formulas: numpy, fp64."""
    e = sum(step * z for step, z in zip(steps, zs, strict=True))
    n = [float(number) for number in numbers]
    if rule == "momentum":
        m = n[1] * states[0] + e
        return theta - n[0] * m, [m]
    if rule in ("adam", "adamm"):
        m = n[1] * states[0] + (1 - n[1]) * e
        v = n[2] * states[1] + (1 - n[2]) * e * e
        if rule == "adam":
            return theta - n[0] * (m / n[4]) / (numpy.sqrt(v / n[5]) + n[3]), [m, v]
        largest = numpy.maximum(states[2], v)
        return theta - n[0] * m / (numpy.sqrt(largest) + n[3]), [m, v, largest]
    if rule == "sign":
        return theta - n[0] * numpy.sign(e), []
    if rule == "sign-ema":
        m = n[1] * states[0] + (1 - n[1]) * e
        return theta - n[0] * numpy.sign(m), [m]
    if rule == "curvature":
        h = (1 - n[0]) * states[0] + n[0] * n[1] * states[0] * zs[0] ** 2
        return theta + e / numpy.sqrt(h), [h]
    along = sum(w * z for w, z in zip(weights, zs, strict=True))
    return theta + n[0] * states[0] + along, [states[0] + e]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("shape", ((1,), (5, 7), (2053,)))
@pytest.mark.parametrize("scale", (None, SCALES[:1], SCALES[:, None]), ids=("plain", "block", "direction"))
def test_a_rule_is_its_formula(backend, rule, dist, shape, scale):
    """Two steps in a row.  Budget: 30 roundings of values of the size of what is summed; a sign may differ where its
    argument is that near to zero."""
    offset, theta = 2**33 + 12345, weights(shape)
    blocks = zk.Blocks([("w", theta.clone())], {"w": 9}, [offset])
    states = states_of(rule, [theta])
    steps = (COEFS if scale is None else COEFS * scale.view(-1)).double().numpy()
    drawn = torch.tensor(NUMBERS["shifted-mean"][1:]) * (1.0 if scale is None else scale.view(-1))
    drawn = drawn.double().numpy()
    wanted, wanted_states = theta.double().numpy(), [state[0].double().numpy() for state in states]
    for seeds in (SEEDS, SEEDS.flip(0)):
        zs = [zk.draw_noise(shape, s, 9, start=offset, dist=dist).double().numpy() for s in seeds]
        zk.update_state_(
            blocks, rule, states, seeds, COEFS, scale, numbers=numbers(rule), decay=torch.tensor(0.99), dist=dist
        )
        decay = float(torch.tensor(0.99))
        wanted, wanted_states = in_fp64(rule, wanted * decay, wanted_states, zs, steps, numbers(rule), drawn)
    size = 30 * 2.0**-24
    for ours, theirs in zip(states, wanted_states, strict=True):
        reach = numpy.abs(theirs) + 2 * numpy.abs(steps).max() * (numpy.abs(zs).max(axis=0) + 1) ** 2
        assert (numpy.abs(ours[0].numpy() - theirs) <= size * reach).all()
    new = blocks.tensors[0].double().numpy()
    slack = size * (numpy.abs(wanted) + 1)
    if rule in ("adam", "adamm"):
        slack += 1e-6  # a ratio of two states
    if rule == "curvature":
        slack = slack * (1 + 2 / numpy.sqrt(wanted_states[0]))
    far = numpy.abs(new - wanted) > slack
    assert far.mean() <= (0.001 if rule.startswith("sign") else 0), numpy.abs(new - wanted).max()
    assert numpy.abs(new - theta.numpy() * decay**2).max() > 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("rounding_seed", (None, ROUNDING_SEED), ids=("nearest", "stochastic"))
def test_theta_is_rounded_once_from_what_fp32_weights_become(backend, rule, dtype, rounding_seed):
    theta, offset = weights((2053,), dtype), 5
    place = {"offsets": [offset], "ids": {"w": 9}, "rounding_seed": rounding_seed}
    [ours], states = run([("w", theta)], rule, **place)
    [wide], same_states = run([("w", theta.float())], rule, **place)
    assert torch.equal(bits(ours), bits(rounded(wide, 9, rounding_seed, dtype, offset)))
    assert_same_bits([s[0] for s in states], [s[0] for s in same_states])


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_is_not_kept_leaves_every_bit(backend, rule):
    named = mixed()
    bad = torch.tensor([float("nan"), float("inf"), 0.1])
    tensors, states = run(named, rule, keep=torch.tensor(False), coefs=bad)
    assert_same_bits(tensors, [tensor for _, tensor in named])
    for ours, theirs in zip(states, states_of(rule, tensors), strict=True):
        assert_same_bits(ours, theirs)
    kept, kept_states = run(named, rule, keep=torch.tensor(True))
    plain, plain_states = run(named, rule)
    assert_same_bits(kept, plain)
    for ours, theirs in zip(kept_states, plain_states, strict=True):
        assert_same_bits(ours, theirs)
    assert not torch.equal(kept[1], named[1][1])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "shifted-mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_leaves_theta_alone(backend, rule, dtype):
    theta = weights((1003,), dtype)
    blocks = zk.Blocks([("w", theta.clone())])
    first = torch.ones if rule == "curvature" else torch.zeros
    states = [[first(1003)] for _ in zk.RULES[rule].states]
    zk.update_state_(blocks, rule, states, SEEDS, torch.zeros(3), numbers=numbers(rule), rounding_seed=ROUNDING_SEED)
    assert torch.equal(bits(blocks.tensors[0]), bits(theta))
    if rule != "curvature":
        assert not any(state[0].any() for state in states)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dist", DISTS)
def test_one_call_over_blocks_equals_a_call_per_block(backend, rule, dist):
    named, scale = mixed(), torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) + 0.5
    together, states = run(named, rule, scale=scale, dist=dist)
    for b, (name, tensor) in enumerate(named):
        blocks = zk.Blocks([(name, tensor.clone())])
        own = [[state[b].clone()] for state in states_of(rule, [t for _, t in named])]
        zk.update_state_(
            blocks, rule, own, SEEDS, COEFS, scale[:, b : b + 1].contiguous(), numbers=numbers(rule),
            decay=torch.tensor(0.99), rounding_seed=ROUNDING_SEED, dist=dist,
        )  # fmt: skip
        assert_same_bits([*blocks.tensors, *(s[0] for s in own)], [together[b], *(s[b] for s in states)])


@pytest.mark.parametrize("rule", RULES)
def test_a_shard_is_a_slice_of_the_whole(backend, rule):
    theta, cuts = weights((2053,), torch.bfloat16), (0, 1, 1003, 2053)
    [whole], states = run([("w", theta)], rule, ids={"w": 9})
    before = states_of(rule, [theta])
    for a, b in zip(cuts, cuts[1:], strict=False):
        shard = zk.Blocks([("w", theta[a:b].clone())], {"w": 9}, offsets=[a])
        own = [[state[0][a:b].clone()] for state in before]
        options = {"numbers": numbers(rule), "decay": torch.tensor(0.99), "rounding_seed": ROUNDING_SEED}
        zk.update_state_(shard, rule, own, SEEDS, COEFS, **options)
        assert_same_bits([*shard.tensors, *(s[0] for s in own)], [whole[a:b], *(s[0][a:b] for s in states)])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("view", (lambda t: t.t(), lambda t: t[:, 3:40]), ids="tn")
def test_the_states_of_a_view_count_its_elements_in_order(backend, rule, view):
    storage = weights((33, 65), torch.bfloat16)
    before, tensor = storage.clone(), view(storage)
    [whole], states = run([("w", tensor.clone().contiguous())], rule, ids={"w": 9})
    own = states_of(rule, [tensor])
    options = {"numbers": numbers(rule), "decay": torch.tensor(0.99), "rounding_seed": ROUNDING_SEED}
    zk.update_state_(zk.Blocks([("w", tensor)], {"w": 9}), rule, own, SEEDS, COEFS, **options)
    assert_same_bits([tensor, *(s[0] for s in own)], [whole, *(s[0] for s in states)])
    inside = torch.zeros_like(storage, dtype=torch.bool)
    view(inside).fill_(True)
    assert torch.equal(bits(storage)[~inside], bits(before)[~inside])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dist", DISTS)
def test_a_gradient_in_a_form(backend, name, dist):
    """Momentum without memory keeps the gradient itself."""
    theta = weights((2053,), torch.bfloat16)
    state, m = companions(name, theta), torch.full((2053,), 7.0)
    blocks = zk.Blocks([("w", theta.clone())], {"w": 9})
    form = form_of(name, [state], torch.tensor([0.015]))
    zk.update_state_(blocks, "momentum", [[m]], SEEDS, COEFS, numbers=torch.tensor([0.0, 0.0]), form=form, dist=dist)
    want = moved(name, theta, state, 9, SEEDS, COEFS, dist, start=torch.zeros(2053))
    assert torch.equal(m, want)
    assert torch.equal(bits(blocks.tensors[0]), bits(theta))


@pytest.mark.parametrize(
    ("rule", "name"), [(rule, name) for rule in RULES for name in FORMS if name == "plain" or zk.RULES[rule].forms]
)
def test_the_cpu_rules_are_the_references(cpu, rule, name):
    """Signs: equal bits.  Normals: states within the contract's bound on z and two roundings."""
    named = [(f"{dtype} {n}", weights((n,), dtype, seed=n)) for dtype in DTYPES for n in (1, 127, 5003)]
    states = [companions(name, tensor, seed=i) for i, (_, tensor) in enumerate(named)]
    form = form_of(name, states, torch.full((9,), 0.015))
    results = []
    for module in ("cpu", "reference"):
        with zk.use_backend(module):
            call = {"offsets": [5, 0, 2**32 - 1001] * 3, "form": form}
            tensors, own = run(named, rule, dist="rademacher", **call)
            results.append([*tensors, *(s for state in own for s in state)])
            _, own = run(named, rule, **call)
            results.append([s for state in own for s in state])
    assert_same_bits(results[0], results[2])
    for ours, theirs in zip(results[1], results[3], strict=True):
        reach = 60 if name == "weighted" else 1  # noise divided by the root of 2^-12
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * reach**2)


def test_what_a_rule_refuses(backend):
    blocks = zk.Blocks([("a.weight", torch.zeros(3, 4)), ("a.bias", torch.zeros(4))])
    good = {
        "rule": "adam", "states": [[torch.ones(3, 4), torch.ones(4)] for _ in range(2)], "seeds": SEEDS,
        "coefs": COEFS, "numbers": numbers("adam"),
    }  # fmt: skip
    m, v = good["states"]
    for wrong, message in (
        ({"rule": "lion"}, "unknown rule 'lion'; there are: momentum, adam, adamm, sign, sign-ema, curvature"),
        ({"states": [m]}, r"adam has 2 states \(m, v\), got 1"),
        ({"states": [m, v[:1]]}, "v must be a list of 2 tensors, one per block, got 1"),
        ({"states": [m, [v[0], v[1].double()]]}, r"v of a.bias must be float32 of shape \(4,\) on cpu, got float64"),
        ({"states": [[m[0].t(), m[1]], v]}, r"m of a.weight must be float32 of shape \(3, 4\)"),
        ({"states": [m, [v[0], m[1]]]}, "(m|v) of a.bias and (m|v) of a.bias share memory"),
        ({"states": [[blocks.tensors[0], m[1]], v]}, "a.weight and m of a.weight|m of a.weight and a.weight"),
        ({"numbers": numbers("adamm")}, r"numbers must be float32 of shape \(6,\)"),
        ({"seeds": SEEDS[:0], "coefs": COEFS[:0]}, "seeds must be int64"),
        ({"coefs": COEFS[:2]}, "coefs must be float32"),
        ({"scale": torch.ones(3)}, r"scale must be float32 of shape \(2,\)"),
        ({"keep": torch.tensor(1)}, r"keep must be bool of shape \(\)"),
        ({"keep": torch.tensor([True])}, r"keep must be bool of shape \(\)"),
        ({"decay": torch.ones(1)}, "decay must be float32"),
        ({"rounding_seed": SEEDS}, "rounding_seed must be int64"),
        ({"form": zk.weighted(m[0])}, "h must be a list of 2 tensors"),
        ({"dist": "cauchy"}, "unknown distribution 'cauchy'"),
        ({"rule": "curvature", "states": [m], "numbers": torch.ones(2), "form": zk.weighted(v)},
         "curvature makes its own form of the directions: pass form=None"),
        ({"rule": "shifted-mean", "states": [m], "numbers": torch.ones(2)}, r"numbers must be .* of shape \(4,\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            zk.update_state_(blocks, **good | wrong)
    assert not any(tensor.any() for tensor in blocks.tensors) and all((t == 1).all() for t in m + v)
    zk.update_state_(blocks, **good)
    assert blocks.tensors[0].any()
