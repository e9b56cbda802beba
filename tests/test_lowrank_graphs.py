"""Low-rank steps as graphs: subspaces begin between replays, and no reader misses what a replay has collected."""

from __future__ import annotations

import logging

import pytest
import torch
from emulated_graphs import as_on_a_gpu  # noqa: F401 (a fixture of every test)
from test_graphs import Run, batches, same

from zo_finetuner.optim import make_method
from zo_finetuner.optim.low_rank import LowRank, LowRankMomentum

METHODS = {
    "lozo": lambda: LowRank(name="lozo", rank=2, period=3),
    "lozo-m": lambda: LowRankMomentum(rank=2, period=3),
    "subzero": lambda: LowRank(name="subzero", rank=3, period=3, two_sided=True),
}
CASES = [("lozo", torch.float32, 0.0), ("lozo", torch.bfloat16, 0.1), ("lozo-m", torch.float32, 0.0),
         ("subzero", torch.bfloat16, 0.0)]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "decay"), CASES, ids=str)
def test_replays_have_the_bits_of_eager_steps(name, dtype, decay):
    """Twelve steps on two buckets; a subspace begins with every third, between replays too; one loss is not finite."""
    eager, graphed = (
        Run(METHODS[name](), "auto", dtype, graphed=graphed, weight_decay=decay) for graphed in (False, True)
    )
    start = eager.weights()
    for i, inputs in enumerate(batches(12)):
        if i == 7:
            inputs["weight"].fill_(torch.nan)
        for run in (eager, graphed):
            run.step(inputs, lr=1e-2 / (1 + i))
        if i == 10:  # a reader in the middle of a subspace, after a replay
            same(eager, graphed)
    same(eager, graphed)
    assert not graphed.graphs.reason and graphed.engine.probing._trusted
    assert graphed.graphs.captures == 2 and graphed.graphs.replays >= 7
    assert (eager.weights() - start).abs().max() > 1e-4


def test_a_reader_after_a_replay_finds_its_update_in_the_weights():
    run = Run(METHODS["lozo"](), "auto", head=False)
    inputs = batches(1)[0]
    for _ in range(4):
        run.step(inputs)
    replays = run.graphs.replays
    with torch.no_grad():
        run.loss_of(inputs)
    before = run.weights()
    run.step(inputs)
    assert run.graphs.replays == replays + 1
    matrix = run.model.get_parameter("model.layers.0.self_attn.v_proj.weight")
    held = matrix.detach().clone()
    with torch.no_grad():
        run.loss_of(inputs)  # a forward outside a probe
    assert not torch.equal(matrix, held) and not torch.equal(run.weights(), before)
    assert run.engine.probing.pending.rank == 0


def test_a_population_stays_eager(caplog):
    run = Run("mezo")
    method = make_method("es-lowrank", run.model)
    with caplog.at_level(logging.INFO):
        run = Run(method, "auto")
    assert run.graphs.reason == "the steps of es-lowrank are not all alike"


def test_a_limit_goes_with_a_population():
    with pytest.raises(Exception, match="lozo: limit goes with period 0"):
        LowRank(name="lozo", limit=8)
