"""Two processes over gloo: the bits do not depend on how parameters are spread over ranks.

Gradients are small whole numbers and averages of two ranks, so that reducing them is exact in any
order; what is left is the step itself.
"""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distributed_evaluation import eval_mode, evaluation, evaluation_refused
from helpers import assert_same_bits
from ranger_cuda import RAdam, Ranger, convert_checkpoint, load_distributed_checkpoint
from ranger_cuda.state import tensors
from ranger_cuda.step import native
from ranks import (
    BUILDS,
    OPTIONS,
    WORLD,
    Awkward,
    assert_same_run,
    full,
    give,
    on_ranks,
    sharded,
    train,
)


def ddp(rank, folder):
    """Every rank has the bits of one process that saw the averaged gradients."""
    model, single = DistributedDataParallel(Awkward()), Awkward()
    optimizer = Ranger(model.parameters(), **OPTIONS)
    reference = Ranger(single.parameters(), **OPTIONS)
    for step in range(8):
        optimizer.zero_grad()
        give(model.module, step, rank)
        own = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
        model(own).backward()
        optimizer.step()
        give(single, step)
        reference.step()
        assert_same_run(model.module, optimizer, single, reference, f"DDP, step {step}")


def fsdp2(rank, folder):
    """Sharding unevenly, with empty shards, changes no bit."""
    for build in BUILDS:
        model, single = sharded(), Awkward()
        optimizer, reference = build(model.parameters()), build(single.parameters())
        for step in range(8):
            train(model, optimizer, [step])
            train(single, reference, [step])
            assert_same_run(model, optimizer, single, reference, f"FSDP2, step {step}")
        state = next(iter(optimizer.state.values()))
        assert isinstance(state["slow_param"], DTensor)


def backward(rank, folder):
    """The gradients of FSDP2's own backward pass, none of which is looked at in Python."""
    asked = []

    def plain_grad(param, *args):
        asked.append(param)
        return tensors.plain_grad(param, *args)

    with mock.patch.object(native, "plain_grad", plain_grad):
        for build in BUILDS:
            model, single = sharded(), Awkward()
            optimizer, reference = build(model.parameters()), build(single.parameters())
            for step in range(8):
                give(single, step, rank)
                own = [p.grad for p in single.parameters()]
                optimizer.zero_grad()
                model(own).backward()
                optimizer.step()
                train(single, reference, [step])
                assert_same_run(model, optimizer, single, reference, f"backward, step {step}")
    assert not asked


def mixed(rank, folder):
    """Plain tensors and DTensors in one group, and the slow weights of both."""
    model, single = sharded(), Awkward()
    extra = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Ranger([extra[0], *model.parameters()], **OPTIONS)
    reference = Ranger([extra[1], *single.parameters()], **OPTIONS)
    for step in range(5):
        extra[0].grad = extra[1].grad = torch.full((3,), float(step))
        train(model, optimizer, [step])
        train(single, reference, [step])
    assert torch.equal(*extra)
    assert_same_run(model, optimizer, single, reference, "mixed")
    with optimizer.slow_weights(model), reference.slow_weights():
        assert_same_run(model, optimizer, single, reference, "mixed, slow weights")
    assert_same_run(model, optimizer, single, reference, "mixed, and back")


