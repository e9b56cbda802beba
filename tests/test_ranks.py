"""Several processes take the steps that one would: the same losses and weights, bit for bit, on 2 and 4 of them."""

from __future__ import annotations

import json

import pytest
import rank_checks
import torch
from models import save_model, save_rows, tiny
from test_hf import Rows, arguments, losses, run, weights
from worlds import World, of_two_and_four

from zo_finetuner import agreement
from zo_finetuner.agreement import difference
from zo_finetuner.errors import InputError
from zo_finetuner.hf import ZOTrainer
from zo_finetuner.optim import MeZO
from zo_finetuner.optim.base import Probe
from zo_finetuner.optim.directions import Direction
from zo_finetuner.ranks import divided, shares
from zo_finetuner.replicas import fingerprint, first_difference
from zo_kernels import seed_tensor

worlds = of_two_and_four  # a fixture


# method, settings, dtype, micro-batches per step, probe ranks, probing
DATA = [
    ("mezo", {}, "float32", 4, 1, "auto"),
    ("mezo", {}, "bfloat16", 8, 1, "auto"),
    ("zo-adam", {"probes": 2}, "float32", 4, 1, "auto"),
    ("forward-grad", {}, "float32", 4, 1, "auto"),
]
PROBES = {
    2: [
        ("zo-conservative", {}, "bfloat16", 2, 2, "scratch"),  # two rounds
        ("lozo", {"probes": 2}, "float32", 1, 2, "auto"),
        ("mezo", {}, "float32", 1, 2, "scratch"),  # a sign for each rank
    ],
    4: [
        ("es", {"probes": 6}, "float32", 1, 4, "scratch"),  # some have two, some one
        ("forward-grad", {"probes": 4}, "float32", 1, 4, "auto"),
        ("mezo", {"probes": 4}, "bfloat16", 4, 2, "paired"),  # 2 x 2, both signs in one forward
    ],
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["rows", "probes"])
def test_all_ranks_together_are_one_process(worlds, size, kind):
    cases = DATA if kind == "rows" else PROBES[size]
    results = worlds[size].run(rank_checks.trained_by_all, cases)
    for number, case in enumerate(cases):
        _, (losses_alone, weights_alone, before, _) = results[0][number]
        for of_rank in results:
            losses, weights, _, traffic = of_rank[number][0]
            assert losses == losses_alone and weights == weights_alone != before, case
            assert 0 < traffic["sent_bytes_per_step"] < 1000


def test_what_travels_is_eight_bytes_for_every_probe_and_micro_batch(worlds):
    case = ("mezo", {}, "float32", 8, 1, "auto")
    for of_rank in worlds[4].run(rank_checks.trained_by_all, [case]):
        sent = of_rank[0][0][3]["sent_bytes_per_step"]
        # two probes, two micro-batches of this rank; and of one replica check in two steps, 8 bytes
        assert sent == 2 * 2 * 8 + 8 / 2


ES = {"optimizer": "es", "settings": {"probes": 4}, "probing": "scratch"}


