"""1,200 damaged checkpoints: each loads and training goes on with the reference's bits, or it is
refused in a sentence and nothing has happened."""

from __future__ import annotations

import copy
import functools
import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from helpers import assert_same_bits
from optimizer_infos import bytes_of, set_grads
from ranger_cuda import Lookahead, RAdam, Ranger

REAL = [((7,), torch.float32), ((4, 3), torch.float32), ((5,), torch.bfloat16)]
EVERY = [*REAL, ((3,), torch.complex64), ((), torch.float64), ((2, 2), torch.float16)]
VARIANTS = {
    "RAdam": (EVERY, lambda p, backend: RAdam(p, backend=backend)),
    "Ranger": (EVERY, lambda p, backend: Ranger(p, k=2, backend=backend)),
    "Lookahead(RAdam)": (
        EVERY,
        lambda p, backend: Lookahead(RAdam(p, backend=backend), k=2, backend=backend),
    ),
    "Lookahead(AdamW)": (
        REAL,
        lambda p, backend: Lookahead(torch.optim.AdamW(p), k=2, backend=backend),
    ),
    "Lookahead(SGD)": (
        REAL,
        lambda p, backend: Lookahead(torch.optim.SGD(p, momentum=0.9), k=2, backend=backend),
    ),
}


# --- the damages: each draws what it does from ``draw`` -------------------------------------------


def freed(tensor):
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(0)
    return tensor


VALUES = [
    *[None, 0, 1, -1, 2.5, 6.0, 1e39, 10**400, math.nan, math.inf, True, False, 1j],
    *["x", "0.1", b"1", [], {}, (), set(), [0, 1], {"step": 3}, {"momentum_buffer": 1}],
    *[np.float32(0.5), np.int64(3), np.array([1.0, 2.0])],
    *[torch.tensor(1.0), torch.tensor(3), torch.tensor(True), torch.tensor(1j), torch.ones(2)],
    *[torch.tensor(0.5, device="meta"), freed(torch.tensor(1.0)), torch.zeros(0)],
]
CONVERSIONS = [
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.int(),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.real,
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t[None],
    lambda t: t.flatten()[:-1],
    lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape),
    lambda t: torch.stack([t, t], -1)[..., 1],
    lambda t: torch._neg_view(t),
    lambda t: torch.nn.Parameter(t.clone()),
    lambda t: t.double().requires_grad_().float(),
    lambda t: t * math.nan,
    freed,
]


def places(value):
    """Every dict of a checkpoint and its keys."""
    found = []
    if isinstance(value, dict):
        found += [(value, key) for key in value]
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            found += places(inner)
    return found


def states(saved):
    found = saved.get("state")
    found = found.values() if isinstance(found, dict) else []
    return [state for state in found if isinstance(state, dict) and state] or [{}]


def groups(saved):
    found = saved.get("param_groups")
    return [g for g in found if isinstance(g, dict)] if isinstance(found, list) else []


def drop(saved, draw):
    place, key = draw.choice(places(saved) or [({0: 0}, 0)])
    del place[key]


def replace(saved, draw):
    place, key = draw.choice(places(saved) or [({}, 0)])
    place[key] = draw.choice(VALUES)


def rename(saved, draw):
    place, key = draw.choice(places(saved) or [({0: 0}, 0)])
    new = [str(key), "slow_buffer", "exp_avg", "step", 0, 17, "lookahead_slow_buff", "residual"]
    place[draw.choice(new)] = place.pop(key)


def exchange(saved, draw):
    all_places = places(saved) or [({0: 0}, 0)]
    (a, i), (b, j) = draw.choice(all_places), draw.choice(all_places)
    if a is not saved and b is not saved:  # or it might come to hold itself
        a[i], b[j] = (b[j], a[i]) if draw.random() < 0.5 else (a[i], a[i])
    if draw.random() < 0.5:
        saved.update(copy.copy(saved))


def convert(saved, draw):
    state = draw.choice(states(saved))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    names = [
        name
        for name, value in tensors.items()
        if value.layout != torch.strided or value.is_meta or value.untyped_storage().nbytes()
    ]
    if names:
        name = draw.choice(names)
        try:
            state[name] = draw.choice(CONVERSIONS)(state[name])
        except (RuntimeError, IndexError):  # there is no such tensor
            state[name] = torch.ones(3)


def add_state(saved, draw):
    names = ["max_exp_avg_sq", "slow_buffer", "mu_product", "mine", 3, "slow_param", "master"]
    draw.choice(states(saved))[draw.choice(names)] = draw.choice(VALUES)


