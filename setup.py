"""Build glue only: metadata lives in pyproject.toml, the compile recipe in CMakeLists.txt.

ZO_BUILD_EXT   unset: build zo_kernels._C where that works, else install pure Python and say so
               0: do not try      1: a build that fails stops the installation
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
BUILD = os.environ.get("ZO_BUILD_EXT", "")


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        folder = Path(self.build_temp).resolve() / extension.name
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            f"-DZO_OUTPUT_DIR={target}",
        ]
        for command in (configure, ["cmake", "--build", str(folder)]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                if extension.optional:  # setuptools goes on without it
                    print(
                        "zo-finetuner: the C++ kernels were NOT built; the slower pure torch backend remains.\n"
                        "zo-finetuner: they need GCC or Clang (C++17); ZO_BUILD_EXT=1 makes this an error.",
                        file=sys.stderr,
                    )
                raise CompileError(f"{shlex.join(command)}: {error}") from error


setup(
    packages=[*find_packages(include=["zo_kernels*"]), *find_packages("python", include=["zo_finetuner*"])],
    package_dir={"zo_finetuner": "python/zo_finetuner"},
    ext_modules=[] if BUILD == "0" else [Extension("zo_kernels._C", sources=[], optional=BUILD != "1")],
    cmdclass={"build_ext": CMakeBuild},
)