@pytest.mark.parametrize("size, probe_ranks, zo", [(2, 1, {}), (4, 2, ES)], ids=["rows", "rows and probes"])
def test_the_trainer_on_several_processes(tmp_path, worlds, size, probe_ranks, zo):
    """Rows are dealt by the Trainer, the same ones to ranks that share probes."""
    alone = run(tmp_path / "alone", zo={"eps": 1e-2, **zo}, batch=4, steps=3, accumulate=2)
    more = {"batch": 4, "steps": 3, "accumulate": 2 * probe_ranks // size}
    for logged, bits in worlds[size].run(rank_checks.hf_run, str(tmp_path / "all"), probe_ranks, zo, more):
        assert bits == rank_checks.bits(weights(alone))
        assert logged == pytest.approx(losses(alone), rel=1e-6)  # the Trainer's own averages of fp32 sums


def command_line(tmp_path, *more):
    return ["train", "--model", str(tmp_path / "model"), "--task", "sst2", "--data", str(tmp_path / "data"),
            "--steps", "2", "--batch-size", "4", "--grad-accum", "2", "--num-train", "32", "--num-dev", "8",
            "--num-eval", "8", "--lr", "1e-2", *more]  # fmt: skip


def test_the_command_line(tmp_path, worlds):
    save_model(tmp_path / "model")
    save_rows(tmp_path / "data")
    two = command_line(tmp_path, "--output-dir", str(tmp_path / "two"))
    for more in ([], ["--steps", "4", "--resume"]):  # to step 2, and on from its checkpoint
        (code, _), other = worlds[2].run(rank_checks.command, [*two, *more], {})
        assert (code, other) == (0, (0, ""))
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["ranks"]["processes"] == 2 and result["ranks"]["sent_bytes_per_step"] > 0
    one = command_line(tmp_path, "--output-dir", str(tmp_path / "one"), "--steps", "4")
    assert rank_checks.command(one, {})[0] == 0
    one, two = ({p.name for p in (tmp_path / run).iterdir() if "checkpoint" not in p.name} for run in ("one", "two"))
    assert one == two
    alone = json.loads((tmp_path / "one" / "result.json").read_text())
    same = "steps", "eval_loss_before", "eval_loss_after", "best_dev_loss", "best_step"
    assert [alone[name] for name in same] == [result[name] for name in same]


def test_ranks_that_would_not_run_the_same_stop_with_one_line(tmp_path, worlds):
    """One line on rank 0, exit code 2 on all, and nothing written."""
    save_model(tmp_path / "model")
    save_model(tmp_path / "other", seed=1)
    save_rows(tmp_path / "data")
    save_rows(tmp_path / "other-data", seed=1)
    out = ["--output-dir", str(tmp_path / "run")]
    faults = {
        "settings of the run": ["--lr", "1e-3"],
        "weights": ["--model", str(tmp_path / "other")],
        "training data": ["--data", str(tmp_path / "other-data")],
        "(on rank 1 of 2)": ["--model", str(tmp_path / "nowhere")],
        "unknown optimizer": ["--optimizer", "adamw"],
    }
    for told, given in faults.items():
        (code, message), other = worlds[2].run(rank_checks.command, command_line(tmp_path, *out), {1: given})
        assert (code, other) == (2, (2, "")), message
        assert message.count("\n") == 1 and message.startswith("zo: error: ")
        assert told in message or told in ("weights", "training data") and "settings of the run" in message, message
    assert not (tmp_path / "run").exists()


def test_a_world_that_does_not_divide_the_batch(tmp_path, worlds):
    assert divided(16, 4, 2) == (16, 2)
    assert divided(16, 1, 4) == (4, 1)
    with pytest.raises(InputError, match="divide among 3 ranks: give --grad-accum 3"):
        divided(16, 4, 3)
    odd = command_line(tmp_path, "--output-dir", str(tmp_path / "run"), "--batch-size", "3", "--grad-accum", "1")
    (code, message), other = worlds[2].run(rank_checks.command, odd, {})
    assert (code, other) == (2, (2, "")) and "divide among 2 ranks" in message


def test_a_replica_that_drifts_is_named(worlds):
    for step, message in worlds[2].run(rank_checks.replica_that_drifts):
        assert step == 2
        assert "model.layers.1.mlp.up_proj.weight is not the same on ranks 0 and 1" in message


def test_a_rank_that_dies_ends_the_run_with_whole_weights():
    world = World(2)
    try:
        (step, whole, message), _ = world.run(rank_checks.a_rank_that_dies, dead=(1,))
        assert (step, whole) == (1, True) and "a rank has died or does not answer" in message
    finally:
        world.close()


def test_probes_of_a_direction_stay_together_while_there_are_enough():
    a, b, c = (Direction(seed_tensor(i)) for i in range(3))
    one = torch.ones(())
    pairs = [Probe(d, sign * one) for d in (a, b, c) for sign in (1, -1)]
    assert shares(pairs, 2) == [[0, 1, 4, 5], [2, 3]]
    assert shares(pairs, 4) == [[0, 4], [1, 5], [2], [3]]
    assert shares(pairs[:2], 4) == [[0], [1], [0], [1]]
    assert shares(pairs, 1) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_feels_every_bit(dtype):
    x = torch.randn(3, 67).to(dtype)
    before = fingerprint(x)
    assert torch.equal(fingerprint(x.clone()), before)
    swapped = x.clone()
    swapped.view(-1)[[4, 9]] = swapped.view(-1)[[9, 4]]
    last = x.clone()
    last.view(-1).view(torch.int32 if dtype == torch.float32 else torch.int16)[-1] ^= 1
    assert fingerprint(swapped) != before and fingerprint(last) != before
    gathered = torch.stack([torch.tensor([1, 2, 3])] * 3)
    gathered[2, 1] = 5
    assert first_difference(gathered) == (1, [2])


def test_ranks_on_two_kinds_of_device_differ_in_nothing_else():
    here = {"noise contract": "1", "device": "cpu", "model": "a"}
    assert difference([here, here | {"device": "cuda"}]) == ""
    told = difference([here, here | {"noise contract": "2"}])
    assert "rank 1 has another noise contract than rank 0 (2, not 1)" in told


SIGNS = {"dist": "rademacher"}


@pytest.mark.parametrize("zo, goes", [
    ({}, False), ({"optimizer": "mezo"}, False), ({"optimizer": "mezo", "settings": SIGNS}, True), (SIGNS, True),
    ({"optimizer": "fzoo"}, True), ({"optimizer": "fzoo", "dist": "normal"}, False),
    ({"optimizer": MeZO()}, False), ({"optimizer": MeZO(**SIGNS)}, True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("made", [False, True], ids=["of zo", "made before"])
def test_two_kinds_of_device_take_random_signs(tmp_path, monkeypatch, zo, goes, made):
    """What counts is the method of the steps, by whatever name and settings it was asked for."""
    monkeypatch.setattr(agreement, "exchange", lambda facts: [facts, facts | {"device": "cuda"}])
    trainer = ZOTrainer(model=tiny("llama"), args=arguments(tmp_path), train_dataset=Rows(), zo=zo)
    if made:
        trainer.create_optimizer()
        trainer._zo_arguments = {}
    if goes:
        trainer._require_agreement()
    else:
        with pytest.raises(InputError, match="ranks are on cpu and cuda, .* give dist=rademacher"):
            trainer._require_agreement()
