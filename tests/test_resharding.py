"""A run that is killed and goes on on another number of ranks has the bits of one that was not."""

from __future__ import annotations

import copy
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ranger_cuda import RAdam, Ranger, load_distributed_checkpoint
from ranks import (
    OPTIONS,
    WORLD,
    Awkward,
    Large,
    assert_same_run,
    assert_same_storage,
    full,
    give,
    on_ranks,
    sharded,
    stored,
    train,
)

FORMATS = tuple(
    itertools.product(
        ("exact", "stochastic24", "stochastic", "nearest"),
        (torch.float32, torch.bfloat16, "8bit"),
    )
)


def options_of(weight_rounding, state_dtype):
    return OPTIONS | {"weight_rounding": weight_rounding, "state_dtype": state_dtype, "seed": 7}


# --- one number of ranks after the other ---------------------------------------------------------


def saved_of(model, optimizer):
    return {"model": model.state_dict(), "state": get_optimizer_state_dict(model, optimizer)}


def load(model, optimizer, folder):
    loaded = saved_of(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["state"])


def go_on(folder, begin, end, rank=0):
    """From the checkpoint of step ``begin``, unless it is 0, to that of ``end``."""
    for i, (weight_rounding, state_dtype) in enumerate(FORMATS):
        what = f"{weight_rounding}, {state_dtype}, step {end}"
        model, single = sharded(Large()), Large()
        options = options_of(weight_rounding, state_dtype)
        optimizer, reference = (Ranger(m.parameters(), **options) for m in (model, single))
        checkpoint = f"{Path(folder).parent}/{i}-step-"
        if begin:
            load(model, optimizer, f"{checkpoint}{begin}")
        train(model, optimizer, range(begin, end))
        train(single, reference, range(end))
        assert_same_storage(model, optimizer, single, reference, what)
        if i == 0:  # in the background, by a group of its own, as long runs do
            saved = saved_of(model, optimizer)
            background = dist.new_group(backend="gloo")
            written = dcp.async_save(
                saved, checkpoint_id=f"{checkpoint}{end}", process_group=background
            )
            train(model, optimizer, [end])  # which it does not see
            written.result()
        else:
            dcp.save(saved_of(model, optimizer), checkpoint_id=f"{checkpoint}{end}")


def to_4(rank, folder):
    """On four ranks."""
    go_on(folder, 0, 4)


