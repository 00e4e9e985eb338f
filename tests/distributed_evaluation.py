"""Checks on several ranks: evaluation on the slow weights of sharded models."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ranger_cuda import Ranger
from ranks import (
    BUILDS,
    OPTIONS,
    WORLD,
    Awkward,
    assert_same_run,
    full,
    sharded,
    train,
)


def evaluation(rank, folder):
    """FSDP2 keeps gathered weights after a forward pass: none of them is of before an evaluation on
    the slow weights within it, and none of within it afterwards."""
    mesh = init_device_mesh("cpu", (WORLD,))
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))

    def make(reshard_after_forward):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        plain = copy.deepcopy(model)
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
        return model, plain

    def step_on(model, optimizer):
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for build, reshards in itertools.product(BUILDS, (True, False)):
        (model, plain), (other, _) = make(reshards), make(reshards)
        optimizer, reference = build(model.parameters()), build(other.parameters())

        evaluate = optimizer.slow_weights(model)(functools.partial(model, inputs))

        for step in range(5):
            step_on(model, optimizer)
            step_on(other, reference)
            names = [name for name, _ in model.named_parameters()]
            slow = [full(optimizer.state[p]["slow_param"]) for p in model.parameters()]
            plain.load_state_dict(dict(zip(names, slow, strict=True)))
            with torch.no_grad():
                before = model(inputs)
                with optimizer.slow_weights(model):
                    assert torch.equal(model(inputs), plain(inputs)), f"inside, step {step}"
                assert torch.equal(model(inputs), before), f"after, step {step}"
                assert torch.equal(evaluate(), plain(inputs)), f"inside again, step {step}"
            assert_same_run(model, optimizer, other, reference, f"{reshards=}, step {step}")


def evaluation_refused(rank, folder):
    """Without the model nobody can free the weights that FSDP gathered of it."""
    model, single = sharded(), Awkward()
    optimizer = Ranger(model.parameters(), **OPTIONS)
    train(model, optimizer, [0])
    for wrong, says in ((None, "give it the model"), (single, "not a parameter of the model")):
        with pytest.raises(RuntimeError, match=says):
            optimizer.slow_weights(wrong).__enter__()
    optimizer.step()

    for use_orig_params in (False, True):
        flat = FullyShardedDataParallel(
            nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        optimizer = Ranger(flat.parameters(), **OPTIONS)
        flat(torch.ones(4)).sum().backward()
        optimizer.step()
        for model in (None, flat):
            with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel.*fully_shard"):
                optimizer.slow_weights(model).__enter__()
        optimizer.step()


def eval_mode(rank, folder):
    """eval() and train() free what FSDP2 gathered, too, and a checkpoint of eval mode, whose fast
    weights torch.distributed.checkpoint would leave out, is refused."""
    mesh = init_device_mesh("cpu", (WORLD,))

    def make():
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return model, Ranger(model.parameters(), eval_with_slow_weights=True, **OPTIONS)

    (model, optimizer), (other, loaded) = make(), make()
    inputs = torch.ones(2, 6)
    for _ in range(4):
        model(inputs).sum().backward()
        optimizer.step()
    before = model(inputs)
    with pytest.raises(RuntimeError, match=r"give it the model: optimizer.eval\(model\)"):
        optimizer.eval()
    with optimizer.slow_weights(model):
        expected = model(inputs)
    assert not torch.equal(before, expected)
    optimizer.eval(model)
    assert torch.equal(model(inputs), expected)
    model.reshard()
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
    optimizer.train(model)
    assert torch.equal(model(inputs), before)
    state = get_optimizer_state_dict(other, loaded)
    dcp.load(state, checkpoint_id=folder)
    with pytest.raises(ValueError, match=r"call optimizer.train\(\) before saving"):
        set_optimizer_state_dict(other, loaded, state)
