"""What holds for every method, whatever its equations: one battery, over all of them and some compositions."""

from __future__ import annotations

import math

import pytest
import torch
from every_method import CASES, METHOD, engine_of, flat, kept, method, noise, same
from models import tiny, tokens
from problems import LR, SEED, Problem, run
from test_hf import Rows, arguments

from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.hf import ZOTrainer
from zo_finetuner.optim import Composed, make_method
from zo_kernels import Blocks, derive_seed, dot_noise, use_backend


@METHOD
def test_an_update_goes_the_way_its_probes_went(case):
    """The change of a first step lies in the span of the displacements that the closure has met, and is made of the
    very noise of the step's seeds; of rules that take each coordinate by itself, the signs are those of the span."""
    engine = engine_of(case)
    before = flat(engine)
    run(engine, lr=1.0 if case == "bszo" else 1e-3)  # BSZO's prior shrinks a step of few weights to nothing
    change = flat(engine) - before
    signs = isinstance(engine.method, Composed) and type(engine.method.rule).__name__ in ("Adam", "AdaMM")
    signs |= case in ("elementwise sign", "ldsd-adamm", "ldsd-jaguar")
    if case == "forward-grad":  # it met theta alone
        ways = noise(derive_seed(SEED, 0, 0))[:, None]
    else:
        ways = torch.stack([seen - before for seen in engine.model.seen], 1)
    if not signs:
        # A weight near 1 is rounded by 6e-8, a change is some 1e-3; HiZOO's h has moved by alpha c z^2 h in between.
        error = 1e-2 if case == "hizoo" else 1e-3
        left = change - ways @ torch.linalg.lstsq(ways, change, driver="gelsd").solution
        assert left.norm() < error * change.norm()
    elif ways.shape[1] == 2:
        cosine = change.sign() @ ways[:, 0].sign() / ways[:, 0].count_nonzero()
        assert cosine.abs() == 1
    assert change.norm() > 1e-5
    if engine.method.directions == 1 and not signs and "mask" not in case and case != "sparse-mezo":
        start, blocks = Problem(), engine.blocks
        moved = [p - q.detach() for p, q in zip(blocks.tensors, start.parameters(), strict=True)]
        moved = Blocks(zip(blocks.names, moved, strict=True))
        dots = dot_noise(moved, engine.inputs.seeds[0].reshape(1), dist=engine.method.dist).sum()
        z = noise(derive_seed(SEED, 0, 0), engine.method.dist)
        cosine = dots.abs() / (change.norm() * z.norm())
        assert cosine.item() == pytest.approx(1, abs=1e-2 if case == "hizoo" else 1e-5)


@METHOD
def test_all_probings_agree(case):
    """In place a step's probes are those of a scratch to rounding, through any order of directions."""
    ends = {}
    if method(case).low_rank:  # `copied` is the dense form of its probes: tests/test_lowrank_probing.py
        for mode in ("scratch", "inplace", "paired"):
            with pytest.raises(InputError, match="leave probing auto"):
                Engine(Problem(), method(case), probing=mode)
        return
    for mode in ("scratch", "inplace", "paired"):
        if mode == "inplace" and method(case).scratch_only:
            with pytest.raises(InputError, match="use --probing scratch"):
                engine_of(case, mode)
            continue
        engine = engine_of(case, mode)
        run(engine, 3, lr=1e-3)
        ends[mode] = flat(engine)
    assert torch.equal(ends["paired"], ends["scratch"])
    if "inplace" in ends:
        # A weight moved in place is off by 1e-7, a loss near 20 by 2e-6, g by 1e-5: 1e-3 of steps of that; bf16 means
        # and rules that take signs pass on more.
        assert (ends["inplace"] - ends["scratch"]).abs().max() < 5e-5


@METHOD
def test_reference_and_cpu_agree(case):
    """Random signs are bit-equal on all backends, so all that is made of them is."""
    ends = []
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            engine = engine_of(case, dist="rademacher")
            run(engine, 3)
            ends.append((flat(engine), kept(engine)))
    if case == "dizo" or method(case).low_rank:  # draws normals, for its factors and for its subspaces
        assert (ends[0][0] - ends[1][0]).abs().max() < 1e-6
    else:
        assert torch.equal(ends[0][0], ends[1][0]) and same(ends[0][1], ends[1][1])


