"""bench/gpu.sh, which must work the first time; and of the harness what only a GPU can run."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch
from conftest import ROOT

from bench.timing import EventClock

SCRIPT = ROOT / "bench" / "gpu.sh"
# Stands for python3: notes its arguments, and does what the variables say.
PYTHON = """#!/bin/bash
echo "python $*" >>"$CALLS"
case "$*" in
  "-m bench --list") printf '%s\\n' ${CASES:-kernels report} ;;
  *cuda.is_available*) exit "${NO_GPU:-0}" ;;
  "-c import xdist") exit 1 ;;
  "-m pybind11 --cmakedir") echo /pybind11 ;;
  "-m pytest"*) echo "5 passed"; exit "${TESTS:-0}" ;;
  "-m bench kernels"*)
    echo "{}" >>"$(sed 's/.*--out \\([^ ]*\\).*/\\1/' <<<"$*")/kernels.jsonl"
    echo measured; exit "${BENCH:-0}" ;;
  "-m bench quality"*--pretrain*)
    base=$(sed 's/.*--out-model \\([^ ]*\\).*/\\1/' <<<"$*")
    mkdir -p "$base" && touch "$base/pretrain.json" ;;
  "-m bench "*) exit "${BENCH:-0}" ;;
esac
"""


@pytest.fixture
def suite(tmp_path):
    """Runs gpu.sh with stand-ins for python3, cmake and nvidia-smi: (exit status, output, what was called)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("python3", PYTHON), ("cmake", '#!/bin/bash\necho "cmake $*" >>"$CALLS"\nexit "${BUILD:-0}"\n'),
                       ("nvidia-smi", "#!/bin/bash\n"), ("nvcc", "#!/bin/bash\n")):  # fmt: skip
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*words: str, **variables: str):
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "HOME": str(tmp_path)}
        done = subprocess.run(
            ["bash", str(SCRIPT), *words], env=environment | variables, capture_output=True, text=True, check=False,
            cwd=tmp_path,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, calls.read_text() if calls.exists() else ""

    return run


def test_the_script_parses():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ((), {}, "usage: bench/gpu.sh kernels|step|quality OUT"),
        (("kernels",), {}, "usage: bench/gpu.sh"),
        (("nothing", "out"), {}, "there is no suite 'nothing'; there are: kernels, step, quality"),
        (("step", "out"), {"ZO_DATA": "/"}, "the bench case 'step' is not there"),
        (("step", "out"), {"ZO_DATA": "/nowhere"}, "no folder of models and data: set ZO_DATA"),
        (("kernels", "/proc/nothing"), {}, "cannot make the folder /proc/nothing"),
        (("kernels", "out"), {"NO_GPU": "1"}, "torch sees no CUDA device"),
        (("kernels", "out"), {"PYTHON": "python9"}, "there is no python9"),
    ],
)
def test_what_keeps_a_suite_from_beginning_is_one_line(suite, words, variables, message):
    status, output, calls = suite(*words, **variables)
    assert status == 2
    assert output.startswith(f"gpu.sh: {message}") and output.count("\n") == 1
    assert "cmake" not in calls and "pytest" not in calls


def test_a_suite_builds_tests_and_measures(suite, tmp_path):
    status, output, calls = suite("kernels", "out")
    assert status == 0 and "gpu.sh: kernels: 1 rows in" in output and output.endswith("all parts ok\n")
    configure, build, tests, bench = (
        re.search(pattern, calls) for pattern in ("cmake -S . ", "cmake --build", "-m pytest", "-m bench kernels")
    )
    assert configure.start() < build.start() < tests.start() < bench.start()
    assert f"-Dpybind11_DIR=/pybind11 -DZO_OUTPUT_DIR={ROOT}/zo_kernels" in calls
    assert f"-DPython_EXECUTABLE={tmp_path}/bin/python3" in calls
    assert "-k cuda or gpu" in calls and "tests/test_triton_noise.py" in calls and "tests/test_bench_gpu.py" in calls
    budget = re.search(r"-m bench kernels --device cuda --out (\S+) --budget (\d+)\n", calls)
    assert calls.endswith(f"-m bench.profile --model-like llama-1b --device cuda --out {tmp_path}/out\n")
    assert budget[1] == str(tmp_path / "out") and 480 < int(budget[2]) <= 505
    for name in ("environment.txt", "build.log", "tests.log", "bench.log", "kernels.jsonl"):
        assert (tmp_path / "out" / name).is_file()


