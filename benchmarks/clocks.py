"""The device that is measured on: its clock, its memory, its bandwidth; and calls that may fail."""

from __future__ import annotations

import gc
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .machine import run

Step = Callable[[], object]
CYCLE = 6  # Lookahead's period: every sample has as many syncs as every other
BYTES_OF_A_CONTESTANT = 20  # for a parameter: itself, three states, and temporaries
GPU_STATE = "pstate,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def capture(step: Step, device: torch.device, steps: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of ``steps`` steps, after a cycle on a side stream as captures want it."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(CYCLE):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            step()
    return graph


def wait(device: torch.device) -> None:
    """Until all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Starts on an idle device; called, it waits, and returns the milliseconds."""
    wait(device)
    if device.type != "cuda":
        begun = time.perf_counter()
        return lambda: (time.perf_counter() - begun) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def elapsed() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return elapsed


def copy_bandwidth(device: torch.device) -> dict[str, Any]:
    """Bytes read and written by a copy within the device, over buffers that no cache holds.

    By ``cudaMemcpy``, which is the baseline, and by a kernel that scales.
    """
    size = 2**28 if device.type == "cuda" else 2**22  # float32 elements: 1 GiB
    pairs = [(torch.randn(size, device=device), torch.empty(size, device=device)) for _ in range(3)]
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        "memcpy": lambda source, target: target.copy_(source),
        "kernel": lambda source, target: torch.mul(source, 2.0, out=target),
    }
    for name, call in calls.items():
        samples = []
        for _ in range(12):
            elapsed = stopwatch(device)
            for source, target in pairs:
                call(source, target)
            samples.append(len(pairs) * size * 8 / elapsed() / 1e6)
        taken = samples[2:]  # the clocks have risen by then
        found[name] = {"gb_per_s": median(taken), "range": [min(taken), max(taken)]}
    del pairs
    free_memory()
    return {"gb_per_s": found["memcpy"]["gb_per_s"], **found}


def fits(parameters: int, device: torch.device) -> bool:
    """Whether this many may be there at once, with all that belongs to them."""
    return parameters * BYTES_OF_A_CONTESTANT < 0.6 * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        found = None
    return int(found[1]) * 1024 if found else 2**33


def allocated(step: Step, device: torch.device) -> int:
    """Bytes of tensor memory that a whole cycle of steps asks for."""
    if device.type == "cuda":
        key = "allocated_bytes.all.allocated"
        before = torch.cuda.memory_stats(device)[key]
        for _ in range(CYCLE):
            step()
        return torch.cuda.memory_stats(device)[key] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(CYCLE):
            step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


def free_memory() -> None:
    """Give back everything that nobody holds."""
    torch._dynamo.reset()  # its guards hold optimizers
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_state(device: torch.device) -> str | None:
    """Clocks, power and temperature now."""
    if device.type != "cuda":
        return None
    return run("nvidia-smi", f"--query-gpu={GPU_STATE}", "--format=csv,noheader")


# From BaseException, for torch.compile wraps every other in one of its own.
class OutOfTime(BaseException):
    """A time limit was reached."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTime within, if it takes longer; 0: no limit."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again every five seconds: what is raised within a callback of C is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(row: dict[str, Any], call: Callable[[], Any]) -> Any:
    """What ``call`` returns; if it fails, None and the reason in ``row``."""
    try:
        return call()
    except (Exception, OutOfTime) as error:  # whatever a peer's package raises
        lines = str(error).strip().splitlines()
        row["missing"] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    gc.collect()
    return None
