"""What a step over DTensors costs the host: parameters that FSDP2 has sharded, on one rank of gloo.

python -m benchmarks sharded --out FILE.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from .clocks import CYCLE
from .contestants import ADAMW, CONTESTANTS, OURS, Contestant
from .machine import environment
from .result_file import save

WHO = [c for c in CONTESTANTS if c.name in (OURS, ADAMW, "torch AdamW foreach")]
KINDS = {"kept": "the same gradients", "fresh": "new gradients, of a backward pass"}


class Many(nn.Module):
    """So many parameters of so many elements, each with a gradient of ones."""

    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        self.each = nn.ParameterList(torch.randn(elements) for _ in range(tensors))

    def forward(self) -> Tensor:
        """Their sum."""
        return torch.stack([param.sum() for param in self.each]).sum()


class Runner:
    """A contestant with a model of its own, warmed up past rectification and two syncs."""

    def __init__(self, who: Contestant, model: nn.Module) -> None:
        self.model = model
        self.step = who.build([*model.parameters()])
        for _ in range(2 * CYCLE):
            self.renew()
            self.step()

    def renew(self) -> None:
        """New gradients, by a backward pass of FSDP2's."""
        self.model.zero_grad()
        self.model().backward()

    def sample(self, kind: str) -> float:
        """Milliseconds of a step, the mean of a cycle."""
        taken = 0.0
        for _ in range(CYCLE):
            if kind == "fresh":
                self.renew()
            begun = time.perf_counter()
            self.step()
            taken += time.perf_counter() - begun
        return taken * 1e3 / CYCLE


def measure(tensors: int, elements: int, rounds: int) -> dict[str, Any]:
    """Rows by kind of parameter and contestant, who take turns; ratios are over ours."""
    found: dict[str, Any] = {}
    for placed in ("sharded", "whole"):
        models = [Many(tensors, elements) for _ in WHO]
        if placed == "sharded":
            mesh = dist.init_device_mesh("cpu", (1,))
            models = [fully_shard(model, mesh=mesh) for model in models]
        runners = {who.name: Runner(who, model) for who, model in zip(WHO, models, strict=True)}
        for kind in KINDS:
            taken = [
                {name: runner.sample(kind) for name, runner in runners.items()}
                for _ in range(rounds)
            ]
            for name in runners:
                ms = [each[name] for each in taken]
                over = [each[name] / each[OURS] for each in taken]
                found.setdefault(f"{placed}, {kind}", {})[name] = {
                    "ms": median(ms),
                    "over_ours": median(over),
                    "over_ours_quartiles": quantiles(over, n=4)[::2],
                }
    return found


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    lines = ["| parameters | | ms | over ours |", "|---|---|---|---|"]
    for what, rows in result["rows"].items():
        placed, kind = what.split(", ")
        for name, row in rows.items():
            cells = (
                f"{placed}, {KINDS[kind]}",
                name,
                f"{row['ms']:.3f}",
                f"{row['over_ours']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Measure, and print a table."""
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--elements", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = measure(args.tensors, args.elements, args.rounds)
    finally:
        dist.destroy_process_group()
    sizes = {"tensors": args.tensors, "elements": args.elements, "rounds": args.rounds}
    result = {"environment": environment(torch.device("cpu")), **sizes, "rows": rows}
    save(result, args.out)
    print(table(result))
    return 0
