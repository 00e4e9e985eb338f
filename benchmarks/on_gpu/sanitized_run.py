"""Every CUDA kernel once or twice, over awkward memory, against the reference on the CPU by bits.

    compute-sanitizer --tool memcheck python -m benchmarks.on_gpu.sanitized_run

Short, for it runs many times slower under the tools; `--target emulated` tries it without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from .commands import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from helpers import assert_same, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger
from targets import NAMES, Target, open_target

FLOATS = (torch.float32, torch.float64)
K = 2  # of Lookahead: a sync in every other step
STEPS = 6  # rectified from the fifth on
BETAS = (0.9, 0.99)


def main() -> int:
    """Run the parts; 1 if any of them fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=NAMES, default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], metavar="PART")
    args = parser.parse_args()
    patch = pytest.MonkeyPatch()
    failed = 0
    try:
        target = open_target(args.target, patch)
        for name, part in PARTS.items():
            if name in args.skip or (args.only and name not in args.only):
                continue
            try:
                part(target)
                print(f"ok      {name}", flush=True)
            except Exception as error:
                failed += 1
                print(f"FAILED  {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    except pytest.skip.Exception as reason:
        print(f"cannot run: {reason}")
        return 1
    finally:
        patch.undo()
    return 1 if failed else 0


# --- awkward memory -------------------------------------------------------------------------------


def values(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Made on the CPU: what is not checked launches as little as it can."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shifted(tensor: Tensor, by: int) -> Tensor:
    """The same numbers, ``by`` elements into memory of their own."""
    room = torch.zeros(tensor.numel() + by, dtype=tensor.dtype)
    return room[by:].view(tensor.shape).copy_(tensor)


def dense(dtype: torch.dtype) -> Iterator[Tensor]:
    """Odd sizes about the width of an access, a block and a chunk, at odd addresses."""
    for i, size in enumerate([0, 1, 3, 4, 5, 31, 257, 1023, 4099, 8191, 8192, 8193, 16385, 33001]):
        yield values(size, dtype=dtype, seed=i)
    for by in (1, 2, 3):
        yield shifted(values(1003, dtype=dtype, seed=by), by)


def strided(dtype: torch.dtype) -> Iterator[Tensor]:
    """Layouts that are not consecutive memory."""
    yield values(7, 5, 2, dtype=dtype, seed=0)[..., 0]
    yield values(9001, 2, dtype=dtype, seed=1)[:, 1]
    yield values(6, 4, 5, dtype=dtype, seed=2)[:, 1:3].permute(2, 0, 1)


def gradient_for(param: Tensor, seed: int) -> Tensor:
    """Of another layout, or at another address, in every other step."""
    gradient = values(*param.shape, dtype=param.dtype, seed=seed)
    if seed % 2 and param.dim() > 1:
        return gradient.mT.contiguous().mT
    return shifted(gradient, seed % 4)


Build = Callable[[Sequence[Parameter], str], torch.optim.Optimizer]


def compare(target: Target, tensors: list[Tensor], build: Build, steps: int = STEPS) -> None:
    """Steps of two optimizers, one of them the reference; then the swap, where there is one."""
    ours, expected = twins(tensors, target.move)
    native, reference = build(ours, target.backend), build(expected, "reference")
    for step in range(steps):
        gradients = [gradient_for(p, step * 31 + i) for i, p in enumerate(expected)]
        give_gradients(gradients, ours, expected, move=target.move)
        native.step()
        reference.step()
    assert_same(native, reference, ours, expected, "after the steps")
    if isinstance(native, Ranger | Lookahead):
        with native.slow_weights(), reference.slow_weights():  # type: ignore[union-attr]
            for p, q in zip(ours, expected, strict=True):
                assert torch.equal(p.detach().cpu(), q.detach()), "slow weights, swapped in"
        assert_same(native, reference, ours, expected, "swapped back")


# --- the parts ------------------------------------------------------------------------------------


def radam(target: Target) -> None:
    """float32 and float64, consecutive and strided, with and without L2."""
    for dtype in FLOATS:
        tensors = [*dense(dtype), *strided(dtype)]
        compare(target, tensors, lambda p, b: RAdam(p, backend=b, weight_decay=0.1, betas=BETAS))


def ranger(target: Target) -> None:
    """With Lookahead in the step, decoupled decay, and the swap."""
    for dtype in FLOATS:
        tensors = [*dense(dtype), *strided(dtype)]
        compare(
            target, tensors, lambda p, b: Ranger(p, backend=b, weight_decay=0.1, k=K, betas=BETAS)
        )


def wrapper(target: Target) -> None:
    """Interpolation after another optimizer's step, and the swap."""
    for dtype in FLOATS:
        tensors = [*dense(dtype), *strided(dtype)]
        compare(
            target,
            tensors,
            lambda p, b: Lookahead(RAdam(p, backend=b, betas=BETAS), k=K, backend=b),
        )


def tiers(target: Target) -> None:
    """Each size of the gradients' list, in each type and kind of layout."""
    for count in (33, 500):
        for dtype in FLOATS:
            flat = [values(1 + i % 70, dtype=dtype, seed=i) for i in range(count)]
            gaps = [values(1 + i % 9, 2, 2, dtype=dtype, seed=i)[..., 0] for i in range(count)]
            for tensors in (flat, gaps):
                compare(
                    target, tensors, lambda p, b: Ranger(p, backend=b, k=K, betas=BETAS), steps=3
                )


def groups(target: Target) -> None:
    """More groups than one launch of the schedule takes, each with its own numbers."""
    tensors = [values(5, dtype=FLOATS[i % 2], seed=i) for i in range(70)]

    def build(params: Sequence[Parameter], backend: str) -> torch.optim.Optimizer:
        each = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)]
        return Ranger(each, backend=backend, k=K, betas=BETAS)

    compare(target, tensors, build)


