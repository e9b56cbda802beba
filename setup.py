"""Build glue only: metadata lives in pyproject.toml, the compile recipe in CMakeLists.txt.

ZO_BUILD_EXT   unset: build zo_kernels._C where that works, else install pure Python and say so
               0: do not try, _cuda neither      1: a build that fails stops the installation
ZO_BUILD_CUDA  the same of zo_kernels._cuda, which needs nvcc (found by CUDACXX, PATH, CUDA_HOME, /usr/local/cuda) and
               no GPU; without it the block statistics of GPU tensors come from the Triton backend
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
EXT = os.environ.get("ZO_BUILD_EXT", "")
CUDA = os.environ.get("ZO_BUILD_CUDA") or ("0" if EXT == "0" else "")
MODULES = {"zo_kernels._C": EXT, "zo_kernels._cuda": CUDA}
NOT_BUILT = {
    "zo_kernels._C": "the C++ kernels were NOT built; the slower pure torch backend remains.\n"
    "zo-finetuner: they need GCC or Clang (C++17); ZO_BUILD_EXT=1 makes this an error.",
    "zo_kernels._cuda": "the CUDA statistics were NOT built; they need nvcc; ZO_BUILD_CUDA=1 makes this an error.",
}


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        built = Path(self.get_ext_fullpath(extension.name)).resolve()
        built.unlink(missing_ok=True)  # without nvcc nothing is built, and an older module would pass for this one
        folder = Path(self.build_temp).resolve() / extension.name
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            *(f"-DZO_MODULES={extension.name.rpartition('.')[2]}", f"-DZO_OUTPUT_DIR={built.parent}"),
        ]
        for command in (configure, ["cmake", "--build", str(folder)]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                self._give_up(extension, f"{shlex.join(command)}: {error}")
        if not built.exists():
            self._give_up(extension, "no nvcc in CUDACXX, PATH, CUDA_HOME or /usr/local/cuda")

    def _give_up(self, extension: Extension, reason: str) -> None:
        if extension.optional:  # setuptools goes on without it
            print(f"zo-finetuner: {NOT_BUILT[extension.name]}", file=sys.stderr)
        raise CompileError(reason)


setup(
    packages=[*find_packages(include=["zo_kernels*"]), *find_packages("python", include=["zo_finetuner*"])],
    package_dir={"zo_finetuner": "python/zo_finetuner"},
    ext_modules=[
        Extension(name, sources=[], optional=wanted != "1") for name, wanted in MODULES.items() if wanted != "0"
    ],
    cmdclass={"build_ext": CMakeBuild},
)