def clipping(rank, folder):
    """max_grad_norm takes the norm over all shards. The norm is a sum in another order, so the
    coefficient may differ by some roundings: 1e-6 is 8 of float32's."""
    model, single = sharded(), Awkward()
    optimizer = RAdam(model.parameters(), max_grad_norm=0.5)
    reference = RAdam(single.parameters(), max_grad_norm=0.5)
    train(model, optimizer, [0])
    train(single, reference, [0])
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        found, expected = full(optimizer.state[p]["exp_avg"]), reference.state[q]["exp_avg"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def norms(rank, folder):
    """Of shards, whole DTensors and plain tensors each gradient counts once, also where a group
    names its parameter twice; ranks skip a step together."""
    mesh = init_device_mesh("cpu", (WORLD,))
    params = [
        nn.Parameter(distribute_tensor(torch.zeros(5), mesh, [placement]))
        for placement in (Shard(0), Replicate())
    ]
    params.append(nn.Parameter(torch.zeros(3)))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = Ranger([*params, params[0], params[2]], nonfinite_grad_norm="skip", **OPTIONS)
    for value, count in ((1.0, 1), (float("nan"), 1), (2.0, 2)):
        for param in params:
            param.grad = torch.ones_like(param) * (1.0 if value != value else value)
        if value != value and rank == 0:
            params[0].grad.to_local().fill_(value)
        optimizer.step()
        norm = optimizer.grad_norm.item()
        assert norm == pytest.approx(13**0.5 * value, rel=1e-12, nan_ok=True)
        assert [optimizer.state[p]["step"] for p in params] == [count] * 3


def empty_state(rank, folder):
    """torch.distributed.checkpoint fills an empty state by a step with zero gradients and lr 0:
    it moves no parameter, and its step and phase do not survive the load."""
    for lr in (0.01, torch.tensor(0.01)):
        single = Awkward()
        reference = Ranger(single.parameters(), **(OPTIONS | {"lr": lr, "k": 1}))
        before = [p.detach().clone() for p in single.parameters()]
        saved = get_optimizer_state_dict(single, reference)
        for p, q in zip(single.parameters(), before, strict=True):
            assert torch.equal(p, q)
        for state in saved["state"].values():
            state["step"].fill_(5)
            state["slow_param"].fill_(2.0)
        fresh = Awkward()
        loaded = Ranger(fresh.parameters(), **(OPTIONS | {"lr": lr, "k": 1}))
        set_optimizer_state_dict(fresh, loaded, saved)
        for p, q in zip(fresh.parameters(), before, strict=True):
            assert torch.equal(p, q)
            assert loaded.state[p]["step"] == 5
            assert (loaded.state[p]["slow_param"] == 2.0).all()


def loaded_later(rank, folder):
    """Weights may be loaded after torch.distributed.checkpoint has filled the optimizer's state, or
    before, or in mid-run: the slow weights are those of the weights that are trained."""
    trained = sharded()
    with torch.no_grad():
        for param in trained.parameters():
            param.mul_(-3)
    dcp.save({"model": trained.state_dict()}, checkpoint_id=folder)

    def load(model):
        saved = {"model": model.state_dict()}
        dcp.load(saved, checkpoint_id=folder)
        model.load_state_dict(saved["model"])

    for build, is_first in itertools.product(BUILDS, (False, True)):
        model, single = sharded(), Awkward()
        optimizer, reference = build(model.parameters()), build(single.parameters())
        load(single)
        get_optimizer_state_dict(single, reference)
        if is_first:
            load(model)
        get_optimizer_state_dict(model, optimizer)
        load(model)
        for step in range(8):
            train(model, optimizer, [step])
            train(single, reference, [step])
            assert_same_run(model, optimizer, single, reference, f"{is_first=}, step {step}")

        for each, its in ((model, optimizer), (single, reference)):
            load(each)
            its.reset_slow_weights()
        for p, q in zip(model.parameters(), trained.parameters(), strict=True):
            assert_same_bits(full(optimizer.state[p]["slow_param"]), full(q), "reset")
        train(model, optimizer, range(8, 13))
        train(single, reference, range(8, 13))
        assert_same_run(model, optimizer, single, reference, "loaded in mid-run")


def from_adamw(rank, folder):
    """AdamW's checkpoint of two ranks loads into sharded optimizers before the weights or after
    them, and goes on as on one rank."""
    trained = sharded()
    adamw = torch.optim.AdamW(trained.parameters(), lr=0.01, foreach=False)
    train(trained, adamw, range(4))
    weights, state = trained.state_dict(), get_optimizer_state_dict(trained, adamw)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    whole = get_optimizer_state_dict(
        trained, adamw, options=StateDictOptions(full_state_dict=True, cpu_offload=False)
    )
    for build, is_first in itertools.product(BUILDS[:3], (False, True)):
        model, single = sharded(), Awkward()
        optimizer, reference = build(model.parameters()), build(single.parameters())
        with torch.no_grad():
            for p, q in zip(single.parameters(), trained.parameters(), strict=True):
                p.copy_(full(q))
            for p in model.parameters():
                p.mul_(-3)  # a start that must not shine through
        if is_first:
            model.load_state_dict(weights)
        load_distributed_checkpoint(model, optimizer, folder)
        if not is_first:
            model.load_state_dict(weights)
        set_optimizer_state_dict(single, reference, convert_checkpoint(whole, reference))
        for step in range(4, 12):
            train(model, optimizer, [step])
            train(single, reference, [step])
            assert_same_run(model, optimizer, single, reference, f"{is_first=}, step {step}")


def clipping_refused(rank, folder):
    """The norm of one rank's part of a flat parameter is no norm to clip by."""
    for use_orig_params in (False, True):
        flat = FullyShardedDataParallel(
            nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        optimizer = Ranger(flat.parameters(), max_grad_norm=1.0, **OPTIONS)
        flat(torch.ones(4) * (rank + 1)).sum().backward()
        before = [p.detach().clone() for p in flat.parameters()]
        with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel.*clip_grad_norm_"):
            optimizer.step()
        for p, q in zip(flat.parameters(), before, strict=True):
            assert_same_bits(p, q, "refused")
        assert not optimizer.state


def centralization_refused(rank, folder):
    """A part of a slice has another mean than the whole."""
    flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    optimizer = Ranger(flat.parameters(), centralize="all", **OPTIONS)
    flat(torch.ones(4)).sum().backward()
    with pytest.raises(RuntimeError, match="FullyShardedDataParallel keeps it flat"):
        optimizer.step()
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend, stepped in itertools.product((None, "reference"), (False, True)):
        plain = nn.Parameter(torch.ones(2, 2))
        param = nn.Parameter(distribute_tensor(torch.ones(2, 4), mesh, [Shard(1)]))
        optimizer = Ranger([plain, param], backend=backend, **OPTIONS)
        plain.grad = torch.arange(4.0).view(2, 2)
        param.grad = distribute_tensor(torch.arange(8.0).view(2, 4), mesh, [Shard(1)])
        if stepped:
            optimizer.step()
        before = plain.detach().clone()
        optimizer.param_groups[0]["centralize"] = "all"
        with pytest.raises(RuntimeError, match="its shards cut the slices"):
            optimizer.step()
        assert_same_bits(plain, before, "refused")


def tensor_parallel(rank, folder):
    """DTensors that no FSDP gathers need no model. (Before any check that uses FSDP2.)"""
    mesh = init_device_mesh("cpu", (WORLD,))
    single = nn.Parameter(torch.arange(8.0))
    param = nn.Parameter(distribute_tensor(single.detach().clone(), mesh, [Shard(0)]))
    optimizer, reference = Ranger([param], **OPTIONS), Ranger([single], **OPTIONS)
    for _ in range(4):
        single.grad = torch.ones(8)
        param.grad = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
        optimizer.step()
        reference.step()
    with optimizer.slow_weights(), reference.slow_weights():
        assert_same_bits(full(param), single.detach(), "inside")
    assert_same_bits(full(param), single.detach(), "after")


def zero(rank, folder):
    """ZeroRedundancyOptimizer deals whole parameters out to ranks."""
    model, single = Awkward(), Awkward()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Ranger, **OPTIONS)
    reference = Ranger(single.parameters(), **OPTIONS)
    for step in range(8):
        give(model, step)
        optimizer.step()
        train(single, reference, [step])
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            assert_same_bits(p, q, f"ZeRO, step {step}")


def moving(rank, folder):
    """A sharded model may be moved, converted, and its tensors swapped, between steps."""

    def move(model):
        model.cpu()

    def convert(model):
        model.to(torch.float64)
        model.to(torch.float32)

    def swap(model):
        for param in model.parameters():
            torch.utils.swap_tensors(param, nn.Parameter(param.detach() * 2))

    for build in BUILDS:
        model, single = sharded(), Awkward()
        optimizer, reference = build(model.parameters()), build(single.parameters())
        for change in (move, convert, swap, move):
            for step in range(2):
                train(model, optimizer, [step])
                train(single, reference, [step])
                assert_same_run(model, optimizer, single, reference, f"then {change.__name__}")
            model.zero_grad()
            change(model)
            with torch.no_grad():
                for param in single.parameters() if change is swap else ():
                    param.mul_(2)


CHECKS = (
    tensor_parallel,
    ddp,
    fsdp2,
    backward,
    mixed,
    clipping,
    norms,
    clipping_refused,
    centralization_refused,
    evaluation,
    evaluation_refused,
    eval_mode,
    empty_state,
    loaded_later,
    from_adamw,
    zero,
    moving,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """All checks in one pair of processes: starting torch twice takes longer than they do."""
    return on_ranks(WORLD, CHECKS, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks_have_the_bits_of_one(outcome, check):
    assert outcome[check] == ""
