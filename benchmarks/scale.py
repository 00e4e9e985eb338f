"""What a step and its state take where models are large: arithmetic, from the tables of formats and
launches and from one measured number. Nothing here has been measured on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

from ranger_cuda.state import formats
from ranger_cuda.state.formats import Format

from . import result_file
from .workloads import Shapes

K = 6  # Lookahead's period
GPUS = (8, 64, 256, 1024)
RESULT = "cpu-2026-11-25.json"  # of the host's time
# csrc/cuda/tables.h: words of arguments that a launch of the schedule kernel takes, from CUDA 12.1
# on; of them a group takes so many, and each tensor one.
SCHEDULE_WORDS = 4083
GROUP_WORDS = 18
GROUPS = 2  # with weight decay, and without
BANDWIDTH = 3.35e12  # bytes a second: an H100 SXM's data sheet
REACHED = 0.9  # of it: assumed
# Bytes a second and GPU, each way, assumed to be reached: NVLink between the eight GPUs of a
# machine, and between machines a link of 400 Gb/s for each GPU.
NVLINK, NETWORK = 450e9, 50e9
A_MACHINE = 8
WORD_OF_GATHER = 2  # bytes: bfloat16 weights and gradients travel
GB = 1e9


def llama3(layers: int, width: int, hidden: int) -> Shapes:
    """Llama 3 (arXiv:2407.21783, table 3): 8 heads of keys and values of 128, 128,256 tokens."""
    attention: Shapes = [(width, width), (1024, width), (1024, width), (width, width)]
    mlp: Shapes = [(hidden, width), (hidden, width), (width, hidden)]
    ends: Shapes = [(128_256, width), (128_256, width), (width,)]
    return [*ends, *[*attention, *mlp, (width,), (width,)] * layers]


def mixture(layers: int) -> Shapes:
    """Layers of Qwen3-30B-A3B (arXiv:2505.09388): 128 experts with three tensors each."""
    attention: Shapes = [(4096, 2048), (512, 2048), (512, 2048), (2048, 4096), (128,), (128,)]
    experts: Shapes = [(128, 2048), *[(768, 2048), (768, 2048), (2048, 768)] * 128]
    ends: Shapes = [(151_936, 2048), (151_936, 2048), (2048,)]
    return [*ends, *[*attention, *experts, (2048,), (2048,)] * layers]


MODELS = {
    "Llama 3 8B": llama3(32, 4096, 14_336),
    "Llama 3 70B": llama3(80, 8192, 28_672),
    "Llama 3 405B": llama3(126, 16_384, 53_248),
    "a mixture of experts": mixture(64),
}


class Bytes(NamedTuple):
    """Of a parameter element."""

    state: float
    kept: float  # with the parameter and its gradient, which is of the parameter's dtype
    moved: float  # by a step, the mean over a cycle of Lookahead


@cache
def bytes_of(format: Format) -> Bytes:
    """What Ranger keeps and moves in a format."""

    def size(of: Iterable[formats.Part]) -> float:
        return sum(part.dtype.itemsize / (32 if part.is_grouped else 1) for part in of)

    own = format.param.dtype.itemsize
    slow = size(format.of("slow_param"))
    fast = size(format.parts(formats.MOMENTS))
    # Each is read and written, but the gradient; the slow weight in one step of a cycle.
    return Bytes(fast + slow, fast + slow + 2 * own, 2 * (own + fast) + own + 2 * slow / K)


def format_of(format: Format, elements: int) -> Format:
    """That of a parameter of so many elements, where ``format`` was asked for."""
    if format.state_dtype == "8bit" and elements < formats.LEAST_FOR_8_BIT:
        return formats.of(format.param.dtype, format.weight_rounding or "exact")
    return format


def on_a_gpu(shapes: Shapes, gpus: int, format: Format) -> tuple[float, float]:
    """GB of state of the fullest GPU, and the milliseconds of its step that memory alone takes."""
    state = moved = 0.0
    for shape, count in Counter(shapes).items():
        each = bytes_of(format_of(format, prod(shape)))
        part = count * ceil(shape[0] / gpus) * prod(shape[1:])  # FSDP2 cuts the first dimension
        state += part * each.state + 4 * count  # and step counts
        moved += part * each.moved
    return state / GB, moved / (BANDWIDTH * REACHED) * 1e3


def schedule_launches(tensors: int) -> int:
    """Launches of the schedule kernel for so many tensors, if each has rows of every group."""
    return ceil(tensors / (SCHEDULE_WORDS - GROUPS * GROUP_WORDS))


def microseconds_per_tensor() -> float:
    """Of the host, in a step over 1,000 tensors of one element with new gradients."""
    path = Path(__file__).parent / "results" / RESULT
    row = result_file.load(path)["workloads"]["1000 x 1"]["rows"]["ranger"]
    return row["fresh"]["ms"]


def gathered(shapes: Shapes, gpus: int) -> float:
    """GB that FSDP2 has each GPU receive in a training step: the weights in the forward pass and
    again in the backward pass, and gradients reduced."""
    return 3 * WORD_OF_GATHER * sum(map(prod, shapes)) * (gpus - 1) / gpus / GB


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; its first column is of words."""
    columns = [*columns]
    rule = ["---", *["--:"] * (len(columns) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (columns, rule, *rows)]


def number(value: float) -> str:
    """To three digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def report() -> str:
    """All tables, as docs/scale.md has them."""
    asked = [format for format in formats.FORMATS if format.name != "float64"]
    lines = ["### Bytes of a parameter", ""]
    rows = ([f.name, *(f"{value:.2f}" for value in bytes_of(f))] for f in formats.FORMATS)
    heads = ("format", "state", "with parameter and gradient", "moved a step")
    lines += table(heads, rows)
    host = microseconds_per_tensor()
    lines += ["", "### Launches, host and network, for each GPU", ""]
    rows = []
    for name, shapes in MODELS.items():
        for gpus in GPUS:
            traffic = gathered(shapes, gpus)
            launches = schedule_launches(len(shapes))
            cells = [f"{len(shapes):,}", str(launches), number(host * len(shapes) / 1e3)]
            speed = NVLINK if gpus <= A_MACHINE else NETWORK
            cells += [number(traffic), number(traffic * GB / speed * 1e3)]
            rows.append([name, f"{gpus:,}", *cells])
    heads = ("model", "GPUs", "tensors", "schedule launches", "host, ms", "FSDP2, GB", "FSDP2, ms")
    lines += table(heads, rows)
    for name, shapes in MODELS.items():
        billions = sum(map(prod, shapes)) / 1e9
        lines += [
            "",
            f"### {name}: {billions:,.1f} billion parameters, {len(shapes):,} tensors",
            "",
        ]
        rows = []
        for format in asked:
            found = [on_a_gpu(shapes, gpus, format) for gpus in GPUS]
            rows.append([format.name, *(f"{number(gb)}, {number(ms)}" for gb, ms in found)])
        lines += table(["GB of state, ms of memory", *(f"{g:,} GPUs" for g in GPUS)], rows)
    return "\n".join(lines) + "\n"


def main(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Print the tables."""
    parser.parse_args(argv)
    print(report(), end="")
    return 0
