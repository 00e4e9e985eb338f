"""What a result was measured on, and with."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def environment(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Where and with what it is measured."""
    return {
        "device": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "torch_kernel_arguments": kernel_arguments(torch.version.cuda, multi_tensor_header()),
        "commit": run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "packages": {package: installed(package) for package in packages},
    }


def kernel_arguments(cuda: str | None, header: str) -> int | None:
    """Most bytes of arguments that torch's foreach and fused kernels launch with; None: no CUDA.

    The more, the fewer launches many tensors take: a peer is as fast as its torch was built.

    Args:
        cuda: version that torch was built for.
        header: torch's MultiTensorApply.cuh, which says from which version on there are 32 KB.
    """
    if cuda is None:
        return None
    major, minor = map(int, cuda.split(".")[:2])
    gate = re.search(r"CUDART_VERSION >= (\d+)", header)
    return 32764 if gate and major * 1000 + minor * 10 >= int(gate[1]) else 4096


def multi_tensor_header() -> str:
    """As the installed torch ships it; empty if it does not."""
    path = Path(torch.__file__).parent / "include/ATen/native/cuda/MultiTensorApply.cuh"
    return path.read_text() if path.exists() else ""


def installed(package: str) -> str | None:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(json.dumps(environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
