"""`python -m bench`: its command line, and the cases' rows on the CPU at small sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import zo_kernels as zk
from bench import __main__ as command
from bench import kernels, passes
from bench.folders import config
from bench.operations import PAIRS, list_calls, tensor_calls
from bench.rows import read
from bench.runner import Runner
from bench.shapes import CONFIGS, numel, shapes

BACKEND = "reference" if zk.why_unavailable("cpu") else "cpu"


def runner(path, **options) -> Runner:
    return Runner(path / "kernels.jsonl", torch.device("cpu"), BACKEND, [BACKEND], repeats=1, **options)


def small_gpu_stages(runner):
    """All that is measured on a GPU, but on the CPU, with models a 512th as wide and deep."""
    return kernels.gpu_stages(runner, shrink=512, copied=1 << 14, rotate=100, foil=False)


def test_a_quick_run_writes_a_row_for_every_op_and_dtype(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "bench", "kernels", "--quick", "--device", "cpu", "--provider", BACKEND,
         "--numel", "4096", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    rows = read(tmp_path / "kernels.jsonl")
    sets = [passes.Tensors(*(torch.zeros(8) for _ in range(3)))]
    ops = {*list_calls(zk.Blocks([("w", torch.zeros(8))])), *tensor_calls(sets)}
    assert set(PAIRS) | set(PAIRS.values()) <= ops
    for dtype in ("float32", "bfloat16", "float16"):
        mine = {(r["case"], r["provider"]): r for r in rows if r["dtype"] == dtype and r["n"] == 4096}
        assert {(op, BACKEND) for op in ops} <= set(mine)
        assert {(op, "torch") for op in ("perturb", "update", "stats", "dot")} | {("copy", "copy")} <= set(mine)
        size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        for op, bytes_per_element in (("perturb", 2 * size), ("mirror", 3 * size), ("stats", size)):
            row = mine[op, BACKEND]
            assert row["bytes"] == bytes_per_element * 4096 and row["share"] > 0
    for row in rows:
        assert row["p20"] <= row["p50"] <= row["p80"] and row["repeats"] >= 1
        assert row["metric"] != "time_s" or (row["p50"] > 0 and row["unit"] == "s")
    for rule, kind in zk.RULES.items():
        (row,) = [r for r in rows if (r["case"], r["provider"], r["dtype"]) == (f"rule {rule}", BACKEND, "bfloat16")]
        assert row["bytes"] == (4 + 8 * len(kind.states)) * 4096
    (same,) = [r for r in rows if r["case"] == "same z"]
    assert same["p50"] == 0 and set(same["passes"].values()) == {0}
    assert 0 < next(r["p50"] for r in rows if r["metric"] == "max_abs_difference") < 1e-5
    assert next(r["p50"] for r in rows if r["metric"] == "share_of_budget") <= 1
    changed = {r["provider"]: r["p50"] for r in rows if r["case"] == "changed"}
    assert changed[BACKEND] == 0 and changed["torch"] > 0.3


def test_the_gpu_measurements_hold_together(tmp_path, monkeypatch):
    """The same code as on a GPU; the clock, the foils and the capture of graphs are what differs."""
    taken = runner(tmp_path)
    assert kernels.measure(taken, small_gpu_stages(taken)) == 0
    rows = read(tmp_path / "kernels.jsonl")
    assert {r.get("model") for r in rows} == {None, *CONFIGS}
    tensors = {r["tensor"] for r in rows if "tensor" in r}
    assert len(tensors) == len(kernels.TENSORS)
    for model in CONFIGS:
        for dtype in ("bfloat16", "float16"):
            found = {r["case"] for r in rows if r.get("model") == model and r["dtype"] == dtype and "share" in r}
            assert {"perturb", "update", "two-noise", "stats", "update stats", "dot"} <= found
    assert {"tiny perturb", "tiny perturb, host"} <= {r["case"] for r in rows}
    # Most valuable first: both floors, agreement, then the passes with a target.
    order = [r["case"] for r in rows]
    assert order[0] == "copy" and order[1:4] == ["same z", "twin", "twin"] and order[4:8] == [
        "perturb", "update", "two-noise", "stats",
    ]  # fmt: skip


def test_the_tensors_of_a_gpu_run_are_those_of_the_models():
    sizes = [2 * numel([(name, dict(shapes(model))[name])]) / 1e6 for model, name in kernels.TENSORS]
    assert sorted(round(size) for size in sizes) == [2, 8, 34, 103, 117, 411, 1051]


def test_a_spent_budget_ends_a_run_in_order(tmp_path, capsys):
    late = runner(tmp_path, budget=-1)
    assert kernels.measure(late, small_gpu_stages(late)) == 0
    told = capsys.readouterr().out
    assert "budget spent before bandwidth; left out: same z, twin, llama-1b in torch.bfloat16" in told
    assert not (tmp_path / "kernels.jsonl").exists()


def test_a_failure_is_told_and_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(passes, "mezo_calls", lambda parameters: {"perturb": broken, "dot": lambda: None})
    taken = runner(tmp_path)
    assert kernels.measure(taken, kernels.cpu_stages(taken, 64)) == 1
    told = capsys.readouterr().out
    assert "FAILED perturb (torch, torch.float32): RuntimeError: no such kernel\n" in told
    assert {"dot", "same z"} <= {r["case"] for r in read(tmp_path / "kernels.jsonl")}
    assert len(taken.failed) == 5  # three dtypes, a tiny call and its host time


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "there is no case 'nothing'; there are: kernels, "),
        (["kernels", "nothing"], "there is no case 'nothing'"),
        ([], "name a case first; there are: kernels, "),
        (["--out", "x"], "unrecognized arguments: --out x"),
        (["kernels", "--modle", "x"], "unrecognized arguments: --modle x"),
        (["kernels", "report", "--numel", "3"], "unrecognized arguments: --numel 3"),
        (["kernels", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_what_is_unknown_is_an_error(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_cases_are_listed_and_imported_when_named():
    check = (
        "import sys; from bench.__main__ import main, parse; main(['--list']); assert 'torch' not in sys.modules; "
        "parse(['kernels', 'report']); assert not {'transformers', 'datasets', 'triton'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == list(command.CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_one_line(capsys, tmp_path):
    assert command.main(["kernels", "--device", "cuda", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "kernels: torch sees no CUDA device; --device cpu measures this machine\n"


@pytest.mark.parametrize(
    ("model", "count"), [("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248), ("opt-30b", 29_974_540_288)]
)
def test_the_shapes_are_those_of_the_models(model, count):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config(model)).named_parameters()
    assert shapes(model) == [(name, tuple(p.shape)) for name, p in parameters]
    assert numel(shapes(model)) == count
