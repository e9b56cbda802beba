"""On a GPU: captured steps have the bits of eager ones, and nothing in a step waits for the host."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, tiny, tokens
from test_hf import Rows, arguments

from zo_finetuner.encoding import Encoded, collate
from zo_finetuner.engine import Engine
from zo_finetuner.graphs import GraphedSteps
from zo_finetuner.hf import ZOTrainer
from zo_finetuner.isolation import can_pack
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batches(count, model, packed):
    """Rows as SST-2 has them, on the device: a prompt and two candidates of one token; two shapes in turn."""
    made = []
    for i in range(count):
        rows = []
        for k in range(6):
            prompt = tuple(tokens(1, 5 + k + 12 * (i % 2), seed=10 * i + k)[0].tolist())
            rows.append(Encoded("classification", (prompt + (7,), prompt + (9,)), (1, 1), (k % 2,), prompt))
        batch = collate(rows, 0, packed=packed and can_pack(model), few_shapes=True)
        made.append({name: tensor.cuda() for name, tensor in batch.items()})
    return made


class Run:
    def __init__(self, method, probing, dtype, graphed):
        self.model = tiny("llama-tied", dtype).cuda()
        self.engine = Engine(
            self.model, make_method(method, self.model), eps=1e-2, seed=5, probing=probing, weight_decay=0.1
        )
        self.graphs = GraphedSteps(self.engine) if graphed else None
        self.losses = []

    def loss_of(self, batch):
        total, weight = training_loss(self.model, batch)
        return total / weight

    def step(self, batch, lr):
        step = self.engine.step_on if self.graphs is None else self.graphs.step
        self.losses.append(step(self.loss_of, batch, lr))

    def weights(self):
        return torch.cat([p.detach().flatten().float() for p in self.model.parameters()])


@pytest.fixture
def no_waits():
    """A context within which torch raises where it would wait for the device."""

    class Watch:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *exc):
            torch.cuda.set_sync_debug_mode("default")

    yield Watch()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["mezo", "zo-finetuner", "sigma-one"])
@pytest.mark.parametrize("probing", ["scratch", "paired", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_have_the_bits_of_eager_steps(method, probing, dtype, no_waits):
    eager, graphed = (Run(method, probing, dtype, graphed) for graphed in (False, True))
    some = batches(12, eager.model, packed=True)
    for i, batch in enumerate(some):
        for run in (eager, graphed):
            if i >= 10 or (i >= 6 and i != 8):  # two shapes are captured by then; 8 is a power of two
                with no_waits:
                    run.step(batch, 1e-2 / (1 + i))
            else:
                run.step(batch, 1e-2 / (1 + i))
        if i in (4, 7, 11):
            assert torch.equal(torch.stack(eager.losses), torch.stack(graphed.losses))
            assert torch.equal(eager.weights(), graphed.weights())
    assert graphed.graphs.captures == 2 and graphed.graphs.replays >= 6, graphed.graphs.reason
    for name, value in eager.engine.method.state_dict().items():
        assert torch.equal(value, graphed.engine.method.state_dict()[name]), name
    assert graphed.engine.metrics() == eager.engine.metrics()


def test_a_loss_that_is_not_finite_skips_a_replayed_step():
    eager, graphed = (Run("mezo", "scratch", torch.bfloat16, graphed) for graphed in (False, True))
    for run in (eager, graphed):
        own = run.loss_of
        run.loss_of = lambda batch, own=own: own(batch) * batch["factor"]
    some = [batch | {"factor": torch.ones((), device="cuda")} for batch in batches(10, eager.model, packed=True)]
    some[7]["factor"].fill_(torch.nan)
    for batch in some:
        for run in (eager, graphed):
            run.step(batch, 1e-2)
    assert graphed.graphs.replays >= 4 and int(graphed.engine.skipped) == 1
    assert torch.equal(eager.weights(), graphed.weights())


def test_a_wait_in_the_loss_is_found_before_a_capture_is_begun():
    run = Run("mezo", "scratch", torch.bfloat16, True)
    own = run.loss_of
    run.loss_of = lambda batch: own(batch) * float(batch["input_ids"].max() < VOCAB)
    for batch in batches(4, run.model, packed=True):
        run.step(batch, 1e-2)
    assert "_local_scalar_dense" in run.graphs.reason and "test_graphs_gpu.py" in run.graphs.reason


def test_a_capture_that_fails_falls_back_to_eager_steps():
    """A captured stream may not be waited for, and no operator tells of such a wait beforehand."""
    run, eager = Run("mezo", "inplace", torch.float32, True), Run("mezo", "inplace", torch.float32, False)
    own = run.loss_of

    def waiting(batch):
        torch.cuda.current_stream().synchronize()
        return own(batch)

    run.loss_of = waiting
    some = batches(6, run.model, packed=True)
    for batch in some:
        for each in (run, eager):
            each.step(batch, 1e-2)
    assert run.graphs.reason.startswith("the capture failed") and not run.graphs.replays
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(run.weights(), eager.weights())


@pytest.mark.parametrize("method", ["mezo", "zo-finetuner"])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_trainers_step_waits_for_nothing(tmp_path, method, graphs, no_waits):
    class Watched(ZOTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step in (5, 6, 7, 9):
                with no_waits:
                    return super().training_step(*args, **kwargs)
            return super().training_step(*args, **kwargs)

    model = tiny("llama-tied", torch.bfloat16)
    trainer = Watched(
        model=model, train_dataset=Rows(), zo={"optimizer": method, "eps": 1e-2, "graphs": graphs},
        args=arguments(tmp_path, steps=10, use_cpu=False, logging_nan_inf_filter=False, max_grad_norm=0.0,
                       accelerator_config={"non_blocking": True}),
    )  # fmt: skip
    trainer.train()
    assert trainer.zo_optimizer.engine.step_count == 10
    if graphs:
        assert trainer.zo_optimizer.graphs.replays >= 5, trainer.zo_optimizer.graphs.reason
