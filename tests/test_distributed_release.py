"""Two processes over gloo: released gradients are the reduced ones, or it is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from helpers import assert_same_bits
from ranger_cuda import Ranger
from ranks import OPTIONS, WORLD, Awkward, Large, assert_same_storage, full, on_ranks, sharded

STEPS = 7


def gradients(model, step, rank=None):
    """Whole-number gradients of a step: this rank's, or the average of all."""
    found = []
    for i, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        both = torch.randint(-8, 9, (WORLD, *param.shape), generator=generator).float()
        found.append((both.mean(0) if rank is None else both[rank]).to(param.dtype))
    return found


def reference_step(single, reference, step):
    for param, grad in zip(single.parameters(), gradients(single, step), strict=True):
        param.grad = grad
    reference.step()


def fsdp2(rank, folder):
    """fully_shard calls the hooks of its shards when they have been reduced."""
    for build in ("exact", "stochastic24"):
        model, single = sharded(Large()), Large()
        kinds = {"weight_rounding": build, "state_dtype": "8bit", **OPTIONS}
        optimizer, reference = (
            Ranger(model.parameters(), **kinds),
            Ranger(single.parameters(), **kinds),
        )
        optimizer.release_gradients()
        for step in range(STEPS):
            model(gradients(single, step, rank)).backward()
            assert all(p.grad is None for p in model.parameters())
            reference_step(single, reference, step)
            optimizer.step()
            assert_same_storage(model, optimizer, single, reference, f"{build}, step {step}")


def fsdp2_in_parts(rank, folder):
    """Parts that are reduced one after the other, with micro-batches that are not reduced, and
    others that are and do not move."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for pause in ("no_sync", "paused"):
        model, single = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for _ in range(2))
        with torch.no_grad():
            for p in (*model.parameters(), *single.parameters()):
                p.copy_(torch.arange(p.numel()).view(p.shape) / 4)
        for layer in model:
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        optimizer, reference = (
            Ranger(model.parameters(), **OPTIONS),
            Ranger(single.parameters(), **OPTIONS),
        )
        handle = optimizer.release_gradients()
        for _ in range(2):  # whose gradients are exact sums; beyond, inputs are not whole numbers
            model.set_requires_gradient_sync(pause == "paused")
            with handle.paused() if pause == "paused" else contextlib.nullcontext():
                model(torch.full((1, 4), rank + 1.0)).sum().backward()
            model.set_requires_gradient_sync(True)
            model(torch.full((1, 4), rank + 2.0)).sum().backward()
            assert all(p.grad is None for p in model.parameters())
            for other in range(WORLD):
                for micro in (1.0, 2.0):
                    (single(torch.full((1, 4), other + micro)).sum() / WORLD).backward()
            reference.step()
            reference.zero_grad()
            for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(full(p), q.detach(), msg=name)
                assert int(optimizer.state[p]["step"]) == int(reference.state[q]["step"]), name


def ddp(rank, folder):
    """It reduces gradients after hooks of parameters: each rank would move by its own."""
    for late in (False, True):
        model = Awkward()
        optimizer = Ranger(model.parameters(), **OPTIONS)
        if late:
            optimizer.release_gradients()
        wrapped = DistributedDataParallel(model)
        before = [p.detach().clone() for p in model.parameters()]
        loss = wrapped(gradients(model, 0, rank))
        with pytest.raises(RuntimeError, match="parameter 0 of group 0 is DistributedDataParallel"):
            loss.backward() if late else optimizer.release_gradients()
        for p, value in zip(model.parameters(), before, strict=True):
            assert_same_bits(p, value, f"late {late}")
        assert not optimizer.state
        del wrapped


def zero_and_fsdp1(rank, folder):
    """Of ZeroRedundancyOptimizer's parameters each rank has its own, with DDP around the model."""
    model = Awkward()
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), optimizer_class=Ranger, **OPTIONS)
    with pytest.raises(RuntimeError, match="DistributedDataParallel's"):
        optimizer.optim.release_gradients()
    del wrapped, optimizer
    whole = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="FullyShardedDataParallel's"):
        Ranger(whole.parameters()).release_gradients()


def apart(rank, folder):
    """Workers whose models are their own need no reduction."""
    model = Awkward()
    optimizer = Ranger(model.parameters(), **OPTIONS)
    optimizer.release_gradients()
    model(gradients(model, 0, rank)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert dist.get_world_size() == WORLD


CHECKS = (fsdp2, fsdp2_in_parts, ddp, zero_and_fsdp1, apart)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return on_ranks(WORLD, CHECKS, tmp_path_factory.mktemp("released"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks(outcome, check):
    assert outcome[check] == ""
