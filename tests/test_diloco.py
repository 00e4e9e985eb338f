"""DiLoCo: workers that train apart and meet, over gloo; the paper's algorithm in one process."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers import assert_same_bits
from ranger_cuda import DiLoCo, Lookahead, RAdam
from ranks import Awkward, full, give, on_ranks, stored

K, ALPHA, MU = 3, 0.7, 0.9
STEPS = 4 * K + 1


def built(model, process_group=None, inner=None, **changed):
    inner = inner or RAdam(model.parameters(), lr=0.05)
    options = {"k": K, "alpha": ALPHA, "outer_momentum": MU, **changed}
    return DiLoCo(inner, process_group=process_group, **options)


def give_own(model, step, worker):
    """Gradients of one worker, whatever the number of workers."""
    for i, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * worker + 100 * step + i)
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(model, optimizer, steps, worker):
    for step in steps:
        give_own(model, step, worker)
        optimizer.step()


def of_all(tensor):
    """What every rank has of a tensor, as bytes."""
    own = stored(tensor)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return found


def simulated(workers, steps):
    """Algorithm 1 of the paper: every worker's weights, and the slow one's."""
    models = [Awkward() for _ in range(workers)]
    inner = [RAdam(model.parameters(), lr=0.05) for model in models]
    slow = Awkward()
    outer = torch.optim.SGD(slow.parameters(), lr=ALPHA, momentum=MU, nesterov=True)
    for step in range(steps):
        for worker, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            give_own(model, step, worker)
            optimizer.step()
        if step % K == K - 1:
            for p, *own in zip(slow.parameters(), *(m.parameters() for m in models), strict=True):
                p.grad = p.detach() - torch.stack([q.detach() for q in own]).mean(0)
            outer.step()
            for model in models:
                model.load_state_dict(slow.state_dict())
    return models, slow


def as_the_paper_has_it(rank, folder):
    workers = dist.get_world_size()
    model = Awkward()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1 + rank)  # the first rank's count
    optimizer = built(model)
    train(model, optimizer, range(STEPS), rank)
    models, slow = simulated(workers, STEPS)
    for param, wanted, its_slow in zip(
        model.parameters(), models[rank].parameters(), slow.parameters(), strict=True
    ):
        state = optimizer.state[param]
        torch.testing.assert_close(param, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["slow_param"], its_slow.detach(), rtol=1e-5, atol=1e-5)
        assert state["lookahead_step"].item() == STEPS // K
        for name in ("slow_param", "outer_momentum_buffer"):
            assert len({bytes(found.numpy()) for found in of_all(state[name])}) == 1
        assert param.numel() == 1 or len({bytes(f.numpy()) for f in of_all(param)}) == workers
    assert optimizer.param_groups[0]["diloco_step"] == STEPS % K


def any_format(rank, folder):
    """bfloat16 and float16 workers meet in the same bits."""
    for dtype in (torch.bfloat16, torch.float16):
        for rounding in ("exact", "stochastic", "nearest", "stochastic24"):
            if (dtype, rounding) == (torch.float16, "stochastic24"):
                continue
            model = Awkward().to(dtype)
            inner = RAdam(model.parameters(), lr=0.05, weight_rounding=rounding)
            optimizer = built(model, inner=inner)
            train(model, optimizer, range(2 * K), rank)
            for param in model.parameters():
                kept = ("slow_param", "outer_momentum_buffer", "residual", "master")
                its = [optimizer.state[param][n] for n in kept if n in optimizer.state[param]]
                for tensor in (param, *its):
                    assert len({bytes(f.numpy()) for f in of_all(tensor)}) == 1, (dtype, rounding)


def any_layout_and_complex(rank, folder):
    """Parameters that are not contiguous, and numbers of two parts."""
    params = [
        nn.Parameter(torch.full((2, 3, 4, 5), 1.0 + rank).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.full((3, 4), 1.0 + rank).t()),
        nn.Parameter(torch.full((5,), 1.0 + rank, dtype=torch.complex64)),
        nn.Parameter(torch.full((5,), 1.0 + rank, dtype=torch.float64)),
    ]
    optimizer = DiLoCo(torch.optim.SGD(params, lr=1.0), k=2, alpha=0.5, outer_momentum=0.0)
    for step in range(2):
        for param in params:
            assert (param == 1 - step * (rank + 1)).all()
            param.grad = torch.full_like(param, rank + 1)
        optimizer.step()
    for param in params:  # by 2 and by 4, on average 3, and half of it
        assert (param == -0.5).all()
    assert params[0].is_contiguous(memory_format=torch.channels_last)


def one_all_reduce_a_sync(rank, folder):
    model = Awkward()
    optimizer = built(model)
    calls = []
    kept = dist.all_reduce
    dist.all_reduce = lambda *args, **more: calls.append(args) or kept(*args, **more)
    try:
        train(model, optimizer, range(2 * K), rank)
    finally:
        dist.all_reduce = kept
    assert len(calls) == 2


def workers_that_are_sharded(rank, folder):
    """Two workers of two ranks each have the bits of two of one rank each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("worker", "shard"))
    worker = mesh.get_local_rank("worker")
    model = fully_shard(Awkward(), mesh=mesh["shard"])
    whole = Awkward()
    optimizer = built(model, mesh.get_group("worker"))
    reference = built(whole, mesh.get_group("worker"))
    for step in range(2 * K + 1):
        give(model, 10 * step + worker)
        give(whole, 10 * step + worker)
        optimizer.step()
        reference.step()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert_same_bits(full(p), full(q), "parameter")
        for name, value in reference.state[q].items():
            assert_same_bits(full(optimizer.state[p][name]), value, name)


