"""Slow weights on the host: the bits of slow weights that stay, whatever is done in between."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from helpers import assert_same, assert_same_bits, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.step import buckets, native, offload, transfers

SHAPES = [(70,), (3, 5), (), (0,), (40, 9), (5000,)]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """And parameters of the CPU as if they were on a device."""
    monkeypatch.setattr(buckets, "BUCKET", 600)
    monkeypatch.setattr(offload, "is_away", lambda param_groups: True)


def gradients(shapes, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def pair(build, shapes=SHAPES, dtype=torch.float32, move=lambda t: t, **options):
    a, b = twins(gradients(shapes, 100, dtype), move)
    return a, b, build(a, slow_device="cpu", **options), build(b, **options)


def run(a, b, ours, plain, steps, resting=lambda i, step: False, move=lambda t: t):
    for step in steps:
        its = gradients([p.shape for p in a], step, a[0].dtype)
        its = [None if resting(i, step) else g for i, g in enumerate(its)]
        give_gradients(its, a, b, move=move)
        ours.step()
        plain.step()
        assert_same(ours, plain, a, b, f"step {step}")


def lookahead(params, *, lr, k, outer_momentum=0.0, slow_device=None, backend=None, **inner):
    optimizer = RAdam(params, lr=lr, backend=backend, **inner)
    options = {"k": k, "outer_momentum": outer_momentum, "slow_device": slow_device}
    return Lookahead(optimizer, backend=backend, **options)


def around_adamw(params, *, lr, k, slow_device=None, **options):
    inner = torch.optim.AdamW(params, lr=lr, foreach=False)
    return Lookahead(inner, k=k, slow_device=slow_device)


BUILDS = [Ranger, lookahead]
each_build = pytest.mark.parametrize("build", BUILDS, ids=["Ranger", "Lookahead"])


@each_build
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_bit_is_that_of_slow_weights_that_stay(target, build, momentum):
    """Parameters that join late, rest, and so end their cycles in different steps."""
    shapes = SHAPES[:-1] if target.slow else SHAPES
    options = {"lr": 0.01, "k": 3, "outer_momentum": momentum, "weight_decay": 0.1}
    a, b, ours, plain = pair(
        build, shapes, move=target.move, backend=target.backend, max_grad_norm=5.0, **options
    )
    run(a, b, ours, plain, range(8), lambda i, step: (i + step) % 4 == 3, target.move)
    offloaded = ours._offload if build is Ranger else ours._offloaded
    assert len(offloaded._buckets._runs) > 1


def test_around_an_optimizer_of_torch_s():
    a, b, ours, plain = pair(around_adamw, lr=0.01, k=3)
    run(a, b, ours, plain, range(8), lambda i, step: (i + step) % 4 == 3)


FORMATS = [
    (torch.float64, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"weight_rounding": "stochastic24", "state_dtype": "8bit"}),
    (torch.bfloat16, {"weight_rounding": "stochastic", "state_dtype": torch.bfloat16}),
    (torch.float16, {}),
    (torch.float32, {"state_dtype": "8bit"}),
    (torch.complex64, {}),
]


@each_build
@pytest.mark.parametrize(("dtype", "options"), FORMATS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_format(backend, build, dtype, options):
    a, b, ours, plain = pair(build, dtype=dtype, lr=0.01, k=2, backend=backend, **options)
    run(a, b, ours, plain, range(5))


@pytest.mark.parametrize("lr", [0.0, 0.01])
def test_each_group_has_its_cycle_and_may_rest(lr):
    a, b = twins(gradients(SHAPES, 100))
    ours, plain = (
        Ranger(
            [
                {"params": params[:3], "k": 2, "lr": lr},
                {"params": params[3:], "k": 5, "outer_momentum": 0.5},
            ],
            lr=0.1,
            slow_device=device,
        )
        for params, device in ((a, "cpu"), (b, None))
    )
    run(a, b, ours, plain, range(6))
    for params, optimizer in ((a, ours), (b, plain)):
        optimizer.param_groups[0].update(lr=0.02, lookahead_k=3)
        optimizer.param_groups[1].update(outer_momentum=0.0, lookahead_alpha=0.8)
        params.append(Parameter(torch.ones(200)))
        optimizer.add_param_group({"params": params[-1], "lr": 0.3})
    run(a, b, ours, plain, range(6, 14))
    assert ours.state[a[-1]]["step"] == 8


@each_build
def test_weights_that_are_loaded_after_a_step_at_rest_are_what_slow_weights_start_from(build):
    a, b, ours, plain = pair(build, lr=0.0, k=2)
    run(a, b, ours, plain, range(3))
    with torch.no_grad():
        for p in (*a, *b):
            p.fill_(3.0)
    for optimizer in (ours, plain):
        optimizer.param_groups[0]["lr"] = 0.1
    run(a, b, ours, plain, range(3, 8))


@each_build
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_checkpoints_go_both_ways(build, way):
    a, b, ours, plain = pair(build, lr=0.01, k=3, outer_momentum=0.9)
    run(a, b, ours, plain, range(4))
    if way == "state_dict":
        saved = ours.state_dict(), plain.state_dict()
        ours, plain = build(a, slow_device="cpu", lr=0.5, k=9), build(b, lr=0.5, k=9)
        plain.load_state_dict(saved[0])
        ours.load_state_dict(saved[1])
    elif way == "deepcopy":
        (a, ours), (b, plain) = (copy.deepcopy(pair) for pair in ((a, ours), (b, plain)))
    else:
        stream = io.BytesIO()
        torch.save(((a, ours), (b, plain)), stream)
        stream.seek(0)
        (a, ours), (b, plain) = torch.load(stream, weights_only=False)
    run(a, b, ours, plain, range(4, 9))


def test_slow_weights_of_inference_mode_are_taken_over():
    a, b, ours, plain = pair(Ranger, lr=0.01, k=2)
    run(a, b, ours, plain, range(1))
    with torch.inference_mode():
        for optimizer in (ours, plain):
            for state in optimizer.state.values():
                state["slow_param"] = state["slow_param"].clone()
    run(a, b, ours, plain, range(1, 5))
    assert not any(state["slow_param"].is_inference() for state in ours.state.values())


def test_what_others_do_to_the_count_is_seen():
    a, b, ours, plain = pair(Ranger, lr=0.01, k=4)
    run(a, b, ours, plain, range(3))
    for params, optimizer in ((a, ours), (b, plain)):
        optimizer.state[params[0]]["step"].fill_(2.0)
        optimizer.state[params[1]]["step"] = torch.tensor(9.0)
    run(a, b, ours, plain, range(3, 9))


def test_evaluation_on_slow_weights_and_back():
    a, b, ours, plain = pair(Ranger, lr=0.01, k=3, eval_with_slow_weights=True)
    run(a, b, ours, plain, range(4))
    fast = [p.detach().clone() for p in a]
    with ours.slow_weights(), plain.slow_weights():
        for p, q, before in zip(a, b, fast, strict=True):
            assert_same_bits(p, q, "inside")
            assert p.numel() < 2 or not torch.equal(p, before)
    ours.eval()
    plain.eval()
    for p, q in zip(a, b, strict=True):
        assert_same_bits(p, q, "eval mode")
    ours.train()
    plain.train()
    for optimizer in (ours, plain):
        optimizer.reset_slow_weights()
    run(a, b, ours, plain, range(4, 8))


@pytest.mark.parametrize("step", [0, 2])
def test_a_step_that_is_skipped_does_not_count(step):
    """Here at the first step, and where a cycle would have ended."""
    a, b, ours, plain = pair(Ranger, lr=0.01, k=3, nonfinite_grad_norm="skip")
    for i in range(7):
        give_gradients(gradients(SHAPES, i), a, b)
        if i == step:
            for p in (a[0], b[0]):
                p.grad[3] = torch.inf
        ours.step()
        plain.step()
        if i or step:
            assert_same(ours, plain, a, b, f"step {i}")
    assert ours.state[a[0]]["step"] == 6


@each_build
def test_a_gradient_that_is_refused_changes_nothing(build):
    a, b, ours, plain = pair(build, lr=0.01, k=2)
    run(a, b, ours, plain, range(1))
    give_gradients(gradients(SHAPES, 1), a)
    a[4].grad = a[4].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ours.step()
    assert_same(ours, plain, a, b, "refused")
    run(a, b, ours, plain, range(1, 4))


@pytest.mark.parametrize("where", ["prepare", "Transfers"])
def test_what_fails_before_anything_moves_leaves_no_state(monkeypatch, where):
    """In the first step, at the end of a cycle."""
    a, b, ours, plain = pair(Ranger, lr=0.01, k=1)

    def fail(*args):
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        if where == "prepare":
            patch.setattr(native.Native, "prepare", fail)
        else:
            patch.setattr(buckets, "Transfers", lambda devices: fail() if devices else None)
        give_gradients(gradients(SHAPES, 0), a)
        with pytest.raises(torch.OutOfMemoryError):
            ours.step()
    assert not any(ours.state.values())
    run(a, b, ours, plain, range(4))


def test_parameters_of_the_cpu_are_moved_as_ever(monkeypatch):
    monkeypatch.undo()
    a, b, ours, plain = pair(Ranger, lr=0.01, k=2)
    monkeypatch.setattr(offload.Offload, "step", None)
    run(a, b, ours, plain, range(4))


def test_a_state_that_is_no_dict_is_kept():
    ours = Ranger([Parameter(torch.ones(3))], slow_device="cpu")
    saved = ours.state_dict()
    saved["state"]["note"] = 5
    ours.load_state_dict(saved)
    assert ours.state["note"] == 5


@pytest.mark.parametrize("k", [1, 3])
def test_memory_that_cannot_be_had_changes_nothing(monkeypatch, k):
    """Of the first step, whose state is new, or later."""
    a, b, ours, plain = pair(Ranger, lr=0.01, k=k)
    run(a, b, ours, plain, range(k - 1))

    real = buckets.Rooms.tensors

    def none(*args):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(buckets.Rooms, "tensors", none)
    give_gradients(gradients(SHAPES, k - 1), a)
    with pytest.raises(torch.OutOfMemoryError):
        ours.step()
    assert [len(ours.state[p]) for p in a] == [len(plain.state[p]) for p in b]
    monkeypatch.setattr(buckets.Rooms, "tensors", real)
    run(a, b, ours, plain, range(k - 1, k + 4))


@each_build
def test_a_parameter_that_is_named_twice_moves_once(build):
    p, q = Parameter(torch.ones(300)), Parameter(torch.ones(300))
    other, another = Parameter(torch.ones(200)), Parameter(torch.ones(200))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours = build([p, other, p], lr=0.1, k=2, slow_device="cpu")
    with pytest.warns(UserWarning, match="duplicate parameters"):
        plain = build([q, another, q], lr=0.1, k=2)
    run([p, other], [q, another], ours, plain, range(5))


def test_between_syncs_no_memory_is_taken(monkeypatch):
    a, _, ours, _ = pair(Ranger, lr=0.01, k=4)
    taken = []
    real = buckets.Rooms.tensors
    monkeypatch.setattr(buckets.Rooms, "tensors", lambda *args: taken.append(1) or real(*args))
    for step in range(8):
        taken.clear()
        give_gradients(gradients(SHAPES, step), a)
        ours.step()
        assert bool(taken) == (step % 4 == 3)


@pytest.mark.parametrize("device", ["cuda", "meta", torch.device("cuda", 0)])
def test_other_devices_are_refused(device):
    for build in BUILDS:
        with pytest.raises(ValueError, match="Invalid slow_device value"):
            build([Parameter(torch.ones(3))], lr=0.1, k=2, slow_device=device)


def test_released_gradients_are_refused():
    optimizer = Ranger([Parameter(torch.ones(3))], slow_device="cpu")
    with pytest.raises(RuntimeError, match="slow_device"):
        optimizer.release_gradients()


# --- what waits for what on a device -------------------------------------------------------------


class Stream:
    """Has what is enqueued happen after all that it has waited for."""

    def __init__(self, log: list, name: str) -> None:
        self.log, self.name, self.after = log, name, set()

    def did(self, what: str) -> None:
        self.log.append((what, frozenset(self.after)))
        self.after.add(what)

    def record_event(self) -> frozenset:
        return frozenset(self.after)

    def wait_event(self, event: frozenset) -> None:
        self.after |= event

    def wait_stream(self, other: Stream) -> None:
        self.after |= other.after

    def synchronize(self) -> None:
        self.log.append((f"the host waits for {self.name}", frozenset(self.after)))


@pytest.fixture
def happened(monkeypatch) -> Callable[[int], dict[str, frozenset]]:
    log: list = []
    current = Stream(log, "current")
    current.did("before")
    names = iter(["into", "back"])
    streams = []

    def make(device):
        streams.append(Stream(log, next(names)))
        return streams[-1]

    within: list = []

    class Within:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            within.append(self.stream)

        def __exit__(self, *_):
            within.pop()

    module = SimpleNamespace(Stream=make, current_stream=lambda device: current, stream=Within)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(
        transfers, "_copy", lambda pairs: [within[-1].did(p) for p in pairs if within]
    )

    def play(count: int) -> dict[str, frozenset]:
        device = torch.device("cuda", 0)
        its = transfers.Transfers([device])
        (lane,) = its._lanes
        for i in range(count):
            for j in (0, 1) if i == 0 else (i + 1,):
                if j < count:
                    lane.fetch(j, [f"in {j}"])
            its.arrived(i)
            current.did(f"launch {i}")
            lane.bring_back(i, [f"out {i}"])
        its.finish()
        return dict(log)

    return play


def test_copies_and_launches_wait_for_each_other_and_no_longer(happened):
    after = happened(5)
    for i in range(5):
        assert f"in {i}" in after[f"launch {i}"]
        assert f"launch {i}" in after[f"out {i}"]
        assert f"in {i + 1}" not in after[f"launch {i}"], "the next waits for no launch"
        if i > 1:
            assert f"out {i - 2}" in after[f"in {i}"], "into a room that is still taken"
            assert f"out {i - 1}" not in after[f"in {i}"], "two rooms, and one is used"
    assert "before" in after["in 0"]
    assert after["the host waits for back"] >= {f"out {i}" for i in range(5)}