def test_the_step_suite_measures_steps_then_zo_train_then_loading(suite, tmp_path):
    (tmp_path / "data").mkdir()
    status, output, calls = suite("step", "out", CASES="step", ZO_DATA=str(tmp_path / "data"))
    assert status == 0 and output.endswith("all parts ok\n")
    where = f"--device cuda --out {tmp_path}/out --shared {tmp_path}/data"
    step = re.search(rf"-m bench step {where} --model-like llama-1b llama-8b opt-30b --tokens 4096 "
                     rf"--trace {tmp_path}/out/trace.json --budget (\d+)\n", calls)  # fmt: skip
    train = re.search(rf"-m bench train {where} --budget (\d+)\n", calls)
    assert 270 < int(step[1]) <= 291 and 200 < int(train[1]) <= 247  # of 535 s, parts that take no time
    assert calls.endswith(f"-m bench loading {where}\n") and "tests/test_bench_step.py" in calls


def test_quality_pretrains_a_base_and_measures_on_it_in_the_next_call(suite, tmp_path):
    (tmp_path / "data").mkdir()
    variables = {"ZO_DATA": str(tmp_path / "data"), "ZO_BASE": str(tmp_path / "base")}
    options = rf"-m bench quality --device cuda --out {tmp_path}/out"
    status, output, calls = suite("quality", "out", CASES="quality", **variables)
    assert status == 0 and output.endswith("all parts ok\n")
    assert re.search(rf"{options} --pretrain {tmp_path}/data/corpus --out-model {tmp_path}/base --minutes 5\n", calls)
    status, output, calls = suite("quality", "out", CASES="quality", **variables)
    used = re.search(rf"{options} --shared {tmp_path}/data --model {tmp_path}/base --workers 4 --budget (\d+)\n", calls)
    assert status == 0 and 5 <= int(used[1]) <= 7 and calls.count("--pretrain") == 1


def test_a_part_that_fails_does_not_keep_the_others_from_running(suite):
    status, output, calls = suite("kernels", "out", BUILD="1", TESTS="1", BENCH="1")
    assert status == 1 and "failed: build tests bench" in output
    assert "-m pytest" in calls and "1 rows in" in output


def test_a_suite_ends_within_nine_minutes():
    text = SCRIPT.read_text(encoding="utf-8")
    limits = {name: int(value) for name, value in re.findall(r"(\w*LIMIT)=(\d+)", text)}
    killed = int(re.search(r"--kill-after=(\d+)", text)[1])
    assert limits["LIMIT"] + killed <= 540
    assert limits["LIMIT"] - limits["BUILD_LIMIT"] - limits["TEST_LIMIT"] >= 120  # for the measurements, at the worst


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_gpu
def test_events_time_the_gpu_and_not_the_launch():
    """No GPU moves 2 GB in less than 2 GB / 100 TB/s = 21 us; to launch a copy takes the host less than that."""
    clock, x = EventClock(), torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    times = clock.measure(lambda: y.copy_(x), 9)
    assert len(times) == 9 and min(times) > 2 * x.nbytes / 100e12
    assert len(clock.host(lambda: y.copy_(x), 5)) == 5


@needs_gpu
def test_the_gpu_replays_a_captured_call():
    from bench.operations import Tensors, tensor_calls

    sets = [Tensors(*(torch.randn(1 << 12, device="cuda").bfloat16() for _ in range(3))) for _ in range(2)]
    for name, call in tensor_calls(sets).items():
        call.run()
        expected = [t.out.clone() for t in sets]
        replay = EventClock().captured(call.run)
        if "update" in name:
            continue  # its weights have moved on
        for t in sets:
            t.out.zero_()
        replay()
        torch.cuda.synchronize()
        assert all(torch.equal(t.out, before) for t, before in zip(sets, expected, strict=True)), name


@needs_gpu
def test_the_gpu_foils_read_and_perturb_everything():
    from bench.foils import CHUNK, randn, read

    x = torch.randint(-(2**31), 2**31 - 1, (4 * CHUNK,), dtype=torch.int32, device="cuda")
    sink = torch.empty(4, dtype=torch.int32, device="cuda")
    read(x, sink)
    words = x.view(4, CHUNK)
    while words.shape[1] > 1:
        words = words[:, ::2] ^ words[:, 1::2]
    assert torch.equal(sink, words.flatten())
    theta = torch.zeros(100_003, dtype=torch.bfloat16, device="cuda")
    randn([theta], torch.ones((), device="cuda"))
    assert abs(theta.float().mean().item()) < 0.02 and abs(theta.float().std().item() - 1) < 0.02
