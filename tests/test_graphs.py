"""Captured steps against eager ones, bit for bit, on an emulation of CUDA graphs; what drops or refuses a capture."""

from __future__ import annotations

import logging
import math
import random
from functools import partial

import pytest
import torch
from emulated_graphs import EmulatedCapturer, as_on_a_gpu  # noqa: F401 (a fixture of every test)
from models import VOCAB, tiny

from zo_finetuner.engine import Engine
from zo_finetuner.graphs import GraphedSteps
from zo_finetuner.masks import positions_as_given
from zo_finetuner.optim import MeZO, make_method
from zo_finetuner.params import trainable_blocks
from zo_finetuner.scale_net import ScaleNet

SHAPES = [(2, 5), (3, 4)]


def batches(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, SHAPES[i % 2], generator=generator)
        made.append({"input_ids": ids, "labels": ids.clone(), "weight": torch.ones(())})
    return made


class Run:
    """An engine on a small model, with or without graphs."""

    def __init__(
        self, method="mezo", probing="scratch", dtype=torch.float32, graphed=True, weight_decay=0.0, head=True
    ):
        self.model = tiny("llama-tied" if head else "llama", dtype)
        del self.model.model.layers[1:]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.endswith(("embed_tokens.weight", "v_proj.weight", "input_layernorm.weight")))
        if method == "closed-form":
            blocks = trainable_blocks(self.model)
            sigma = torch.linspace(0.5, 2, len(blocks))
            nets = ScaleNet.fixed(blocks.names, blocks.numels, sigma, source="a test")
            method = make_method(method, self.model, pertnn=nets)
        elif isinstance(method, str):
            method = make_method(method, self.model)
        self.engine = Engine(self.model, method, eps=1e-2, seed=5, probing=probing, weight_decay=weight_decay)
        self.graphs = GraphedSteps(self.engine, EmulatedCapturer()) if graphed else None
        self.losses = []

    def loss_of(self, inputs):
        ids, labels = inputs["input_ids"], inputs["labels"]
        with positions_as_given():
            return self.model(input_ids=ids, labels=labels, use_cache=False).loss * inputs["weight"]

    def step(self, inputs, lr=1e-2):
        step = self.engine.step_on if self.graphs is None else self.graphs.step
        self.losses.append(step(self.loss_of, inputs, lr))

    def weights(self):
        return torch.cat([p.detach().flatten().float() for p in self.model.parameters()])


def same(a: Run, b: Run) -> None:
    assert torch.equal(torch.stack(a.losses).nan_to_num(-1), torch.stack(b.losses).nan_to_num(-1))
    assert torch.equal(a.weights(), b.weights())
    left, right = a.engine.state_dict(), b.engine.state_dict()
    for name, value in left["method_state"].items():
        assert torch.equal(value, right["method_state"][name]), name
    assert torch.equal(left["guard"], right["guard"])
    for name in ("last_loss", "step"):
        assert left[name] == right[name]
    for name, value in a.engine.metrics().items():
        assert value == b.engine.metrics()[name], name


CASES = [
    ("mezo", "scratch", torch.float32, 0.0),
    ("mezo", "scratch", torch.bfloat16, 0.1),
    ("mezo", "inplace", torch.float32, 0.1),
    ("mezo", "paired", torch.bfloat16, 0.0),
    ("zo-finetuner", "scratch", torch.bfloat16, 0.0),
    ("zo-finetuner", "inplace", torch.float32, 0.0),
    ("zo-finetuner", "paired", torch.float32, 0.0),
    ("sigma-one", "scratch", torch.float32, 0.0),
    ("closed-form", "paired", torch.bfloat16, 0.1),
]


@pytest.mark.parametrize(("method", "probing", "dtype", "decay"), CASES, ids=str)
def test_replays_have_the_bits_of_eager_steps(method, probing, dtype, decay):
    """Eight steps on two buckets in turn, the rate changing, one loss not finite; all is compared after each."""
    eager = Run(method, probing, dtype, graphed=False, weight_decay=decay)
    graphed = Run(method, probing, dtype, weight_decay=decay)
    start = eager.weights()
    for i, inputs in enumerate(batches(8)):
        if i == 6:
            inputs["weight"].fill_(math.nan)
        for run in (eager, graphed):
            run.step(inputs, lr=1e-2 / (1 + i))
        same(eager, graphed)
    assert not graphed.graphs.reason
    assert graphed.graphs.captures == 2 and graphed.graphs.replays >= 3
    assert int(eager.engine.skipped) == 1
    assert (eager.weights() - start).abs().max() > 1e-4