@METHOD
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    whole = engine_of(case)
    run(whole, 3), flat(whole)  # to save is to merge what is collected
    run(whole, 2)
    first = engine_of(case)
    run(first, 3)
    torch.save({"model": first.model.state_dict(), "engine": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = engine_of(case, seed=0)
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["engine"])
    run(second, 2)
    assert torch.equal(flat(second), flat(whole)) and same(kept(second), kept(whole))


@METHOD
def test_equal_losses_leave_weights_alone(case):
    """Ties, zero spread, zero gradient: no direction is better than another."""
    engine = engine_of(case)
    before = flat(engine)
    for _ in range(3):
        engine.step(lambda: engine.model() * 0 + 15.0, LR)  # losses here are about 20: no explosion follows
    assert torch.equal(flat(engine), before)
    assert engine.metrics()["skipped_steps"] == 0
    run(engine)
    assert torch.isfinite(flat(engine)).all() and (case == "dizo" or not torch.equal(flat(engine), before))


@METHOD
def test_a_loss_that_is_not_finite_leaves_no_trace(case):
    """Whichever of a step's losses it is: weights, states and memory keep their bits, and the run goes on."""
    engine = engine_of(case)
    run(engine, 1)
    losses = engine.method.forwards if case != "forward-grad" else 1
    for bad in range(min(losses, 6)):
        before, memory, count = flat(engine), kept(engine), iter(range(99))

        def loss(bad=bad, count=count):
            return engine.model() * (math.nan if next(count) == bad else 1)

        if case == "dizo" and (engine.step_count % 4) >= 2:
            run(engine, 1)  # a projection's step only forgets its round
            continue
        assert math.isnan(engine.step(loss, LR))
        assert torch.equal(flat(engine), before), bad
        assert same(kept(engine), memory), bad
    skipped = engine.metrics()["skipped_steps"]
    assert skipped >= 1
    run(engine, 2)
    assert torch.isfinite(flat(engine)).all() and engine.metrics()["skipped_steps"] == skipped
    assert not torch.equal(flat(engine), before)


@METHOD
def test_an_exception_leaves_no_trace(case):
    """In any of a step's forwards, with memory that `ask` or a first round has written already."""
    engine, twin = engine_of(case), engine_of(case)
    run(engine, 2), run(twin, 2)
    for at in range(1 if case == "forward-grad" else method(case).forwards):
        before, memory, count = flat(engine), kept(engine), iter(range(99))

        def loss(at=at, count=count):
            if next(count) == at:
                raise KeyboardInterrupt
            return engine.model()

        with pytest.raises(KeyboardInterrupt):
            engine.step(loss, LR)
        assert torch.equal(flat(engine), before) and same(kept(engine), memory), at
    run(engine, 2), run(twin, 2)
    if method(case).low_rank:
        # Merged at other steps, to other roundings: either loss is off by an ulp of 1.9e-6, g by 1.9e-5, along a
        # direction of up to 10, in two steps.
        assert (flat(engine) - flat(twin)).abs().max() < 2 * 1.9e-5 * LR * 10
    else:
        assert torch.equal(flat(engine), flat(twin))


@METHOD
def test_frozen_and_tied_tensors(case):
    """A frozen tensor stays and changes nobody's noise; a tied one has one noise and one state."""
    ids, ends = tokens(), []
    for freeze in (False, True):
        model = tiny("llama-tied")
        model.model.norm.weight.requires_grad_(not freeze)
        settings = {"project": "k_proj,v_proj"} if case == "dizo" else {}
        engine = engine_of(case, model=model, **settings)
        assert "lm_head.weight" not in engine.blocks.names
        assert ("model.norm.weight" in engine.blocks.names) is not freeze
        assert all(len(v) <= len(engine.blocks) for v in engine.method.state_dict().values() if isinstance(v, list))
        seen = []

        def loss(model=model, seen=seen):
            # Inside the forward, so that the perturbed weights are seen: q_proj's through its hook's input and output.
            return model(input_ids=ids, labels=ids).loss

        def look(module, args, output, seen=seen):
            seen.append(module.weight.detach().clone())

        if engine.method.low_rank:  # no weight is perturbed (tests/test_lowrank_probing.py looks at the output)
            engine.step(loss, 1e-3)
            assert torch.equal(model.model.norm.weight, torch.ones(32)) is freeze
            continue
        handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(look, prepend=True)
        engine.step(loss, 1e-3)
        handle.remove()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.model.norm.weight, torch.ones(32)) is freeze
        ends.append(seen[1 if len(seen) > 1 else 0])
    assert not ends or torch.equal(*ends)


@METHOD
def test_eight_by_one_equals_two_by_four(case, tmp_path):
    ends = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = tiny("llama-tied")
        settings = {"project": "k_proj", "period": 1, "rounds": 1} if case == "dizo" else {}
        trainer = ZOTrainer(
            model=model, args=arguments(tmp_path, batch, accumulate, steps=2, learning_rate=1e-4),
            train_dataset=Rows(), zo={"optimizer": method(case, **settings), "eps": 1e-2},
        )  # fmt: skip
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny("llama-tied").parameters()])
    moved, apart = (ends[0] - start).norm(), (ends[0] - ends[1]).norm()
    # The windows' losses differ by an ulp of 4.8e-7, so g by 2e-5 of some 1; signs of small coordinates may flip.
    assert 0 < moved and apart < 2e-3 * moved


@METHOD
def test_sixteen_bits_and_predicted_state(case):
    """bf16 weights take a finite step, and the state that `zo plan` counts on a model of shapes is the one that is."""
    model, ids = tiny("llama", torch.bfloat16), tokens()
    settings = {"project": "k_proj,v_proj"} if case == "dizo" else {}
    engine = engine_of(case, "auto", model=model, grouped=True, **settings)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    engine.step(lambda: model(input_ids=ids, labels=ids).loss, 1e-3)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    name, own = CASES[case]
    shapes = tiny("llama", torch.bfloat16).to("meta")
    planned = make_method(name, shapes, settings={**own, **settings})
    assert size(planned.state_dict()) == size(engine.method.state_dict())


def size(state):
    return sum(t.nbytes for v in state.values() for t in (v if isinstance(v, list) else [v]))