def change_groups(saved, draw):
    found = groups(saved)
    if found:
        names = [*found[0], "k", "alpha", "lookahead_k", "lookahead_alpha", "amsgrad", "mine"]
        draw.choice(found)[draw.choice(names)] = draw.choice(VALUES)


def change_params(saved, draw):
    for group in draw.sample(groups(saved), min(1, len(groups(saved)))):
        ids = group.get("params")
        if isinstance(ids, list):
            changes = [ids[::-1], ids[1:], [*ids, 9], [*map(str, ids)], ids[:1] * len(ids), [[]]]
            group["params"] = draw.choice(changes)


def reorder_groups(saved, draw):
    found = saved.get("param_groups")
    if isinstance(found, list):
        saved["param_groups"] = draw.choice([found[::-1], found[1:], [*found, *found[:1]]])


def parameters_by_name(saved, draw):
    if isinstance(saved.get("state"), dict):
        saved["state"] = {str(key): value for key, value in saved["state"].items()}


DAMAGES = [
    *[drop, replace, rename, exchange, convert, convert, convert, add_state],
    *[change_groups, change_groups, change_params, reorder_groups, parameters_by_name],
]


# --- what holds -----------------------------------------------------------------------------------


def fresh(shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape, dtype in shapes
    ]


def build(name, backend=None):
    shapes, make = VARIANTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about complex numbers
        params = fresh(shapes)
    return params, make([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}], backend)


def step(params, optimizer, seed):
    set_grads(params, seed)
    optimizer.step()


@functools.cache
def checkpoint(name):
    params, optimizer = build(name)
    for seed in range(3):
        step(params, optimizer, seed)
    return optimizer.state_dict()


def started(name, backend=None):
    params, optimizer = build(name, backend)
    optimizer.load_state_dict(checkpoint(name))
    return params, optimizer


def storages(value):
    return {
        t.untyped_storage().data_ptr()
        for t in tree_leaves(value)
        if isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta and t.numel()
    } - {0}


def assert_alike(a, b, first, second):
    for p, q in zip(a, b, strict=True):
        assert_same_bits(p, q, "a parameter")
        assert first.state[p].keys() == second.state[q].keys()
        for key, value in first.state[p].items():
            if isinstance(value, Tensor):
                assert_same_bits(value, second.state[q][key], str(key))


def frozen(optimizer):
    """What must not change, down to the objects."""
    inner = getattr(optimizer, "optimizer", optimizer)
    tensors = [t for t in tree_leaves(list(inner.state.items())) if isinstance(t, Tensor)]
    values = [(id(t), bytes_of(t)) for t in tensors]
    return id(inner.state), id(inner.param_groups), repr(inner.param_groups), values


def refusal(optimizer, saved, strict):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer.load_state_dict(saved, strict=strict)
        except Exception as error:
            return error


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=240)
@given(
    damages=st.lists(
        st.tuples(st.sampled_from(DAMAGES), st.integers(0, 2**16)), min_size=1, max_size=3
    ),
    strict=st.booleans(),
)
def test_a_damaged_checkpoint_loads_or_is_refused_whole(name, damages, strict):
    saved = copy.deepcopy(checkpoint(name))
    for damage, seed in damages:
        damage(saved, random.Random(seed))
    inner_is_torchs = name in ("Lookahead(AdamW)", "Lookahead(SGD)")
    params, optimizer = started(name)
    before = frozen(optimizer)
    error = refusal(optimizer, saved, strict)
    if error is not None:
        if not inner_is_torchs:
            assert isinstance(error, (ValueError, RuntimeError)), repr(error)
            assert str(error).startswith("loaded state dict"), repr(error)
            assert len(str(error).split()) > 6
        assert frozen(optimizer) == before
        others, twin = started(name)
        step(params, optimizer, 3)
        step(others, twin, 3)
        assert_alike(params, others, optimizer, twin)
        return

    assert not storages(list(optimizer.state.values())) & storages(saved)
    others, reference = started(name, "reference")
    assert refusal(reference, saved, strict) is None
    for seed in (3, 4):
        try:
            step(params, optimizer, seed)
        except Exception:
            if inner_is_torchs:  # which takes any state and any group
                return
            raise
        step(others, reference, seed)
        assert_alike(params, others, optimizer, reference)
    optimizer.load_state_dict(optimizer.state_dict())  # nothing is left that another load refuses
