"""``python -m ranger_cuda info``: what runs on this machine, and what would fix the rest."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any, get_args

import torch

from .. import Ranger, __version__
from ..backends import support


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, for reports")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if every backend that is chosen by itself here takes a real step."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if all(not row["step"].startswith("failed") for row in report["backends"]) else 1


def collect() -> dict[str, Any]:
    """Everything a bug report needs, as plain data."""
    extension = support.extension()
    built = None if isinstance(extension, support.Obstacle) else extension.build_info()
    return {
        "ranger_cuda": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "openmp_runtimes": openmp_runtimes(),
        "extension": built,
        "backends": [backend_row(name) for name in get_args(support.BackendName)],
    }


def backend_row(name: support.BackendName) -> dict[str, str]:
    """One backend: whether it works here, tried out with a real step, and if not, why."""
    backend = support.BACKENDS[name]
    what = f"{backend.what} ({support.describe(backend)})"
    row = {"name": name, "works": "yes", "what": what, "step": "", "cause": "", "fix": ""}
    why_not = support.obstacle(name)
    if why_not is not None:
        return {**row, "works": "no", "cause": why_not.cause, "fix": why_not.fix}
    return {**row, "step": try_step(name)}


def try_step(backend: support.BackendName) -> str:
    """Take one step and look at what it did."""
    device = support.device_type_here(support.BACKENDS[backend])
    param = torch.nn.Parameter(torch.ones(5, device=device))
    param.grad = torch.ones_like(param)
    try:
        Ranger([param], lr=0.5, backend=backend).step()
    except RuntimeError as error:
        return f"failed: {error}"
    # The first step is not rectified: p - lr / (1 - beta1) * (1 - beta1) * g.
    right = torch.allclose(param, torch.full_like(param, 0.5), rtol=1e-6)
    return "ok" if right else "failed: a wrong result"


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process; more than one means two competing thread pools."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "omp" in line and ".so" in line}
    except OSError:  # not Linux
        return []
    names = ("libgomp", "libiomp", "libomp")
    return sorted(path for path in paths if os.path.basename(path).startswith(names))


def as_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"ranger_cuda {report['ranger_cuda']}, torch {report['torch']}, "
        f"Python {report['python']}, {report['platform']}",
        f"threads: {report['threads']}",
        f"OpenMP: {', '.join(report['openmp_runtimes']) or 'unknown'}",
        "",
        "backends",
    ]
    for row in report["backends"]:
        works = f"works, a step: {row['step']}" if row["works"] == "yes" else "does not run here"
        lines.append(f"  {row['name']:<10} {works}")
        lines.append(f"  {'':<10} {row['what']}")
        if row["cause"]:
            lines.append(f"  {'':<10} why: {row['cause']}")
            lines.append(f"  {'':<10} fix: {row['fix']}")
    lines.append("")
    lines.extend(extension_lines(report["extension"]))
    return "\n".join(lines)


def extension_lines(built: dict[str, Any] | None) -> list[str]:
    """What the compiled extension is, in words."""
    if built is None:
        return ["extension: none; every parameter is moved by the reference backend"]
    cuda = built["cuda"] or f"none ({built['cuda_reason']})"
    lines = [
        f"extension: {built['compiler']}, commit {built['commit'] or 'unknown'}, "
        f"CPU instruction set in use: {built['cpu_capability']}",
        f"CUDA compiler: {cuda}"
        + (f", architectures {built['cuda_architectures']}" if built["cuda"] else ""),
    ]
    device = built.get("cuda_device")
    if device is not None:
        found = ", ".join(device["devices"]) or f"none: {device['error']}"
        lines.append(f"CUDA devices: {found}")
    return lines
