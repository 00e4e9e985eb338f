"""The stages of a run on a GPU: what each runs, and what it finds in what that printed."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .commands import ROOT, Commands, Result, cmake

MEASURE = [sys.executable, "-m", "benchmarks"]
GPU_FIELDS = (
    "name,driver_version,compute_cap,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,memory.used,memory.total"
)
BENCHMARK_ENDS_IN = 80.0  # seconds: a contestant that has begun, and what is measured last
PYTEST_FINE = (0, 5)  # 5: no test was asked for


class Job(NamedTuple):
    """What a stage works with."""

    commands: Commands
    args: argparse.Namespace
    end: float  # of the time it has, as time.monotonic() has it

    def run(self, name: str, command: list[str], **environment: str) -> Result:
        """As :meth:`Commands.run`."""
        return self.commands.run(name, command, self.end, **environment)

    def tell(self, *command: str) -> str | None:
        """As :meth:`Commands.tell`."""
        return self.commands.tell(self.end, *command)


class Sanitizer(NamedTuple):
    """A run under compute-sanitizer."""

    name: str
    options: tuple[str, ...]
    arguments: tuple[str, ...] = ()  # of sanitized_run.py
    environment: tuple[tuple[str, str], ...] = ()


# Failing calls are checked where they are made, and libraries make some that may fail.
MEMCHECK = ("--tool", "memcheck", "--report-api-errors", "no")
# Without torch's caching every tensor is an allocation of its own, so that an access beyond it is
# seen; a capture needs the cache.
SANITIZERS = (
    Sanitizer(
        "memcheck", MEMCHECK, ("--skip", "graph"), (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    ),
    Sanitizer("memcheck-graph", MEMCHECK, ("--only", "graph")),
    Sanitizer("racecheck", ("--tool", "racecheck")),
    Sanitizer("initcheck", ("--tool", "initcheck")),
    Sanitizer("synccheck", ("--tool", "synccheck")),
)


def environment(job: Job) -> Result:
    """Where this is."""
    found: Result = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat()}
    found["commit"] = job.args.commit or job.tell("git", "describe", "--always", "--dirty")
    found["gpu"] = gpu(job)
    found["versions"] = json.loads(job.tell(sys.executable, "-m", "benchmarks.machine") or "{}")
    found["nvcc"] = (job.tell("nvcc", "--version") or "not found").splitlines()[-1]
    found["compute_sanitizer"] = job.tell("compute-sanitizer", "--version")
    ok = bool(found["versions"].get("cuda_available"))
    return found | {"state": state(ok)} | ({} if ok else {"why": "torch sees no CUDA device"})


def build(job: Job) -> Result:
    """As ``pip install`` builds it, then into the clone, from where the tests start processes."""
    package, wheels = ROOT / "ranger_cuda", job.commands.scratch / "wheel"
    chosen = {"RANGER_CUDA_ARCHITECTURES": job.args.architectures or architecture(job)}
    pip = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    result = job.run("build", [sys.executable, *pip, "-w", str(wheels), "."], **chosen)
    result["how"] = "pip"
    if result["rc"] == 0:
        with zipfile.ZipFile(next(wheels.glob("ranger_cuda*.whl"))) as wheel:
            for name in wheel.namelist():
                if re.fullmatch(r"ranger_cuda/_C[^/]*\.so", name):
                    place(wheel.read(name), package / Path(name).name)
    elif result["rc"] is not None:
        result = {"pip": result, **build_with_cmake(job, chosen)}
    info = job.run("info", [sys.executable, "-m", "ranger_cuda", "info", "--json"])
    if info["rc"] != 0:
        return result | {"state": "failed", "why": f"`python -m ranger_cuda info`: {info['why']}"}
    result["info"] = json.loads(last_object(job.commands.text(info)))
    extension = result["info"]["extension"] or {}
    result["cuda"] = extension.get("cuda")
    device = extension.get("cuda_device", {})
    ok = result["rc"] == 0 and bool(device.get("devices"))
    cause = extension.get("cuda_reason") or device.get("error") or "there is no extension"
    return result | {"state": state(ok)} | ({} if ok else {"why": result.get("why", cause)})


def build_with_cmake(job: Job, chosen: dict[str, str]) -> Result:
    """Where pip does not serve, for what its setuptools lacks."""
    at = job.commands.scratch / "cmake"
    for i, command in enumerate(cmake(at, chosen)):
        result = job.run(f"build-cmake-{i}", command) | {"how": "cmake"}
        if result["rc"] != 0:
            return result
    for binary in at.glob("_C*.so"):
        place(binary.read_bytes(), ROOT / "ranger_cuda" / binary.name)
    return result


def tests(job: Job) -> Result:
    """The whole suite, a process for each file: some of them compile for minutes."""
    begun = time.monotonic()
    options = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=100"]
    options += ["--durations=10", "--color=no", *job.args.pytest]

    def one(file: Path) -> Result:
        command = [sys.executable, *options, str(file.relative_to(ROOT))]
        return job.run(file.stem, command)

    files = sorted((ROOT / "tests").glob("test_*.py"))
    with ThreadPoolExecutor(min(os.cpu_count() or 2, 16)) as pool:
        found = dict(zip((file.name for file in files), pool.map(one, files), strict=True))
    counts: Counter[str] = Counter()
    failed, skipped = set(), Counter[str]()
    for file in found.values():
        log = job.commands.text(file)
        outcomes = re.findall(
            r"^(tests/\S+?::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", log, re.MULTILINE
        )
        counts.update(how for _, how in outcomes)
        failed |= {name for name, how in outcomes if how in {"FAILED", "ERROR"}}
        for number, why in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", log, re.MULTILINE):
            skipped[why] += int(number)
    wrong = {name: file["why"] for name, file in found.items() if file["rc"] not in PYTEST_FINE}
    result: Result = {"seconds": round(time.monotonic() - begun, 1), "counts": counts}
    result |= {"failed": sorted(failed), "skipped": skipped, "files": found}
    if wrong:
        result["why"] = "; ".join(f"{name}: {why}" for name, why in wrong.items())
    return result | {"state": state(not wrong)}


def sanitizer(job: Job, tool: Sanitizer) -> Result:
    """A short run of every kernel under one tool."""
    found = shutil.which("compute-sanitizer", path=job.commands.environment["PATH"])
    if found is None:
        return {"state": "skipped", "why": "compute-sanitizer is not on PATH or in /usr/local/cuda"}
    command = [found, *tool.options, "--error-exitcode", "99", "--print-limit", "30"]
    command += [sys.executable, "-m", "benchmarks.on_gpu.sanitized_run", *tool.arguments]
    result = job.run(f"sanitizer-{tool.name}", command, **dict(tool.environment))
    log = job.commands.text(result)
    result["summary"] = re.findall(r"^=+ (.*SUMMARY.*)$", log, re.MULTILINE)
    result["parts"] = re.findall(r"^(?:ok|FAILED) .*$", log, re.MULTILINE)
    return result | {"state": state(result["rc"] == 0)}


def benchmark(job: Job) -> Result:
    """Times against the peers."""
    out = job.commands.out / "step-time.json"
    left = job.end - time.monotonic()
    command = [*MEASURE, "step", "--device", "cuda", "--compile-limit", "45", "--out", str(out)]
    command += ["--limit", f"{max(left - BENCHMARK_ENDS_IN, 1):.0f}", *job.args.benchmark]
    result = job.run("benchmark", command)
    if out.exists():
        result["lines"] = json.loads(out.read_text()).get("brief", [])
    return result | {"state": state(result["rc"] == 0)}


def sweep(job: Job) -> Result:
    """The choices of csrc/cuda/tables.h; only when it is asked for."""
    out = job.commands.out / "sweep.json"
    command = [*MEASURE, "sweep", "--out", str(out)]
    command += ["--architectures", job.args.architectures or architecture(job), *job.args.sweep]
    result = job.run("sweep", command)
    return result | {"state": state(result["rc"] == 0)}


# --- helpers --------------------------------------------------------------------------------------


def state(ok: bool) -> str:
    """In a word."""
    return "passed" if ok else "failed"


def gpu(job: Job) -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU now."""
    said = job.tell("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader")
    if said is None:
        return None
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(GPU_FIELDS.split(","), values, strict=False))


def place(binary: bytes, path: Path) -> None:
    """A new file in place of the old: a process may have that mapped."""
    new = path.with_suffix(".new")
    new.write_bytes(binary)
    new.chmod(0o755)
    new.replace(path)


def architecture(job: Job) -> str:
    """Machine code for this GPU only; as for a Hopper where nvidia-smi says nothing."""
    number = re.fullmatch(r"(\d+)\.(\d+)", (gpu(job) or {}).get("compute_cap", ""))
    return f"{number[1]}{number[2]}-real" if number else "90-real"


def last_object(text: str) -> str:
    """The JSON object that a command printed, after whatever was warned of before."""
    return text[text.index("{\n") :]
