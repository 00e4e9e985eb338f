"""Everything that a machine with a GPU can say of this clone, in one command and eight minutes.

    python3 benchmarks/on_gpu.py                          # all of it
    python3 benchmarks/on_gpu.py --only tests benchmark   # some stages
    python3 benchmarks/on_gpu.py --wheels DIR             # with the peers' wheels, offline

Builds the extension into the clone, installs nothing. Every stage has a time limit and leaves a log
and its result in the output folder ($OUT or benchmarks/results/); none stops a later one. Exits
with 0 if all that were asked for passed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
GPU_FIELDS = (
    "name,driver_version,compute_cap,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,memory.used,memory.total"
)
VERSIONS = (
    "import json, platform, torch\n"
    "try:\n    import triton\n    triton = triton.__version__\n"
    "except ImportError as error:\n    triton = str(error)\n"
    "there = torch.cuda.is_available()\n"
    "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__,\n"
    "    'torch_cuda': torch.version.cuda, 'triton': triton, 'cuda_available': there,\n"
    "    'gpu': torch.cuda.get_device_name() if there else None}))\n"
)
PYTEST_FINE = (0, 5)  # 5: no test was asked for
Result = dict[str, Any]


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
        "memcheck",
        MEMCHECK,
        ("--skip", "graph"),
        (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    ),
    Sanitizer("memcheck-graph", MEMCHECK, ("--only", "graph")),
    Sanitizer("racecheck", ("--tool", "racecheck")),
    Sanitizer("initcheck", ("--tool", "initcheck")),
    Sanitizer("synccheck", ("--tool", "synccheck")),
)


class Run:
    """What the stages share: where results go, and the environment of what they start.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.scratch = Path(tempfile.mkdtemp(prefix="ranger_on_gpu_"))
        self.environment = dict(os.environ)
        path = [str(ROOT)]
        if args.wheels:
            path.append(str(unpack(args.wheels, self.scratch / "site")))
        path.append(os.environ.get("PYTHONPATH", ""))
        self.environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        self.environment["PYTHONUNBUFFERED"] = "1"
        tools = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        self.environment["PATH"] = os.pathsep.join(tools)

    def command(self, name: str, command: list[str], limit: float, **environment: str) -> Result:
        """Run it with its output in ``name``.log; stop it, and what it started, at the limit."""
        log = self.out / f"{name}.log"
        begun = time.monotonic()
        with log.open("w") as output:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**self.environment, **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                output.write(f"{error}\n")
                return {"rc": None, "seconds": 0.0, "log": log.name, "why": str(error)}
            self.running.add(process)
            try:
                rc: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                stop(process)
                rc = None
            self.running.discard(process)
        result: Result = {"rc": rc, "seconds": round(time.monotonic() - begun, 1), "log": log.name}
        if rc is None:
            result["why"] = f"stopped after {limit:.0f} s"
        elif rc != 0:
            result["why"] = f"exit status {rc}"
        return result

    def tell(self, *command: str) -> str | None:
        """What a command prints; None if it is not there or fails."""
        try:
            return subprocess.run(
                command,
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    def gpu(self) -> dict[str, str] | None:
        """What nvidia-smi says of the first GPU now."""
        said = self.tell("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader")
        if said is None:
            return None
        values = [value.strip() for value in said.splitlines()[0].split(",")]
        return dict(zip(GPU_FIELDS.split(","), values, strict=False))


# --- stages: each returns its result, with "state": passed, failed or skipped ---------------------


def environment(run: Run) -> Result:
    """Where this is."""
    found: Result = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat()}
    found["commit"] = run.args.commit or run.tell("git", "describe", "--always", "--dirty")
    found["gpu"] = run.gpu()
    found["versions"] = json.loads(run.tell(sys.executable, "-c", VERSIONS) or "{}")
    found["nvcc"] = (run.tell("nvcc", "--version") or "not found").splitlines()[-1]
    found["compute_sanitizer"] = run.tell("compute-sanitizer", "--version")
    found["cores"] = os.cpu_count()
    ok = bool(found["versions"].get("cuda_available"))
    return found | {"state": state(ok)} | ({} if ok else {"why": "torch sees no CUDA device"})


