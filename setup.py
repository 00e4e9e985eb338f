"""CMakeLists.txt owns compilation and pyproject.toml the metadata; this hands one to the other.

The environment variable RANGER_BACKENDS chooses what is compiled: ``auto`` (the CPU kernels, and
CUDA where nvcc is found), ``cuda`` (fail without nvcc), ``cpu``, or ``none`` (pure Python).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Builds and installs with CMake and Ninja, in place for an editable install."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install ``ext`` to where setuptools expects it."""
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"ranger_cuda: {tool} was not found; install it: pip install {tool}")
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = str(Path(self.build_temp).resolve())
        python = f"-DPython_EXECUTABLE={sys.executable}"
        source = str(Path(__file__).resolve().parent)
        for command in (
            ["--fresh", "-G", "Ninja", "-S", source, "-B", build, python],
            ["--build", build],
            ["--install", build, "--prefix", str(package.parent)],
        ):
            if subprocess.run(["cmake", *command]).returncode != 0:
                sys.exit("ranger_cuda: the native build failed; CMake's message above says why")


pure_python = os.environ.get("RANGER_BACKENDS") == "none"
setup(
    ext_modules=[] if pure_python else [Extension("ranger_cuda._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