@pytest.mark.parametrize("probing", ["scratch", "inplace"])
def test_a_run_resumes_in_the_middle_of_replays(probing, tmp_path):
    whole, first, second = (Run("zo-finetuner", probing) for _ in range(3))
    some = batches(9)
    for inputs in some:
        whole.step(inputs)
    for inputs in some[:6]:
        first.step(inputs)
    saved = {"model": first.model.state_dict(), "engine": first.engine.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for inputs in some[:4]:  # it has captured steps of its own, which go on from what is loaded
        second.step(inputs)
    second.model.load_state_dict(saved["model"])
    second.engine.load_state_dict(saved["engine"])
    captures = second.graphs.captures
    second.losses = first.losses
    for inputs in some[6:]:
        second.step(inputs)
    same(whole, second)
    assert second.graphs.captures == max(captures, 2)


def test_whoever_reads_between_replays_sees_the_eager_weights():
    """At random steps: a forward, `state_dict`, a loss function that raises, a step that is eager in between."""
    eager, graphed = Run(graphed=False), Run()
    draw = random.Random(4)
    for inputs in batches(14):
        for run in (eager, graphed):
            run.step(inputs)
        kind = draw.choice(("nothing", "forward", "state", "raise", "closure"))
        if kind == "forward":
            with torch.no_grad():
                assert torch.equal(eager.loss_of(inputs), graphed.loss_of(inputs))
        elif kind == "state":
            state = graphed.model.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in eager.model.state_dict().items())
        elif kind == "raise":
            with pytest.raises(ZeroDivisionError):
                graphed.graphs.step(lambda _: 1 / 0, inputs, 1e-2)
            assert torch.equal(eager.weights(), graphed.weights())
        elif kind == "closure":
            for run in (eager, graphed):
                run.losses.append(run.engine.step(partial(run.loss_of, inputs), 1e-2))
    same(eager, graphed)
    assert graphed.graphs.replays >= 8