def build(run: Run) -> Result:
    """As ``pip install`` builds it, then into the clone, from where the tests start processes."""
    package, wheels = ROOT / "ranger_cuda", run.scratch / "wheel"
    chosen = {"RANGER_CUDA_ARCHITECTURES": run.args.architectures or architecture(run)}
    pip = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    limit = run.args.limits["build"]
    result = run.command("build", [sys.executable, *pip, "-w", str(wheels), "."], limit, **chosen)
    result["how"] = "pip"
    if result["rc"] == 0:
        with zipfile.ZipFile(next(wheels.glob("ranger_cuda*.whl"))) as wheel:
            for name in wheel.namelist():
                if re.fullmatch(r"ranger_cuda/_C[^/]*\.so", name):
                    place(wheel.read(name), package / Path(name).name)
    elif result["rc"] is not None:
        result = {"pip": result, **build_with_cmake(run, chosen, limit)}
    info = run.command("info", [sys.executable, "-m", "ranger_cuda", "info", "--json"], 120)
    if info["rc"] != 0:
        return result | {"state": "failed", "why": f"`python -m ranger_cuda info`: {info['why']}"}
    result["info"] = json.loads(last_object((run.out / info["log"]).read_text()))
    extension = result["info"]["extension"] or {}
    result["cuda"] = extension.get("cuda")
    device = extension.get("cuda_device", {})
    ok = result["rc"] == 0 and bool(device.get("devices"))
    cause = extension.get("cuda_reason") or device.get("error") or "there is no extension"
    return result | {"state": state(ok)} | ({} if ok else {"why": result.get("why", cause)})


def build_with_cmake(run: Run, chosen: dict[str, str], limit: float) -> Result:
    """Where pip does not serve, for what its setuptools lacks."""
    at = run.scratch / "cmake"
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(at)]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-D{name}={value}" for name, value in chosen.items()]
    steps = (configure, ["cmake", "--build", str(at)])
    for i, command in enumerate(steps):
        result = run.command(f"build-cmake-{i}", command, limit) | {"how": "cmake"}
        if result["rc"] != 0:
            return result
    for binary in at.glob("_C*.so"):
        place(binary.read_bytes(), ROOT / "ranger_cuda" / binary.name)
    return result


def tests(run: Run) -> Result:
    """The whole suite, a process for each file: some of them compile for minutes."""
    begun = time.monotonic()
    end = begun + run.args.limits["tests"]
    options = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=100"]
    options += ["--durations=10", "--color=no", *run.args.pytest]

    def one(file: Path) -> Result:
        command = [sys.executable, *options, str(file.relative_to(ROOT))]
        return run.command(file.stem, command, max(end - time.monotonic(), 1.0))

    files = sorted((ROOT / "tests").glob("test_*.py"))
    with ThreadPoolExecutor(min(os.cpu_count() or 2, 16)) as pool:
        found = dict(zip((file.name for file in files), pool.map(one, files), strict=True))
    counts: Counter[str] = Counter()
    failed, skipped = set(), Counter[str]()
    for file in found.values():
        log = (run.out / file["log"]).read_text(errors="replace")
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


def sanitizer(run: Run, tool: Sanitizer) -> Result:
    """A short run of every kernel under one tool."""
    found = shutil.which("compute-sanitizer", path=run.environment["PATH"])
    if found is None:
        return {"state": "skipped", "why": "compute-sanitizer is not on PATH or in /usr/local/cuda"}
    command = [found, *tool.options, "--error-exitcode", "99", "--print-limit", "30"]
    command += [sys.executable, str(HERE / "sanitized_run.py"), *tool.arguments]
    limit = run.args.limits["sanitizer"]
    result = run.command(f"sanitizer-{tool.name}", command, limit, **dict(tool.environment))
    log = (run.out / result["log"]).read_text(errors="replace")
    result["summary"] = re.findall(r"^=+ (.*SUMMARY.*)$", log, re.MULTILINE)
    result["parts"] = re.findall(r"^(?:ok|FAILED) .*$", log, re.MULTILINE)
    return result | {"state": state(result["rc"] == 0)}


