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


def sharded(name: str, dtype: str, probing: str):
    """Losses and whole weights after some steps on weights that FSDP2 spreads over the ranks; rank 0 adds those of one
    process.  Each rank has its own rows."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def steps(model, ranks):
        # PertNN looks at statistics of the weights, which are joined from the pieces
        method = make_method(name, model, settings={})
        engine = Engine(model, method, eps=1e-2, seed=5, probing=probing, weight_decay=0.1, ranks=ranks)
        losses = []
        for step in range(STEPS):
            numbers = range(4 * step, 4 * step + 4)
            if ranks is not None:
                numbers = numbers[ranks.rank :: ranks.size]
            losses.append(engine.step(partial(window_loss, model, numbers), 1e-2).item())
        with torch.no_grad():
            losses.append(model(**micro_batch(99)).loss.item())  # what anybody sees who calls it afterwards
        return losses

    def whole(parameter):
        tensor = parameter.detach()
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def spread():
        model = tiny("llama-tied", getattr(torch, dtype))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    from zo_finetuner.shards import reshard

    model = spread()
    losses = steps(model, Ranks())
    reshard(model)
    weights = [whole(p).flatten() for p in model.parameters()]
    alone = None
    if dist.get_rank() == 0:
        one = tiny("llama-tied", getattr(torch, dtype))
        losses_alone = steps(one, None)
        alone = losses_alone, [p.detach().flatten() for p in one.parameters()]
    if alone is None:
        return losses, None
    equal = all(torch.equal(a, b) for a, b in zip(weights, alone[1], strict=True))
    far = max((a.float() - b.float()).abs().max().item() for a, b in zip(weights, alone[1], strict=True))
    return losses, (alone[0], equal, far)


def refused_shards(names: list[str]):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from zo_finetuner.errors import InputError

    model = fully_shard(tiny("llama-tied"), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    told = []
    for name in names:
        try:
            Engine(model, make_method(name, model, settings={}), eps=1e-2, ranks=Ranks())
            told.append("")
        except InputError as error:
            told.append(str(error))
    return told