def killed(rank, folder):
    """In mid-run, after that checkpoint."""
    model = sharded(Large())
    optimizer = Ranger(model.parameters(), **OPTIONS)
    train(model, optimizer, range(3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def from_4_to_8(rank, folder):
    """On two."""
    go_on(folder, 4, 8)


def from_8_to_11(rank, folder):
    """On one."""
    go_on(folder, 8, 11)


def from_11_to_13(rank, folder):
    """On three."""
    go_on(folder, 11, 13)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resharding")


@pytest.fixture(scope="module")
def on_four(folder):
    return on_ranks(4, (to_4, hsdp, two_dimensions), folder)


def test_a_killed_run_goes_on_on_another_number_of_ranks_with_the_same_bits(on_four, folder):
    assert on_four["to_4"] == ""
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        on_ranks(4, (killed,), folder)
    for world, check in ((2, from_4_to_8), (1, from_8_to_11), (3, from_11_to_13)):
        assert on_ranks(world, (check,), folder)[check.__name__] == ""


# --- meshes of two dimensions --------------------------------------------------------------------


def hsdp(rank, folder):
    """Shards in pairs, and each pair the same."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for weight_rounding, state_dtype in (("exact", torch.float32), ("stochastic", "8bit")):
        options = options_of(weight_rounding, state_dtype)
        model, single = fully_shard(Large(), mesh=mesh), Large()
        optimizer, reference = (Ranger(m.parameters(), **options) for m in (model, single))
        train(model, optimizer, range(7))
        train(single, reference, range(7))
        assert_same_storage(model, optimizer, single, reference, weight_rounding)


DIMS = (None, 0, 1, 1, 0)  # along which tensor parallelism shards Awkward's parameters, if any


def with_tensor_parallelism(mesh, values):
    """Awkward with these values, sharded over ``mesh["tp"]``, and then over ``mesh["dp"]``."""
    model = Awkward()
    for name, value, dim in zip(dict(model.named_parameters()), values, DIMS, strict=True):
        placement = [Replicate() if dim is None else Shard(dim)]
        whole = distribute_tensor(value.detach().clone(), mesh["tp"], placement)
        model.register_parameter(name, nn.Parameter(whole))
    return fully_shard(model, mesh=mesh["dp"])


def two_dimensions(rank, folder):
    """FSDP2 over tensor parallelism, along the same dimension and along another: the same bits, and
    the norm of max_grad_norm is over the whole mesh. That is a sum in another order: 1e-6 is 8
    roundings of float32's."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    single = Awkward()
    numbers = [torch.arange(float(p.numel())).view_as(p) for p in single.parameters()]
    where = list(with_tensor_parallelism(mesh, numbers).parameters())  # a shard's elements

    def step_on(optimizer, reference, model, single, step):
        give(single, step)
        for p, q, places in zip(model.parameters(), single.parameters(), where, strict=True):
            shard = q.grad.flatten()[places.to_local().long()]
            p.grad = DTensor.from_local(
                shard, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
            )
        optimizer.step()
        reference.step()

    model = with_tensor_parallelism(mesh, single.parameters())
    optimizer, reference = (Ranger(m.parameters(), **OPTIONS) for m in (model, single))
    for step in range(7):
        step_on(optimizer, reference, model, single, step)
        assert_same_run(model, optimizer, single, reference, f"step {step}")

    optimizer, reference = (RAdam(m.parameters(), max_grad_norm=0.5) for m in (model, single))
    step_on(optimizer, reference, model, single, 0)
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        found, expected = full(optimizer.state[p]["exp_avg"]), reference.state[q]["exp_avg"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("check", ["hsdp", "two_dimensions"])
def test_four_ranks_in_two_dimensions_have_the_bits_of_one(on_four, check):
    assert on_four[check] == ""


# --- full state dicts, and what is refused -------------------------------------------------------


def resharding(rank, folder):
    """Saved on two ranks, resumed whole and on two ranks again, in mid-cycle: the same bits."""
    single = Awkward()
    reference = Ranger(single.parameters(), **OPTIONS)
    train(single, reference, range(10))

    model = sharded()
    optimizer = Ranger(model.parameters(), **OPTIONS)
    train(model, optimizer, range(4))
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=folder)

    again = sharded()
    resumed = Ranger(again.parameters(), **OPTIONS)
    loaded = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, resumed)}
    dcp.load(loaded, checkpoint_id=folder)
    again.load_state_dict(loaded["model"])
    set_optimizer_state_dict(again, resumed, loaded["optimizer"])
    train(again, resumed, range(4, 10))
    assert_same_run(again, resumed, single, reference, "two ranks from two")

    options = StateDictOptions(full_state_dict=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    weights = {name: full(p) for name, p in model.named_parameters()}
    if rank == 0:  # a full state dict is on the first rank
        alone = Awkward()
        alone.load_state_dict(weights)
        one = Ranger(alone.parameters(), **OPTIONS)
        set_optimizer_state_dict(alone, one, whole, options=StateDictOptions())
        train(alone, one, range(4, 10))
        assert_same_run(alone, one, single, reference, "one rank from two")

    spread = sharded()
    two = Ranger(spread.parameters(), **OPTIONS)
    start = Awkward()
    first = Ranger(start.parameters(), **OPTIONS)
    train(start, first, range(4))
    for p, q in zip(spread.parameters(), start.parameters(), strict=True):
        p.data.copy_(
            torch.distributed.tensor.distribute_tensor(q.data, p.device_mesh, p.placements)
        )
    whole = get_optimizer_state_dict(start, first)
    set_optimizer_state_dict(spread, two, copy.deepcopy(whole), options=options)
    train(spread, two, range(4, 10))
    assert_same_run(spread, two, single, reference, "two ranks from one")


def formats_of_low_precision(rank, folder):
    """A shard has the whole's random bits; what is stored passes through every collective, and a
    checkpoint of two ranks goes on on two, and on one."""
    for rounding, state_dtype in itertools.product(
        ("exact", "stochastic24", "stochastic"), (torch.float32, torch.bfloat16, "8bit")
    ):
        what = f"{rounding}, {state_dtype}"
        options = OPTIONS | {"weight_rounding": rounding, "state_dtype": state_dtype, "seed": 7}
        model, single = sharded(Large()), Large()
        optimizer = Ranger(model.parameters(), **options)
        reference = Ranger(single.parameters(), **options)
        for step in range(4):
            train(model, optimizer, [step])
            train(single, reference, [step])
        assert_same_storage(model, optimizer, single, reference, what)

        saved = {"model": model.state_dict(), "state": get_optimizer_state_dict(model, optimizer)}
        dcp.save(saved, checkpoint_id=f"{folder}-{what}")
        again = sharded(Large())
        resumed = Ranger(again.parameters(), **options)
        loaded = {"model": again.state_dict(), "state": get_optimizer_state_dict(again, resumed)}
        dcp.load(loaded, checkpoint_id=f"{folder}-{what}")
        again.load_state_dict(loaded["model"])
        set_optimizer_state_dict(again, resumed, loaded["state"])

        whole = StateDictOptions(full_state_dict=True)
        state = get_optimizer_state_dict(model, optimizer, options=whole)
        weights = {name: full(p) for name, p in model.named_parameters()}
        train(single, reference, range(4, 8))
        train(again, resumed, range(4, 8))
        assert_same_storage(again, resumed, single, reference, f"{what}, resumed")
        if rank == 0:
            alone = Large()
            alone.load_state_dict(weights)
            one = Ranger(alone.parameters(), **options)
            set_optimizer_state_dict(alone, one, state, options=StateDictOptions())
            train(alone, one, range(4, 8))
            assert_same_storage(alone, one, single, reference, f"{what}, alone")
        spread = sharded(Large())
        two = Ranger(spread.parameters(), **options)
        broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(spread, two, state if rank == 0 else {}, options=broadcast)
        for p, q in zip(spread.parameters(), model.parameters(), strict=True):
            for key, value in optimizer.state[q].items():
                assert torch.equal(stored(two.state[p][key]), stored(value)), f"{what}, {key}"


def our_own(rank, folder):
    """load_distributed_checkpoint() takes ours, too, where moments of 8 bits have shards of two
    kinds."""
    options = OPTIONS | {"state_dtype": "8bit"}
    model, again = sharded(Large()), sharded(Large())
    optimizer = Ranger(model.parameters(), **options)
    train(model, optimizer, range(4))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    again.load_state_dict(model.state_dict())
    resumed = Ranger(again.parameters(), **options)
    load_distributed_checkpoint(again, resumed, folder)
    train(model, optimizer, range(4, 8))
    train(again, resumed, range(4, 8))
    assert_same_storage(again, resumed, model, optimizer, "ours")


def groups_that_shards_cut(rank, folder):
    """They are refused before anything is changed."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(4100, 3))
    optimizer = Ranger(sharded(model).parameters(), state_dtype="8bit", **OPTIONS)
    model.weight.grad = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"a scale for 32 elements.*torch\.bfloat16"):
        optimizer.step()
    assert not optimizer.state
    assert (full(model.weight) == 1).all()


@pytest.fixture(scope="module")
def on_two(folder):
    checks = (resharding, formats_of_low_precision, our_own, groups_that_shards_cut)
    return on_ranks(WORLD, checks, folder)


@pytest.mark.parametrize(
    "check", ["resharding", "formats_of_low_precision", "our_own", "groups_that_shards_cut"]
)
def test_two_ranks_and_one_read_each_others_state(on_two, check):
    assert on_two[check] == ""