def saved(folder, rank, step):
    return Path(folder).parent / f"{rank}-{step}.pt"


def save(folder, rank, step, model, optimizer):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(copy.deepcopy(state), saved(folder, rank, step))


def unbroken(rank, folder):
    model = Awkward()
    optimizer = built(model)
    train(model, optimizer, range(STEPS), rank)
    save(folder, rank, "unbroken", model, optimizer)


def broken(rank, folder):
    """A worker dies in the middle of a cycle; each saves every step."""
    model = Awkward()
    optimizer = built(model)
    for step in range(STEPS):
        if rank == 1 and step == K + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train(model, optimizer, [step], rank)
        save(folder, rank, step, model, optimizer)


def come_back(rank, folder):
    """Each from its own last checkpoint, at whatever step that is."""
    last = max(step for step in range(STEPS) if saved(folder, rank, step).exists())
    state = torch.load(saved(folder, rank, last))
    model = Awkward()
    optimizer = built(model)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, range(last + 1, STEPS), rank)
    wanted = torch.load(saved(folder, rank, "unbroken"))
    for name, value in model.state_dict().items():
        assert_same_bits(value, wanted["model"][name], name)
    for key, its in optimizer.state_dict()["state"].items():
        for name, value in its.items():
            assert_same_bits(value, wanted["optimizer"]["state"][key][name], name)


def lonely(rank, folder):
    """Whom the others do not meet keeps its count: the next step meets again."""
    model = Awkward()
    optimizer = built(model)
    train(model, optimizer, range(K - 1), rank)
    kept = dist.all_reduce

    def fails(*args, **more):
        raise RuntimeError("the connection was closed")

    dist.all_reduce = fails
    try:
        with pytest.raises(RuntimeError, match="connection"):
            train(model, optimizer, [K - 1], rank)
    finally:
        dist.all_reduce = kept
    assert optimizer.param_groups[0]["diloco_step"] == K - 1
    train(model, optimizer, [K], rank)
    assert optimizer.param_groups[0]["diloco_step"] == 0
    for param in model.parameters():
        assert len({bytes(found.numpy()) for found in of_all(param)}) == 1


ON_2 = (
    as_the_paper_has_it,
    any_format,
    any_layout_and_complex,
    one_all_reduce_a_sync,
    lonely,
    unbroken,
)
ON_4 = (as_the_paper_has_it, workers_that_are_sharded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("diloco")


@pytest.fixture(scope="module")
def found(folder):
    return {(2, n): problem for n, problem in on_ranks(2, ON_2, folder).items()} | {
        (4, n): problem for n, problem in on_ranks(4, ON_4, folder).items()
    }


@pytest.mark.parametrize(
    ("workers", "check"),
    [*((2, check) for check in ON_2), *((4, check) for check in ON_4)],
    ids=lambda value: value if isinstance(value, int) else value.__name__,
)
def test_workers_meet_in_the_same_bits(found, workers, check):
    assert found[workers, check.__name__] == ""


def test_a_worker_that_died_comes_back_with_the_same_bits(found, folder):
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        on_ranks(2, (broken,), folder)
    assert on_ranks(2, (come_back,), folder)["come_back"] == ""


# --- one worker ----------------------------------------------------------------------------------


def test_one_worker_s_bits_are_lookahead_s():
    model, other = Awkward(), Awkward()
    optimizer = built(model)
    reference = Lookahead(
        RAdam(other.parameters(), lr=0.05), K, ALPHA, outer_momentum=MU, outer_nesterov=True
    )
    for step in range(STEPS):
        train(model, optimizer, [step], 0)
        train(other, reference, [step], 0)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert_same_bits(p, q, f"step {step}")


@pytest.mark.parametrize("at", range(1, 2 * K + 1))
def test_a_run_resumed_at_any_point_of_a_cycle_has_the_same_bits(at):
    model, other = Awkward(), Awkward()
    optimizer, first = built(model), built(other)
    train(model, optimizer, range(STEPS), 0)
    train(other, first, range(at), 0)
    resumed = built(other)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    train(other, resumed, range(at, STEPS), 0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p, q, "parameter")


def test_groups_may_meet_at_steps_of_their_own():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([{"params": [a], "lookahead_k": 2}, {"params": [b]}], lr=1.0)
    optimizer = DiLoCo(inner, k=3, alpha=0.5, outer_momentum=0.0)
    for step in range(6):
        a.grad = b.grad = -torch.ones(2)
        optimizer.step()
        assert (a[0].item() == (step + 1) / 2) == (step % 2 == 1)
    assert [a[0].item(), b[0].item()] == [3.0, 3.0]
    assert optimizer.state[a]["lookahead_step"].item() == 3
    assert optimizer.state[b]["lookahead_step"].item() == 2


def test_a_parameter_that_does_not_move_in_its_first_step_is_refused():
    model = Awkward()
    optimizer = built(model)
    give_own(model, 0, 0)
    model.p1.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 has no gradient"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    model.p1.requires_grad_(False)
    train_rest = [p for p in model.parameters() if p.requires_grad]
    for _ in range(K):
        optimizer.step()
    assert all("slow_param" in optimizer.state[p] for p in train_rest)


def test_a_copy_trains_on_as_the_original_does():
    model = Awkward()
    optimizer = built(model)
    train(model, optimizer, range(2), 0)
    other, its = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, STEPS), 0)
    train(other, its, range(2, STEPS), 0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p, q, "parameter")
