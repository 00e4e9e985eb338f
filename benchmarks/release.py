"""What ``release_gradients()`` costs in time, and how much memory it saves, on the CPU."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from ranger_cuda import Ranger

from .clocks import CYCLE
from .machine import environment
from .result_file import save

SMALL = 1000  # parameters of one element
LAYERS, SIDE, BATCH = 24, 512, 16


class Loop(NamedTuple):
    """A training loop; `optimizer` steps after backward, if there is one that does."""

    params: list[Tensor]
    forward: Any
    optimizer: Ranger | None

    def backward_and_step(self) -> float:
        """Seconds from the loss to moved parameters without gradients."""
        loss = self.forward()
        start = time.perf_counter()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        for param in self.params:
            param.grad = None
        return time.perf_counter() - start


def small() -> tuple[list[Tensor], Any]:
    """Many parameters, in which only the host has work."""
    params: list[Tensor] = [Parameter(torch.ones(1)) for _ in range(SMALL)]
    return params, lambda: torch.cat(params).sum()


def deep() -> tuple[list[Tensor], Any]:
    """Layers of one size."""
    layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    model, inputs = torch.nn.Sequential(*layers), torch.randn(BATCH, SIDE)
    return [*model.parameters()], lambda: model(inputs).square().mean()


def loops(workload: Any) -> dict[str, Loop]:
    """The same with and without released gradients, with an optimizer of torch's for each
    parameter, and with backward alone."""
    found = {}
    for name in ("released", "step", "torch", "backward"):
        params, forward = workload()
        optimizer = Ranger(params) if name in ("released", "step") else None
        if name == "released" and optimizer is not None:
            optimizer.release_gradients()
        if name == "torch":
            release_as_torch_says(params)
        found[name] = Loop(params, forward, optimizer)
    return found


def release_as_torch_says(params: list[Tensor]) -> None:
    """What torch's tutorial on fusing an optimizer into backward does."""
    each = {param: torch.optim.Adam([param], fused=True) for param in params}

    def hook(param: Tensor) -> None:
        each[param].step()
        each[param].zero_grad()

    for param in params:
        param.register_post_accumulate_grad_hook(hook)


def seconds(workload: Any, rounds: int) -> dict[str, float]:
    """The median over rounds in which all take turns."""
    taking_part = loops(workload)
    samples: dict[str, list[float]] = {name: [] for name in taking_part}
    for turn in range(CYCLE + rounds):
        for name, loop in taking_part.items():
            taken = loop.backward_and_step()
            if turn >= CYCLE:
                samples[name].append(taken)
    return {name: median(taken) for name, taken in samples.items()}


def peaks() -> dict[str, float]:
    """The most that backward and step take beyond what is there before, in bytes of all
    parameters."""
    found = {}
    for name, loop in loops(deep).items():
        for _ in range(2):
            loop.backward_and_step()
        whole = sum(p.numel() * p.element_size() for p in loop.params)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            loop.backward_and_step()
        taken = most = 0
        events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                taken += event.nbytes()
                most = max(most, taken)
        found[name] = most / whole
    return found


def main(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Measure both and print them."""
    parser.add_argument("--rounds", type=int, default=60, help="of turns, default 60")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    times = {workload.__name__: seconds(workload, args.rounds) for workload in (small, deep)}
    result = {
        "environment": environment(torch.device("cpu")),
        "sizes": {"small": SMALL, "deep": [LAYERS, SIDE, BATCH]},
        "seconds": times,
        "peak": peaks(),
    }
    save(result, args.out)
    for name, taken in times.items():
        ratios = {of: f"{taken['released'] / taken[of]:.2f}" for of in taken}
        print(f"{name}: released gradients take {ratios} of the others' time")
    print("most memory in backward and step, of the parameters' bytes:", result["peak"])
    return 0
