"""Interrupt anywhere, resume anywhere: the same bits; a load shares nothing with its source."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import assert_same, assert_same_bits, twins
from optimizer_infos import lookahead_radam, same, snapshot
from ranger_cuda import Lookahead, RAdam, Ranger
from saved_runs import DTYPES, make, through_a_file, train


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_run_resumed_at_any_point_of_a_cycle_has_the_bits_of_one_that_was_not(at, how):
    a, b = twins(make())
    whole, first = Ranger(a, k=4, weight_decay=0.1), Ranger(b, k=4, weight_decay=0.1)
    train(whole, a, range(12))
    train(first, b, range(at))
    if how == "state_dict":
        c, _ = twins(b)
        second = Ranger(c, k=4, weight_decay=0.1)
        second.load_state_dict(through_a_file(first.state_dict(), map_location="cpu"))
    else:
        copier = copy.deepcopy if how == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        second = copier(first)
        c = second.param_groups[0]["params"]
        assert not {p.data_ptr() for p in c if p.numel()} & {p.data_ptr() for p in b}
    train(second, c, range(at, 12))
    assert_same(whole, second, a, c, f"resumed at {at}")


def test_loading_casts_no_state_to_a_low_precision_parameter_s_dtype():
    a, b = twins(make([torch.bfloat16, torch.float16]))
    first, second = Ranger(a), Ranger(b)
    train(first, a, range(3))
    second.load_state_dict(first.state_dict())
    for p, q in zip(a, b, strict=True):
        for name, value in first.state[p].items():
            assert second.state[q][name].dtype == value.dtype
            assert_same_bits(second.state[q][name], value, name)
    found = {v.dtype for p in b for v in second.state[p].values()}
    assert found == {torch.float32, torch.bfloat16}  # which residuals lie in


FOREIGN = {
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RAdam capturable": lambda p: torch.optim.RAdam(p, lr=0.01, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("cls", [RAdam, Ranger])
def test_a_checkpoint_of_torch_loads_and_training_goes_on(name, cls):
    a, b = twins(make([torch.float32, torch.float64]))
    theirs = FOREIGN[name](a)
    train(theirs, a, range(8))
    ours = cls(b, rho_threshold=5.0)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    group = ours.param_groups[0]
    assert group["lr"] == 0.01
    assert group["rho_threshold"] == 5.0
    if cls is Ranger:
        assert (group["lookahead_k"], group["lookahead_alpha"]) == (6, 0.5)
    # Model weights that arrive after the optimizer's are what slow weights start from.
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p)
    before = [q.detach().clone() for q in b]
    train(ours, b, [8])
    for p, q, start in zip(a, b, before, strict=True):
        assert ours.state[q]["step"] == 9
        if cls is Ranger:
            assert torch.equal(ours.state[q]["slow_param"], start)
        expected = 0.9 * theirs.state[p]["exp_avg"] + 0.1 * q.grad
        if group["weight_decay"] == 0:
            torch.testing.assert_close(ours.state[q]["exp_avg"], expected)


def test_a_checkpoint_of_torch_s_radam_goes_on_as_torch_s_radam():
    a, b = twins(make([torch.float64]))
    theirs, ours = torch.optim.RAdam(a, foreach=False), RAdam(b, rho_threshold=5)
    train(theirs, a, range(4))
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p)
    # The state tensors are shared by what load_state_dict does in torch, so copy one side.
    theirs.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(theirs, a, range(4, 20))
    train(ours, b, range(4, 20))
    for p, q in zip(a, b, strict=True):
        assert ((p - q).abs() <= 1e-12 * p.abs().max()).all()  # see tests/test_papers.py


def test_our_radam_checkpoint_goes_on_in_torch_s_radam():
    a, b = twins(make([torch.float64]))
    ours, theirs = RAdam(a, rho_threshold=5), torch.optim.RAdam(b, foreach=False)
    train(ours, a, range(9))
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p)
    train(theirs, b, range(9, 20))
    train(ours, a, range(9, 20))
    for p, q in zip(a, b, strict=True):
        assert ((p - q).abs() <= 1e-12 * p.abs().max()).all()


def test_a_group_keeps_its_own_values_where_the_checkpoint_has_none():
    a, b = twins(make([torch.float32]))
    theirs = torch.optim.AdamW([{"params": a[:1]}, {"params": a[1:]}])
    ours = Ranger([{"params": b[:1], "k": 3}, {"params": b[1:], "alpha": 0.9}])
    ours.load_state_dict(theirs.state_dict())
    assert lookahead_of(ours) == [(3, 0.5), (6, 0.9)]


def lookahead_of(optimizer):
    return [(g["lookahead_k"], g["lookahead_alpha"]) for g in optimizer.param_groups]


def test_a_checkpoint_whose_groups_say_k_and_alpha_loads():
    a, b = twins(make([torch.float32]))
    first, second = Ranger(a, k=4, alpha=0.3), Ranger(b)
    train(first, a, range(6))
    saved = copy.deepcopy(first.state_dict())
    for group in saved["param_groups"]:
        for name in ("k", "alpha"):
            group[name] = group.pop(f"lookahead_{name}")
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p)
    second.load_state_dict(saved)
    assert lookahead_of(second) == [(4, 0.3)]
    assert "k" not in second.param_groups[0]
    for optimizer, params in ((first, a), (second, b)):
        train(optimizer, params, range(6, 13))
    for p, q in zip(a, b, strict=True):
        assert_same_bits(p, q, "after the load")


def test_alpha_in_a_group_is_another_library_s():
    a, b = twins(make([torch.float32]))
    first, second = Ranger(a, alpha=0.3), Ranger([{"params": b, "alpha": 0.3}])
    assert lookahead_of(second) == [(6, 0.3)]
    second.param_groups[0]["alpha"] = 0.99  # as fastai does
    for optimizer, params in ((first, a), (second, b)):
        train(optimizer, params, range(7))
    for p, q in zip(a, b, strict=True):
        assert_same_bits(p, q, "with a group's alpha")


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)])
def test_older_kinds_of_step_counts_load(step):
    (a,), (b,) = twins([torch.randn(5)])
    first, second = Ranger([a]), Ranger([b])
    train(first, [a], range(7))
    b.data.copy_(a)
    saved = first.state_dict()
    saved["state"][0] = {**saved["state"][0], "step": step}
    second.load_state_dict(copy.deepcopy(saved))
    train(first, [a], range(7, 15))
    train(second, [b], range(7, 15))
    assert_same(first, second, [a], [b], step)


def storages(value):
    return {
        t.untyped_storage().data_ptr()
        for t in tree_leaves(value)
        if isinstance(t, torch.Tensor) and t.numel()
    }


COPIERS = {
    "RAdam": RAdam,
    "Ranger": Ranger,
    "reference": lambda p: Ranger(p, backend="reference"),
    "Lookahead(RAdam)": lookahead_radam,
    "Lookahead(AdamW)": lambda p: Lookahead(torch.optim.AdamW(p)),
    "Lookahead(SGD)": lambda p: Lookahead(torch.optim.SGD(p, momentum=0.9)),
    "Lookahead(LBFGS)": lambda p: Lookahead(Lists(p)),
}


class Lists(torch.optim.SGD):
    """Keeps tensors in lists, as LBFGS does."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("old", []).append(p.grad.clone())


