"""Several processes over gloo, and models that are spread over them.

Gradients are small whole numbers and averages of two, so that reducing them is exact in any order;
what is left is the step itself.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from helpers import assert_same_bits
from ranger_cuda import Lookahead, RAdam, Ranger

WORLD = 2
PATIENCE = timedelta(seconds=60)  # of the others, when one rank has failed
OPTIONS = {"lr": 0.01, "k": 3, "weight_decay": 0.1}
BUILDS = (
    functools.partial(Ranger, centralize="all", **OPTIONS),
    functools.partial(Ranger, backend="reference", **OPTIONS),
    lambda p: Lookahead(RAdam(p, lr=0.01), k=3),
    lambda p: Lookahead(torch.optim.AdamW(p, lr=0.01, foreach=False), k=3),
)


class Awkward(nn.Module):
    """Sizes that two ranks split unevenly, or that leave one of them nothing."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i, shape in enumerate([(1,), (3,), (7, 5), (1, 4), (8, 2, 2)]):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """A loss that has these gradients."""
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def give(model, step, rank=None):
    """Whole-number gradients of a step: this rank's, or the average of all."""
    for i, param in enumerate(model.parameters()):
        shape = param.shape
        generator = torch.Generator().manual_seed(100 * step + i)
        both = torch.randint(-8, 9, (WORLD, *shape), generator=generator).float()
        grad = (both.mean(0) if rank is None else both[rank]).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad


def train(model, optimizer, steps):
    for step in steps:
        give(model, step)
        optimizer.step()


def assert_same_run(model, optimizer, other, its_optimizer, what):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(full(p), full(q), f"{what}, {name}")
        for key, value in its_optimizer.state[q].items():
            assert_same_bits(full(optimizer.state[p][key]), full(value), f"{what}, {key} of {name}")


def sharded(model=None):
    return fully_shard(model or Awkward(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


class Large(Awkward):
    """Also sizes whose moments are 8 bits: rows of whole groups, split unevenly."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("rows", (131, 64)), ("deep", (3, 5, 320)), ("few", (1, 4096))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.bfloat16()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))


def stored(value):
    """The bits of what is stored, whatever they mean."""
    return full(value).contiguous().view(-1).view(torch.uint8)


def assert_same_storage(model, optimizer, other, its_optimizer, what):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(stored(p), stored(q)), f"{what}, {name}"
        mine, its = optimizer.state[p], its_optimizer.state[q]
        assert mine.keys() == its.keys()
        for key, value in its.items():
            assert torch.equal(stored(mine[key]), stored(value)), f"{what}, {key} of {name}"


def _work(rank, world, checks, folder, results):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store-{world}-{checks[0].__name__}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=PATIENCE
    )
    for check in checks:
        try:
            check(rank, f"{folder}/{check.__name__}")
            problem = ""
        except BaseException:  # such as what pytest.raises fails with
            problem = f"rank {rank}:\n{traceback.format_exc()}"
        results.put((check.__name__, problem))
        dist.barrier()
    dist.destroy_process_group()
    # Not by way of Python's own end: a thread of gloo that lets go of its last tensor meanwhile
    # aborts the process.
    os._exit(0)


def on_ranks(world: int, checks: Sequence[Callable], folder: Path) -> dict[str, str]:
    """Each ``check(rank, folder)`` on so many ranks, one after the other: by name, what went wrong
    on any of them; "" where nothing did."""
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_work, args=(world, checks, str(folder), results), nprocs=world)
    found = dict.fromkeys((check.__name__ for check in checks), "")
    while not results.empty():
        name, problem = results.get()
        found[name] += problem
    return found
