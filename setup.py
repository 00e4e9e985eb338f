"""CMakeLists.txt owns compilation and pyproject.toml the metadata; this hands one to the other.

The environment variable RANGER_BACKENDS chooses what is compiled: ``auto`` (the CPU kernels, and
CUDA where nvcc is found), ``cuda`` (fail without nvcc), ``cpu``, or ``none`` (pure Python).
RANGER_CUDA_ARCHITECTURES chooses the GPUs, as CMAKE_CUDA_ARCHITECTURES takes them, such as
``90-real;75-virtual``; unset or empty: the data centre's, and PTX for all others. RANGER_QUICK=1
leaves out link-time optimisation, for one who compiles often and does not measure.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
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
        root = Path(__file__).resolve().parent
        quick = os.environ.get("RANGER_QUICK", "") not in ("", "0")
        # Not setuptools' build_temp, which an editable install makes anew: what is as it was is not
        # compiled again.
        tag = sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]
        build = root / "build" / f"cmake-{tag}{'-quick' * quick}"
        forget_configuration(build)
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DRANGER_QUICK={int(quick)}"]
        if architectures := os.environ.get("RANGER_CUDA_ARCHITECTURES"):
            options.append(f"-DRANGER_CUDA_ARCHITECTURES={architectures}")
        for command in (
            ["-G", "Ninja", "-S", str(root), "-B", str(build), *options],
            ["--build", str(build)],
            ["--install", str(build), "--prefix", str(package.parent)],
        ):
            cmake(*command)


def forget_configuration(build: Path) -> None:
    """As ``cmake --fresh`` (a compiler may be new), but for what has been compiled."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for found in build.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(found, ignore_errors=True)


def cmake(*arguments: str) -> None:
    """Run CMake; end with its own error if it fails, as installers bury that under their noise."""
    output = ""
    with subprocess.Popen(
        ["cmake", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            print(line, end="", flush=True)
    if process.returncode != 0:
        paragraphs = re.findall(r"^CMake Error.*:\n((?:  .*\n|\n)+)", output, re.MULTILINE)
        reason = " ".join(paragraphs[-1].split()) if paragraphs else "the output above says why"
        sys.exit(f"ranger_cuda: the native build failed: {reason}")


pure_python = os.environ.get("RANGER_BACKENDS") == "none"
setup(
    ext_modules=[] if pure_python else [Extension("ranger_cuda._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