def benchmark(run: Run) -> Result:
    """Times against the peers."""
    out = run.out / "gpu-step-time.json"
    limit = run.args.limits["benchmark"]
    command = [sys.executable, str(HERE / "gpu_step_time.py"), "--out", str(out)]
    command += ["--limit", str(limit - 80), *run.args.benchmark]
    before = run.gpu()
    result = run.command("benchmark", command, limit)
    result |= {"gpu_before": before, "gpu_after": run.gpu()}
    if out.exists():
        result["lines"] = benchmark_lines(json.loads(out.read_text()))
    return result | {"state": state(result["rc"] == 0)}


def sweep(run: Run) -> Result:
    """The choices of csrc/cuda/tables.h; only when it is asked for."""
    command = [sys.executable, str(HERE / "sweep.py"), "--out", str(run.out / "sweep.json")]
    command += ["--architectures", run.args.architectures or architecture(run), *run.args.sweep]
    result = run.command("sweep", command, run.args.limits["sweep"])
    return result | {"state": state(result["rc"] == 0)}


# Those that run at the same time; the benchmark has the machine to itself.
STAGES: tuple[dict[str, Callable[[Run], Result]], ...] = (
    {"environment": environment},
    {"build": build},
    {
        "tests": tests,
        **{
            f"sanitizer-{tool.name}": lambda run, tool=tool: sanitizer(run, tool)
            for tool in SANITIZERS
        },
    },
    {"benchmark": benchmark},
    {"sweep": sweep},
)
NAMES = ("environment", "build", "tests", "sanitizer", "benchmark", "sweep")
DEFAULT = NAMES[:-1]
LIMITS = {"build": 150.0, "tests": 210.0, "sanitizer": 200.0, "benchmark": 240.0, "sweep": 420.0}


def main() -> int:
    """Run the stages, keep and print what they found; 0 if all passed."""
    args = arguments()
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, leave)
    run = Run(args)
    results: dict[str, Result] = {}
    try:
        for together in STAGES:
            chosen = {n: f for n, f in together.items() if n.split("-")[0] in args.only}
            with ThreadPoolExecutor(max(len(chosen), 1)) as pool:
                started = {n: pool.submit(attempt, f, run) for n, f in chosen.items()}
                try:
                    for name, future in started.items():
                        results[name] = future.result()
                        print(headline(name, results[name]), flush=True)
                except BaseException:
                    for process in list(run.running):
                        stop(process)
                    raise
            save(run, results, begun)
    finally:
        shutil.rmtree(run.scratch, ignore_errors=True)
    print("\n".join(summary(results)))
    print(f"\n{time.monotonic() - begun:.0f} s; everything is in {run.out}")
    return 0 if all(result["state"] != "failed" for result in results.values()) else 1


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=DEFAULT, metavar="STAGE")
    today = datetime.date.today().isoformat()
    out = Path(os.environ.get("OUT") or HERE / "results" / f"gpu-{today}")
    parser.add_argument(
        "--out", type=Path, default=out, help="a folder (default: $OUT, or %(default)s)"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=os.environ.get("WHEELS"),
        help="pure Python wheels to measure with",
    )
    parser.add_argument("--architectures", help="as CMake takes them (default: this GPU's)")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    for name in ("pytest", "benchmark", "sweep"):
        parser.add_argument(
            f"--{name}",
            type=shlex.split,
            default=[],
            metavar="ARGS",
            help=f"more for {name}, in one string: --{name}='...'",
        )
    parser.add_argument(
        "--limit",
        nargs=2,
        action="append",
        default=[],
        metavar=("STAGE", "S"),
        help="seconds of a stage",
    )
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.wheels = args.wheels and Path(args.wheels).resolve()
    args.limits = {**LIMITS, **{stage: float(seconds) for stage, seconds in args.limit}}
    return args


