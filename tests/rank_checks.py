"""What the processes of tests/test_ranks.py run; each returns plain values for the test to compare."""

from __future__ import annotations

import os
from functools import partial

import torch
from models import tiny, tokens

from zo_finetuner.engine import Engine
from zo_finetuner.optim import make_method
from zo_finetuner.ranks import Ranks
from zo_finetuner.replicas import combined, fingerprint, fingerprints

STEPS, ROWS = 2, 2


def micro_batch(number: int) -> dict[str, torch.Tensor]:
    """Rows of which some tokens are not counted: micro-batches weigh differently."""
    ids = tokens(ROWS, 8, seed=number)
    labels = ids.clone()
    labels[:, : 1 + number % 3] = -100
    return {"input_ids": ids, "labels": labels}


def window_loss(model, numbers):
    """The window of these micro-batches: loss sums and token counts."""
    sums, weights = [], []
    for number in numbers:
        batch = micro_batch(number)
        weight = (batch["labels"][:, 1:] >= 0).sum()
        sums.append(model(**batch).loss * weight)
        weights.append(weight.float())
    return torch.stack((torch.stack(sums), torch.stack(weights)))


def bits(weights: torch.Tensor) -> int:
    return int(fingerprint(weights))


def trained(case: tuple, ranks: Ranks | None):
    """Losses, a fingerprint of the weights and of those at the start, and the traffic.

    case: method, its settings, dtype, micro-batches per step, probe ranks, mode of probing."""
    name, settings, dtype, per_step, _, probing = case
    model = tiny("llama-tied", getattr(torch, dtype))
    method = make_method(name, model, settings=settings)
    engine = Engine(model, method, eps=1e-2, seed=5, probing=probing, ranks=ranks)
    before = combined(fingerprints(engine.blocks))
    losses = []
    for step in range(STEPS):
        numbers = range(step * per_step, (step + 1) * per_step)
        if ranks is not None:
            numbers = numbers[ranks.data_rank :: ranks.data]
        losses.append(engine.step(partial(window_loss, model, numbers), 1e-2))
    engine.flush()
    after = combined(fingerprints(engine.blocks))
    return [loss.item() for loss in losses], int(after), int(before), ranks and ranks.traffic()


def trained_by_all(cases):
    """For every case the run of all ranks; rank 0 adds the run of one process."""
    results = []
    for case in cases:
        ranks = Ranks(case[4], check_every=1)
        results.append((trained(case, ranks), trained(case, None) if ranks.rank == 0 else None))
    return results


def hf_run(folder: str, probe_ranks: int, zo: dict, more: dict):
    from test_hf import losses, run, weights

    trainer = run(folder, zo={"eps": 1e-2, **zo, "probe_ranks": probe_ranks}, **more)
    return losses(trainer), bits(weights(trainer))


def command(arguments: list[str], of_rank: dict[int, list[str]]):
    """Exit code, and what was printed to stderr."""
    import contextlib
    import io

    from zo_finetuner.cli import main

    rank, errors = int(os.environ.get("RANK", 0)), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main([*arguments, *of_rank.get(rank, [])])
    return code, errors.getvalue()


def replica_that_drifts():
    from zo_finetuner.ranks import ReplicasDiffer

    ranks = Ranks(check_every=2)
    model = tiny("llama-tied")
    engine = Engine(model, make_method("mezo", model), eps=1e-2, ranks=ranks)
    for step in range(4):
        if step == 2 and ranks.rank == 1:
            model.model.layers[1].mlp.up_proj.weight.data[3, 5] *= 1 + 2e-7  # one bit
        try:
            engine.step(partial(window_loss, model, [step]), 1e-3)
        except ReplicasDiffer as error:
            return engine.step_count, str(error)
    return None


def a_rank_that_dies():
    from zo_finetuner.ranks import RankLost

    ranks = Ranks()
    model = tiny("llama-tied", torch.bfloat16)
    engine = Engine(model, make_method("mezo", model), eps=1e-2, ranks=ranks)
    engine.step(lambda: window_loss(model, [0]), 1e-3)
    before = [p.clone() for p in model.parameters()]
    if ranks.rank == 1:
        os._exit(9)
    try:
        engine.step(lambda: window_loss(model, [0]), 1e-3)
    except RankLost as error:
        whole = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return engine.step_count, whole, str(error)
    return None