@pytest.mark.parametrize("name", COPIERS)
def test_a_loaded_state_shares_no_memory_with_what_was_loaded(name):
    dtypes = DTYPES if "torch" not in name and "Lists" not in name else [torch.float32]
    dtypes = [torch.float32] if "(" in name and "RAdam" not in name else dtypes
    a, b = twins(make(dtypes))
    optimizer, other = train(COPIERS[name](a), a, range(3)), COPIERS[name](b)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert not storages(list(other.state.values())) & storages(saved)
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p)
    train(other, b, range(3, 8))
    assert same(saved, kept)
    train(optimizer, a, range(3, 8))
    assert_same_bits_of(optimizer, other)


def assert_same_bits_of(optimizer, other):
    assert same(snapshot(optimizer)["state"], snapshot(other)["state"])
    assert same(snapshot(optimizer)["params"], snapshot(other)["params"])


class Copies(TorchDispatchMode):
    """Counts copies and conversions of tensors of more than one element."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copies = (torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten.copy_)
        self.number += func.overloadpacket in copies and result.numel() > 1
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cls", [RAdam, Ranger, lookahead_radam])
def test_a_load_copies_every_tensor_once(cls, dtype):
    (a,), (b,) = twins([torch.randn(5, 4)])
    optimizer = train(cls([a]), [a], range(3))
    other = cls([torch.nn.Parameter(b.detach().to(dtype))])
    saved = optimizer.state_dict()
    with Copies() as copies:
        other.load_state_dict(saved)
    assert copies.number == (2 if cls is RAdam else 3)


def test_a_load_keeps_strides_and_makes_expanded_state_dense():
    param = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    optimizer = train(Ranger([param]), [param], range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(1, 1, 1, 1).expand(param.shape)
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["slow_param"].stride() == param.stride()
    train(optimizer, [param], [2])


@pytest.mark.parametrize("name", ["reference", "Lookahead(SGD)"])
def test_a_load_within_inference_mode_makes_state_that_steps_can_write(name):
    (a,), (b,) = twins([torch.randn(5)])
    optimizer, other = train(COPIERS[name]([a]), [a], range(2)), COPIERS[name]([b])
    with torch.inference_mode():
        other.load_state_dict(optimizer.state_dict())
    train(other, [b], range(2, 9))


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("cls", [RAdam, Ranger, lookahead_radam])
def test_a_load_copies_the_state_of_dtensors_and_refuses_that_of_others(cls, mesh):
    def param(*placements):
        whole = torch.arange(6.0).reshape(3, 2)
        return torch.nn.Parameter(distribute_tensor(whole, mesh, placements))

    def shards(state):
        return {name: v.to_local() if isinstance(v, DTensor) else v for name, v in state.items()}

    a, b, c, plain = (
        param(Shard(0)),
        param(Shard(0)),
        param(Shard(1)),
        torch.nn.Parameter(torch.zeros(3, 2)),
    )
    optimizer = cls([a])
    a.grad = torch.ones_like(a)
    optimizer.step()
    saved = optimizer.state_dict()
    other = cls([b])
    other.load_state_dict(saved)
    assert isinstance(other.state[b]["exp_avg"], DTensor)
    assert not storages(shards(other.state[b])) & storages(shards(saved["state"][0]))
    for param, message in (
        (plain, "is a DTensor"),
        (c, r"but the parameter is a DTensor, \(Shard\(dim=1\)"),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*set_optimizer_state_dict"):
            cls([param]).load_state_dict(saved)


def test_trainers_may_add_group_keys_and_load_an_optimizer_s_own_state():
    a, b = twins(make([torch.float32, torch.bfloat16]))
    plain, prepared = Ranger(a, k=3), Ranger(b, k=3)
    extra = {"initial_lr": 1.0, "foreach": True, "fused": None, "param_names": [str(p) for p in b]}
    prepared.param_groups[0].update(extra)
    for step in range(10):
        for optimizer, params in ((plain, a), (prepared, b)):
            train(optimizer, params, [step])
        prepared.load_state_dict(prepared.state_dict())  # as a wrapper's prepare() does
    assert prepared.param_groups[0]["initial_lr"] == 1.0
    assert_same(plain, prepared, a, b, "after ten loads")


def test_a_model_converted_on_the_way_says_how_to_bring_its_state_along():
    model = torch.nn.Linear(3, 2)
    optimizer = Ranger(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    model.double()
    optimizer.zero_grad()
    model(torch.ones(3).double()).sum().backward()
    with pytest.raises(RuntimeError, match=r"load_state_dict\(optimizer.state_dict\(\)\)"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float64
    assert optimizer.state[model.weight]["step"] == 2


def test_parameters_that_join_late_or_rest_have_their_own_count_and_phase():
    a, b = twins([torch.randn(5) for _ in range(4)])
    together = Ranger(a[:3], k=3)
    alone = [Ranger([p], k=3) for p in b[:3]]
    steps = [0, 0, 0, 0]
    for t in range(20):
        if t == 8:
            together.add_param_group({"params": a[3:], "k": 2, "alpha": 0.9, "lr": 0.1})
            alone.append(Ranger([b[3]], k=2, alpha=0.9, lr=0.1))
        for i in range(len(alone)):
            rests = (i == 1 and 4 <= t < 9) or (i == 2 and t < 7)
            grad = None if rests else torch.full((5,), float(t + i))
            a[i].grad = b[i].grad = grad
            steps[i] += not rests
            alone[i].step()
        together.step()
        for i, optimizer in enumerate(alone):
            assert torch.equal(a[i], b[i]), (t, i)
            if steps[i]:
                assert together.state[a[i]]["step"] == optimizer.state[b[i]]["step"] == steps[i]
