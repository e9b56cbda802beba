"""Installation: a lean import, the pure torch fallback, one OpenMP runtime, clear build errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

UPDATE = """
import torch, zo_kernels as zk
theta = torch.ones(1000, dtype=torch.bfloat16)
blocks, seeds, coefs = zk.Blocks([("w", theta)]), zk.seed_tensor([1, 2]), torch.tensor([0.1, 0.2])
zk.update_(blocks, seeds, coefs, rounding_seed=zk.seed_tensor(3))
assert not torch.equal(theta, torch.ones_like(theta))
print(zk.backend_name("cpu"), theta.view(torch.int16).long().sum().item())
"""


def run(command, **env) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def python(code: str, **env) -> str:
    done = run([sys.executable, "-c", code], **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lean():
    """Neither Triton nor CUDA nor a backend before its first use; nothing of Hugging Face at all."""
    code = """
import sys, zo_kernels, torch
for name in ("triton", "transformers", "datasets", "zo_kernels._C", "zo_kernels.backends.reference"):
    assert name not in sys.modules, name
assert not torch.cuda.is_initialized()
"""
    python(code)


def test_the_fallbacks_update_to_the_same_weights():
    hidden = "import sys; sys.modules['zo_kernels._C'] = None\n" + UPDATE
    chosen = python(UPDATE, ZO_BACKEND="reference")
    warned = run([sys.executable, "-c", hidden], ZO_BACKEND="").stderr
    assert "ops on cpu tensors run in plain torch, slowly: zo_kernels._C is not built" in warned
    assert chosen.startswith("reference ")
    assert python(hidden, ZO_BACKEND="") == chosen


def test_the_native_module_uses_torchs_openmp():
    """Two OpenMP runtimes in one process would fight for the cores."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    code = """
import importlib.util, zo_kernels
if importlib.util.find_spec("zo_kernels._C") is None:
    print("not built")
else:
    import zo_kernels._C
    maps = [line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line]
    print(len(set(maps)))
"""
    found = python(code)
    if found == "not built":
        pytest.skip("zo_kernels._C is not built")
    assert found == "1"


@pytest.fixture
def build(tmp_path):
    """Runs setup.py's build of the extensions with compilers that do not exist."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")

    def run_build(**env):
        folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        command = [sys.executable, str(ROOT / "setup.py"), "build_ext", *folders]
        settings = {"CXX": "/nonexistent/c++", "CUDACXX": "/nonexistent/nvcc", "ZO_BUILD_CUDA": "", **env}
        return run(command, **settings), [*tmp_path.rglob("_C*"), *tmp_path.rglob("_cuda*.so")]

    return run_build


def test_without_a_compiler_the_build_goes_on_and_says_so(build):
    done, built = build(ZO_BUILD_EXT="")
    assert done.returncode == 0, done.stderr
    assert "the C++ kernels were NOT built" in done.stderr
    assert done.stderr.count("the CUDA statistics were NOT built") == 1
    assert not built


def test_an_nvcc_that_cannot_build_stops_nothing(build):
    """It is found, but its host compiler is not there."""
    done, built = build(ZO_BUILD_EXT="", CUDACXX=shutil.which("true"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the CUDA statistics were NOT built") == 1
    assert not built


def test_a_demanded_build_fails_with_the_cmake_command(build):
    done, _ = build(ZO_BUILD_EXT="1")
    assert done.returncode != 0
    assert f"cmake -S {ROOT} -B " in done.stderr


def test_demanded_cuda_statistics_fail_without_nvcc(build):
    done, _ = build(ZO_BUILD_EXT="0", ZO_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "no nvcc in CUDACXX, PATH, CUDA_HOME or /usr/local/cuda" in done.stderr
    assert "C++ kernels" not in done.stderr


@pytest.mark.parametrize("cuda", ["", "0"])
def test_the_build_can_be_left_out(build, cuda):
    done, built = build(ZO_BUILD_EXT="0", ZO_BUILD_CUDA=cuda)
    assert done.returncode == 0, done.stderr
    assert "cmake" not in done.stdout + done.stderr
    assert not built