CHANGES = {
    "weight_decay": lambda run: setattr(run.engine, "weight_decay", 0.2),
    "the method's dist": lambda run: setattr(run.engine.method, "dist", "rademacher"),
    "model.layers.0.mlp.up_proj.weight": lambda run: setattr(
        run.model.model.layers[0].mlp.up_proj.weight, "data", 2 * run.model.model.layers[0].mlp.up_proj.weight.data
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_capture_took_for_granted_and_changed_is_captured_anew(what, caplog):
    eager, graphed = Run(graphed=False), Run()
    some = batches(14)
    with caplog.at_level(logging.INFO):
        for i, inputs in enumerate(some):
            for run in (eager, graphed):
                if i == 7:
                    CHANGES[what](run)
                run.step(inputs)
    same(eager, graphed)
    assert graphed.graphs.captures == 4 and f"captured anew: {what} changed" in caplog.text


def test_eps_is_written_in_place():
    eager, graphed = Run(graphed=False), Run()
    for i, inputs in enumerate(batches(7)):
        for run in (eager, graphed):
            run.engine.eps.fill_(1e-2 / (1 + i))
            run.step(inputs)
    same(eager, graphed)
    assert graphed.graphs.captures == 2


def test_a_scratch_that_grows_is_captured_anew():
    """A graph writes where the scratch was: a larger batch moves it."""
    eager, graphed = Run(graphed=False, head=False), Run(head=False)
    small = batches(6)
    ids = torch.arange(90).view(2, 45) % (VOCAB - 3) + 3
    large = {"input_ids": ids, "labels": ids, "weight": torch.ones(())}
    for inputs in (*small, large, *small, large, *small):
        for run in (eager, graphed):
            run.step(inputs)
    same(eager, graphed)
    assert graphed.graphs.captures >= 4


WAITS = {
    "_local_scalar_dense": lambda loss: loss * float(loss > 0),
    "nonzero": lambda loss: loss + 0 * loss.reshape(1).nonzero().sum(),
    "a boolean index": lambda loss: loss.reshape(1)[loss.reshape(1) > -1].sum(),
    "equal": lambda loss: loss * torch.equal(loss, loss),
    "lift_fresh": lambda loss: loss * torch.tensor(1.0),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_loss_that_a_graph_cannot_hold_is_named_and_steps_go_on(what, caplog):
    eager, graphed = Run(graphed=False), Run()
    for run in (eager, graphed):
        run.step_loss, run.own = WAITS[what], run.loss_of
        run.loss_of = lambda inputs, run=run: run.step_loss(run.own(inputs))
    for inputs in batches(4):
        for run in (eager, graphed):
            run.step(inputs)
    same(eager, graphed)
    assert what in graphed.graphs.reason and "test_graphs.py:" in graphed.graphs.reason
    assert caplog.text.count("no CUDA graphs, all steps are eager") == 1 and not graphed.graphs.captures


def test_a_capture_that_fails_leaves_nothing_behind(caplog):
    """A method that looks at the step's number, which a graph does not have."""

    class Alternating(MeZO):
        def ask(self, context):
            probes = super().ask(context)
            return probes if context.step % 2 else probes[::-1]

    eager, graphed = Run(Alternating(), graphed=False), Run(Alternating())
    for inputs in batches(8):
        for run in (eager, graphed):
            run.step(inputs)
    same(eager, graphed)
    assert "the capture failed: TypeError: unsupported operand" in graphed.graphs.reason
    assert caplog.text.count("no CUDA graphs") == 1 and not graphed.graphs.replays


def test_graphs_are_few_and_what_comes_back_stays(monkeypatch):
    eager, graphed = Run(graphed=False), Run()
    graphed.graphs.most = 1
    some = batches(9)
    for inputs in some:
        for run in (eager, graphed):
            run.step(inputs)
    same(eager, graphed)
    assert graphed.graphs.captures == 1 and len(graphed.graphs._graphs) == 1
    monkeypatch.setattr("zo_finetuner.graphs.IDLE", 3)
    for _ in range(6):  # the captured bucket stays away, and makes room
        for run in (eager, graphed):
            run.step(some[0])
    same(eager, graphed)
    assert graphed.graphs.captures == 2 and len(graphed.graphs._graphs) == 1


def test_the_emulation_refuses_and_undoes_as_cuda_does():
    weight, loss = torch.ones(3), torch.zeros(())
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        EmulatedCapturer().capture(lambda: loss.copy_((weight.mul_(2)).sum()) * float(weight[0]))
    assert weight.tolist() == [1, 1, 1] and loss == 0
    kept = {}

    def run():
        weight.mul_(2)
        kept["held"], temporary = weight + 1, weight + 2
        return temporary.sum()

    graph, result = EmulatedCapturer().capture(run)
    assert weight.tolist() == [1, 1, 1] and result.isnan() and kept["held"].isnan().all()
    for i in (2, 4):
        graph.replay()
        assert weight.tolist() == [i] * 3 and result == 3 * (i + 2) and kept["held"].tolist() == [i + 1] * 3


def test_a_probe_under_autocast_sees_its_own_weights():
    """Autocast remembers its casts by the tensor object, which a probe keeps."""
    for probing in ("inplace", "scratch"):
        run = Run(probing=probing, graphed=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for inputs in batches(2):
                run.step(inputs)
                assert run.engine.projected_grad != 0
        assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("probing", ["scratch", "paired", "inplace"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_module_is_probed_like_any_other(probing, warm):
    """torch.compile breaks its graph at a swap of storages; a module that ran before it was hooked is compiled anew."""
    plain, compiled = Run(probing=probing, graphed=False), Run(probing=probing, graphed=False)
    layer = compiled.model.model.layers[0]
    layer.self_attn.v_proj = torch.compile(layer.self_attn.v_proj, backend="aot_eager")
    layer.mlp.compile(backend="aot_eager")
    if warm:
        with torch.no_grad():
            compiled.loss_of(batches(1)[0])
    compiled.engine.method, plain.engine.method = MeZO(), MeZO()
    for inputs in batches(4):
        plain.step(inputs)
        compiled.step(inputs)
    assert torch.equal(torch.stack(plain.losses), torch.stack(compiled.losses))
    assert torch.equal(plain.weights(), compiled.weights())
