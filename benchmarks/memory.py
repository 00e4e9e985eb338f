"""How many bytes of state an optimizer keeps for a parameter: what is there after a step.

TRITON_INTERPRET=1 python -m benchmarks memory --out FILE.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ranger_cuda import RAdam, Ranger
from ranger_cuda.state import formats

from . import flashoptim_on_cpu
from .contestants import OUR_PACKAGE, of
from .machine import environment, installed
from .result_file import save

SIDE = 1024  # of the square parameter
BF16 = torch.bfloat16


class Row(NamedTuple):
    """An optimizer, and the parameters that it is given."""

    name: str
    package: str
    build: Callable[[list[Parameter]], Any]
    dtype: torch.dtype
    within: Callable[[], AbstractContextManager[None]] = nullcontext


def ours() -> Iterator[Row]:
    """Ours in every format, without slow weights and with them."""
    for kind in (RAdam, Ranger):
        for state in formats.STATE_DTYPES:
            shown = str(state).removeprefix("torch.")
            for dtype in (torch.float32, BF16):
                roundings = formats.WEIGHT_ROUNDINGS if dtype == BF16 else ("exact",)
                for rounding in roundings:
                    name = f"{kind.__name__} {shown}" + f", {rounding}" * (dtype == BF16)
                    build = partial(kind, weight_rounding=rounding, state_dtype=state)
                    yield Row(name, OUR_PACKAGE, build, dtype)


def _stepped(module: str, kind: str, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """What a row of a peer's is made of."""

    def build(params: list[Parameter]) -> Any:
        return of(module, kind, **options)(params).__self__  # type: ignore[attr-defined]

    return {"build": build, "dtype": dtype}


def peers() -> Iterator[Row]:
    """The others, through their own classes."""
    f32 = torch.float32
    for dtype in (f32, BF16):
        yield Row("torch AdamW", "torch", **_stepped("torch.optim", "AdamW", dtype))
        yield Row("optimi AdamW", "torch-optimi", **_stepped("optimi", "AdamW", dtype))
        yield Row("optimi Ranger", "torch-optimi", **_stepped("optimi", "Ranger", dtype))
        kwargs = _stepped("pytorch_optimizer", "Ranger", dtype)
        yield Row("pytorch-optimizer Ranger", "pytorch-optimizer", **kwargs)
        kwargs = _stepped("bitsandbytes.optim", "AdamW8bit", dtype)
        yield Row("bitsandbytes AdamW8bit", "bitsandbytes", **kwargs)
        yield Row("torchao AdamW8bit", "torchao", **_stepped("torchao.optim", "AdamW8bit", dtype))
    on_cpu = flashoptim_on_cpu.allowed
    for name, bits, dtype in (("", None, f32), (", 24-bit master", 24, BF16)):
        kwargs = _stepped("flashoptim", "FlashAdamW", dtype, master_weight_bits=bits)
        yield Row(f"FlashOptim AdamW{name}", "flashoptim", **kwargs, within=on_cpu)


def bytes_of(value: Any) -> int:
    """The memory of all tensors in a state, also of those inside of wrappers and objects."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            return sum(bytes_of(getattr(value, name)) for name in names)
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(bytes_of, value))
    # FlashOptim's wrapper is no tensor.
    return sum(map(bytes_of, getattr(value, "__dict__", {}).values()))


def measured(row: Row) -> float:
    """Bytes of state a parameter, after a step."""
    with row.within():
        param = Parameter(torch.randn(SIDE, SIDE).to(row.dtype))
        param.grad = torch.randn(SIDE, SIDE).to(row.dtype)
        optimizer = row.build([param])
        optimizer.step()
        return bytes_of(optimizer.state[param]) / param.numel()


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown: ours and the peers', the state alone and with the parameter."""
    lines = ["| optimizer | parameter | state | with the parameter |", "| --- | --- | --- | --- |"]
    for row in rows:
        state = row["bytes"]
        own = 2 if row["dtype"] == "bfloat16" else 4
        cells = f"{state:.2f} | {state + own:.2f}" if state is not None else f"{row['why']} | –"
        lines.append(f"| {row['name']} | {row['dtype']} | {cells} |")
    return "\n".join(lines)


def main(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Measure all of them on the CPU."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, as JSON")
    args = parser.parse_args(argv)
    rows = []
    every = [*ours(), *peers()]
    for row in every:
        found: dict[str, Any] = {"name": row.name, "dtype": str(row.dtype).removeprefix("torch.")}
        try:
            found["bytes"] = measured(row)
        except Exception as error:  # a peer that is missing costs its own row only
            if row.package == OUR_PACKAGE:
                raise
            found |= {"bytes": None, "why": str(error)}
        rows.append(found)
    packages = dict.fromkeys(row.package for row in peers())
    result = {"environment": environment(torch.device("cpu"), packages), "side": SIDE, "rows": rows}
    save(result, args.out)
    print(", ".join(f"{name} {installed(name)}" for name in packages), end="\n\n")
    print(table(rows))
    return 0
