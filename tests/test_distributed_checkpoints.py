"""Optimizers of others in checkpoints of torch.distributed.checkpoint. On one rank here;
tests/test_distributed.py has it on two."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from helpers import assert_same_bits
from optimizer_infos import same, snapshot
from ranger_cuda import Lookahead, RAdam, Ranger, load_distributed_checkpoint

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
NESTED = StateDictOptions()


def build(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 3)).to(dtype)


def groups(model, **options):
    """Two, in another order than the model's."""
    return [{"params": [*model[2].parameters()]}, {"params": [*model[0].parameters()], **options}]


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 64, dtype=model[0].weight.dtype)).square().mean().backward()
        optimizer.step()


def saved(model, optimizer, folder, key="optimizer", options=NESTED):
    state = get_optimizer_state_dict(model, optimizer, options=options)
    for name in reversed(key.split(".")):
        state = {name: state}
    dcp.save({"model": model.state_dict(), **state}, checkpoint_id=folder)
    return str(folder)


def load_weights(model, folder):
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])


@pytest.mark.parametrize("is_model_first", [True, False])
@pytest.mark.parametrize("options", [NESTED, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("target", [Ranger, RAdam, lambda p: Lookahead(RAdam(p))])
def test_adamw_s_checkpoint_loads_before_or_after_the_weights(
    tmp_path, is_model_first, options, target
):
    model = build()
    adamw = torch.optim.AdamW(groups(model, weight_decay=0.3), lr=0.02, weight_decay=0.1)
    train(model, adamw, range(5))
    folder = saved(model, adamw, tmp_path, "app.optim", options)

    expected = copy.deepcopy(model)
    reference = target(groups(expected))
    state = adamw.state_dict()
    reference.load_state_dict(state)

    other = build(1)  # a start of its own, which must not shine through
    ours = target(groups(other))
    if is_model_first:
        load_weights(other, folder)
    load_distributed_checkpoint(other, ours, folder, "app.optim")
    if not is_model_first:
        load_weights(other, folder)
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.3]
    for each, its in ((other, ours), (expected, reference)):
        train(each, its, range(5, 14))  # over a sync, where a wrong slow weight moves parameters
    for p, q in zip(other.parameters(), expected.parameters(), strict=True):
        assert_same_bits(p, q, "parameters")
        assert ours.state[p].keys() == reference.state[q].keys()
        for name, value in reference.state[q].items():
            assert_same_bits(ours.state[p][name], value, name)


@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"])
def test_our_own_checkpoint_goes_on_in_mid_cycle_with_the_same_bits(tmp_path, state_dtype):
    model = build(dtype=torch.bfloat16)
    optimizer = Ranger(groups(model), k=4, state_dtype=state_dtype)
    train(model, optimizer, range(6))
    folder = saved(model, optimizer, tmp_path)
    other = build(1, torch.bfloat16)
    ours = Ranger(groups(other), state_dtype=state_dtype)
    load_weights(other, folder)
    load_distributed_checkpoint(other, ours, folder)
    train(model, optimizer, range(6, 13))
    train(other, ours, range(6, 13))
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_bits(p, q, "parameters")
        for name, value in optimizer.state[q].items():
            assert_same_bits(ours.state[p][name], value, name)


def test_adamw_s_moments_become_8_bit_ones(tmp_path):
    model = build(dtype=torch.bfloat16)
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, range(3))
    ours = Ranger(model.parameters(), state_dtype="8bit")
    load_distributed_checkpoint(model, ours, saved(model, adamw, tmp_path))
    weight = model[0].weight  # 5,120 elements
    assert ours.state[weight]["exp_avg"].dtype == torch.uint8
    found, expected = ours.decoded_state(weight)["exp_avg"], adamw.state[weight]["exp_avg"].float()
    assert (found - expected).norm() < 0.05 * expected.norm()  # 4 bits of fraction: 1/32 at most


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(tmp_path):
    model = build()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, range(2))
    folder = saved(model, adamw, tmp_path / "adamw")
    nadam = torch.optim.NAdam(model.parameters())
    train(model, nadam, range(2))
    of_nadam = saved(model, nadam, tmp_path / "nadam")

    optimizer = Ranger(model.parameters())
    train(model, optimizer, range(3))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"nothing under 'optim'; it has 'model', 'optimizer'"):
        load_distributed_checkpoint(model, optimizer, folder, "optim")
    with pytest.raises(ValueError, match="'momentum_decay'"):
        load_distributed_checkpoint(model, optimizer, of_nadam)
    with pytest.raises(TypeError, match="not for AdamW"):
        load_distributed_checkpoint(model, adamw, folder)
    assert same(snapshot(optimizer), before)

    larger = nn.Sequential(*build(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"no optimizer state of 3\.bias, 3\.weight"):
        load_distributed_checkpoint(larger, Ranger(larger.parameters()), folder)