# --- helpers --------------------------------------------------------------------------------------


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, gently at first."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def leave(*_: object) -> None:
    """For SIGTERM: stop what runs, too."""
    raise SystemExit(143)


def state(ok: bool) -> str:
    """In a word."""
    return "passed" if ok else "failed"


def attempt(stage: Callable[[Run], Result], run: Run) -> Result:
    """A stage's result, even if the stage itself breaks."""
    try:
        return stage(run)
    except Exception as error:
        return {"state": "failed", "why": f"{type(error).__name__}: {error}"}


def unpack(wheels: Path, site: Path) -> Path:
    """Pure Python wheels are archives; unpacked, they need no pip and change no environment."""
    for wheel in sorted(wheels.glob("*-none-any.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return site


def place(binary: bytes, path: Path) -> None:
    """A new file in place of the old: a process may have that mapped."""
    new = path.with_suffix(".new")
    new.write_bytes(binary)
    new.chmod(0o755)
    new.replace(path)


def architecture(run: Run) -> str:
    """Machine code for this GPU only; as for a Hopper where nvidia-smi says nothing."""
    gpu = run.gpu() or {}
    number = re.fullmatch(r"(\d+)\.(\d+)", gpu.get("compute_cap", ""))
    return f"{number[1]}{number[2]}-real" if number else "90-real"


def last_object(text: str) -> str:
    """The JSON object that a command printed, after whatever was warned of before."""
    return text[text.index("{\n") :]


def benchmark_lines(result: Result) -> list[str]:
    """A line for each workload: ours, and how many times longer some others take."""
    lines = [f"copy: {result['copy']['gb_per_s']:.0f} GB/s"]
    for name, found in result["workloads"].items():
        rows = found.get("rows", {})
        ours = rows.get("ranger", {})
        if "ms" not in ours:
            lines.append(f"{name:<22} not measured: {found.get('missing') or ours.get('missing')}")
            continue
        of_copy = ours["gb_per_s"] / result["copy"]["gb_per_s"]
        others = {
            who: f"{1 / row['ratio']:.2f}"
            for who, row in rows.items()
            if who != "ranger" and "ratio" in row
        }
        replayed = found.get("graph", {}).get("ranger", {}).get("ms")
        lines.append(
            f"{name:<22} {ours['ms']:.4f} ms ({of_copy:.1%} of copy), host {ours['host_ms']:.4f} ms"
            + (f", graph {replayed:.4f} ms" if replayed else "")
            + (f"; NOT VERIFIED: {found['verified']}" if found["verified"] != "yes" else "")
        )
        lines.append(f"{'':<22} " + ", ".join(f"{who} {x}" for who, x in others.items()))
    return [*lines, "promises:", *result.get("promises", ["  the benchmark did not end"])]


def save(run: Run, results: dict[str, Result], begun: float) -> None:
    """Keep what there is so far."""
    whole = {"seconds": round(time.monotonic() - begun, 1), "stages": results}
    (run.out / "summary.json").write_text(json.dumps(whole, indent=1) + "\n")


def headline(name: str, result: Result) -> str:
    """A stage in a line."""
    seconds = f"{result['seconds']:6.1f} s" if "seconds" in result else " " * 8
    return f"{name:<24} {result['state']:<8} {seconds}  {result.get('why', '')}"


def summary(results: dict[str, Result]) -> list[str]:
    """What a person wants to know first."""
    lines = ["\n== summary"]
    where = results.get("environment")
    if where:
        lines += [f"commit {where.get('commit')}, {where.get('versions')}", f"{where.get('gpu')}"]
    if "tests" in results:
        lines.append(f"tests: {dict(results['tests'].get('counts', {}))}")
        lines += [f"  FAILED {name}" for name in results["tests"].get("failed", [])[:40]]
    for name, result in results.items():
        if result.get("summary"):
            lines.append(f"{name}: {'; '.join(result['summary'])}")
        lines += [f"  {part}" for part in result.get("parts", []) if part.startswith("FAILED")]
    lines += results.get("benchmark", {}).get("lines", [])
    lines += [headline(name, result) for name, result in results.items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