def signals(target: Target) -> None:
    """Scale, overflow flag, learning rate and norm, all read on the device."""
    tensors = [values(n, dtype=dtype, seed=n) for n in (3, 64, 9000) for dtype in FLOATS]
    ours, expected = twins(tensors, target.move)
    sets = ((ours, target.backend, target.move), (expected, "reference", lambda t: t))
    optimizers = [
        Ranger(
            params,
            lr=move(torch.tensor(0.01)),
            backend=backend,
            k=K,
            max_grad_norm=1.0,
            amp_scaling=True,
            betas=BETAS,
        )
        for params, backend, move in sets
    ]
    # 6, 8 and so 10: the norm is exact in any order.
    gradients = [torch.zeros_like(t) for t in tensors]
    gradients[0][0] = 6.0
    gradients[4][:16] = 2.0
    for step in range(6):
        give_gradients([g.clone() for g in gradients], ours, expected, move=target.move)
        for optimizer, (_, _, move) in zip(optimizers, sets, strict=True):
            optimizer.grad_scale = move(torch.tensor(4.0))
            optimizer.found_inf = move(torch.tensor(float(step == 3)))
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
    assert_same(*optimizers, ours, expected, "after the steps")
    steps = {float(state["step"]) for state in optimizers[0].state.values()}
    assert steps == {5.0}, f"the overflowed step was not skipped: {steps}"


def graph(target: Target) -> None:
    """A step captured and replayed, with gradients that change in place."""
    if target.device.type != "cuda":
        return
    tensors = [*dense(torch.float32), *strided(torch.float32), *dense(torch.float64)]
    ours, expected = twins(tensors, target.move)
    native = Ranger(ours, backend=target.backend, k=K, betas=BETAS)
    reference = Ranger(expected, backend="reference", k=K, betas=BETAS)
    for param in ours:
        param.grad = torch.zeros_like(param)
    captured = torch.cuda.CUDAGraph()
    for step in range(8):
        gradients = [values(*p.shape, dtype=p.dtype, seed=step + i) for i, p in enumerate(expected)]
        for p, q, gradient in zip(ours, expected, gradients, strict=True):
            p.grad.copy_(gradient)
            q.grad = gradient
        if step < 2:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                native.step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if step == 2:
                torch.cuda.synchronize()
                with torch.cuda.graph(captured):
                    native.step()
            captured.replay()
        reference.step()
    torch.cuda.synchronize()
    assert_same(native, reference, ours, expected, "after the replays")
    native.add_param_group({"params": [Parameter(target.move(torch.ones(3)))]})
    native.step()  # forgets the tables, which the graph keeps
    captured.replay()
    torch.cuda.synchronize()


PARTS = {part.__name__: part for part in (radam, ranger, wrapper, tiers, groups, signals, graph)}

if __name__ == "__main__":
    sys.exit(main())
