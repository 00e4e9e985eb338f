"""Time of ``optimizer.step()`` against the peers, side by side in one run, on a CPU or a GPU.

    python -m benchmarks step                                  # on a CPU: measure, print tables
    python -m benchmarks step --device cuda --out FILE.json    # on a GPU, and keep everything
    python -m benchmarks step --check --compare OLD.json       # fail where a promise is not kept,
                                                               # or where we fell back

See benchmarks/README.md for the method.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

import ranger_cuda

from . import promises, show, tables
from .clocks import CYCLE, attempt, copy_bandwidth, fits, free_memory, gpu_state
from .contestants import ADAMW, CONTESTANTS, OURS, PACKAGES, Contestant
from .machine import environment
from .race import NO_TIME, Race, give
from .result_file import load, save
from .workloads import DEFAULT, PLACED, WORKLOADS, Placed, Shapes, random_tensors

ROUNDS = {"cpu": 15, "cuda": 9}
SECONDS = {"cpu": 20.0, "cuda": 1.0}


def main(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Measure what is asked for; 1 if our step is wrong or cannot be measured somewhere, or if what
    ``--check`` and ``--compare`` ask for does not hold."""
    args = arguments(parser, argv)
    old = args.compare and load(args.compare)  # before it may be written over, or hours are lost
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"environment": environment(device, PACKAGES)}
    result["arguments"] = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    args.end = time.monotonic() + args.limit
    result |= {"gpu_before": gpu_state(device), "copy": copy_bandwidth(device), "workloads": {}}
    print(tables.heading(result), flush=True)
    chosen = [c for c in CONTESTANTS if c.name not in args.skip]
    # What matters most is measured on all workloads first: a run that ends early has it.
    for turn in sorted({contestant.turn for contestant in chosen}):
        for name in args.workloads:
            found = result["workloads"].setdefault(name, {"rows": {}})
            measure(name, found, device, args, [c for c in chosen if c.turn <= turn], turn)
            print(tables.workload(name, found, result["copy"], turn), flush=True)
            judged = [line for _, line in promises.judged(result)]
            result["brief"] = [*tables.brief(result), "promises:", *judged]
            save(result, args.out)
    result |= {"copy_after": copy_bandwidth(device), "gpu_after": gpu_state(device)}
    save(result, args.out)
    right_everywhere = all(right(found) for found in result["workloads"].values())
    return show.conclude(result, args.check, old) or int(not right_everywhere)


def arguments(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser.add_argument("--device", choices=DEFAULT, default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME")
    names = [contestant.name for contestant in CONTESTANTS]
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="CONTESTANT")
    parser.add_argument("--rounds", type=int, help="samples of each contestant")
    parser.add_argument("--seconds", type=float, help="of sampling a contestant")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--compile-limit", type=int, default=120, help="seconds for a torch.compile"
    )
    parser.add_argument(
        "--limit", type=float, default=1e9, help="seconds; starts no contestant after"
    )
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    show.add_options(parser)
    args = parser.parse_args(argv)
    args.workloads = args.workloads or DEFAULT[args.device]
    args.rounds = args.rounds or ROUNDS[args.device]
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    return args


def right(found: dict[str, Any]) -> bool:
    """Whether our step was verified and measured, as far as a workload was reached."""
    mine = found["rows"].get(OURS, {})
    return found.get("verified", "yes") == "yes" and (
        "ms" in mine or mine.get("missing") == NO_TIME
    )


def measure(
    name: str,
    found: dict[str, Any],
    device: torch.device,
    args: argparse.Namespace,
    chosen: list[Contestant],
    turn: int,
) -> None:
    """One workload: our step verified once, then the contestants of this turn timed.

    Args:
        found: what is known of the workload; added to. What a later turn's contestants are compared
            with is measured again beside them, and kept under "again".
    """
    shapes = WORKLOADS[name]
    late = NO_TIME if time.monotonic() > args.end else None
    racing = []
    for contestant in chosen:
        if contestant.turn == turn:
            reason = contestant.obstacle(device, len(shapes)) or late
            if reason is None:
                racing.append(contestant)
            else:
                found["rows"][contestant.name] = {"missing": reason, "turn": turn}
    if not racing:
        return
    if "verified" not in found:
        found |= {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes))}
        found["verified"] = verified(name, device)
        free_memory()
    beside = [c for c in chosen if c.turn < turn and c.name in (OURS, ADAMW)]
    together = fits(found["parameters"] * len(beside + racing), device)
    rows = Race(name, device, args, beside + racing).run(together)
    free_memory()
    if beside:
        again = {contestant.name: rows.pop(contestant.name) for contestant in beside}
        found.setdefault("again", {})[str(turn)] = again
    found["rows"] |= {who: row | {"turn": turn} for who, row in rows.items()}
    built = "all at once" if together else "one at a time, twice"
    found.setdefault("built", {})[str(turn)] = built
    found["gpu"] = gpu_state(device)


def verify(
    shapes: Shapes, device: torch.device, placed: Placed, backend: str | None = None
) -> None:
    """What is timed is right: the bits of the reference after every step of two cycles and more.

    Args:
        backend: default: the native one of ``device``.
    """
    backend = backend or device.type
    values = random_tensors(shapes, device, placed.params)
    sets = [[Parameter(value) for value in values], [Parameter(value.clone()) for value in values]]
    fast = ranger_cuda.Ranger(sets[0], backend=backend)
    reference = ranger_cuda.Ranger(sets[1], backend="reference")
    for _ in range(2 * CYCLE + 1):
        gradients = random_tensors(shapes, device, placed.gradients)
        for params in sets:
            give(params, gradients)
        fast.step()
        reference.step()
        if not all(torch.equal(a, b) for a, b in zip(*sets, strict=True)):
            raise AssertionError(f"the step of backend={backend!r} differs from the reference")


def verified(name: str, device: torch.device) -> str:
    """ "yes", or in what our step fails, by one backend or the other."""
    shapes = WORKLOADS[name][: len(WORKLOADS[name]) // 20 + 1]
    placed = PLACED.get(name, Placed())
    reasons: list[str] = []
    for backend in ("cuda", "triton") if device.type == "cuda" else (device.type,):
        if backend == "triton" and ranger_cuda.backends.support.obstacle(backend):
            continue  # its row of the table says so
        row: dict[str, Any] = {}
        attempt(row, lambda backend=backend: verify(shapes, device, placed, backend))
        reasons += row.values()
    return "; ".join(reasons) or "yes"
