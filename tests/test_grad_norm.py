"""The norm of gradients, as the kernels take it, and the steps that are skipped by it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import Parameter

from helpers import assert_same, give_gradients, twins
from ranger_cuda import DiLoCo, Lookahead, RAdam, Ranger
from targets import NAMES, open_target
from test_parity import spread

EVERYWHERE = [name for name in NAMES if name != "interpreted"]


@pytest.fixture
def target(request, monkeypatch):
    return open_target(request.param, monkeypatch)


def exact_norm(gradients):
    """Of gradients of any dtype, by exact sums of squares in float64."""
    there = [torch.view_as_real(g) if g.is_complex() else g for g in gradients if g is not None]
    return math.sqrt(math.fsum(x * x for g in there for x in g.double().flatten().tolist()))


def models(generator, dtype=torch.float32):
    """Tensors of many chunks and of one element, consecutive or not."""
    made = [spread(shape, dtype, generator, 3) for shape in ((1003,), (256,), (2, 130), (20, 30))]
    made += [made[-1].t(), torch.stack([made[0], made[0]], -1)[..., 0], torch.zeros(0), made[1][0]]
    return [tensor.to(dtype) for tensor in made]


@pytest.mark.parametrize(
    "target", [*EVERYWHERE, pytest.param("interpreted", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_the_norm_is_exact_to_float64_and_the_step_the_reference_s(target, dtype):
    generator = torch.Generator().manual_seed(0)
    made = models(generator, dtype)
    a, b = twins(made, target.move)
    options = {"lr": 0.01, "max_grad_norm": 0.5, "k": 2}
    ours = Ranger(a, backend=target.backend, **options)
    reference = Ranger(b, backend="reference", **options)
    for param in (*a, *b):
        param.grad_dtype = None  # any
    for step in range(1 if target.slow else 3):
        gradients = [
            None if (i + step) % 5 == 4 else spread(p.shape, p.dtype, generator, 3)
            for i, p in enumerate(a)
        ]
        give_gradients(gradients, a, b, move=target.move)
        ours.step()
        reference.step()
        expected = exact_norm(gradients)
        for optimizer in (ours, reference):
            assert optimizer.grad_norm.dtype == torch.float64
            assert optimizer.grad_norm.shape == ()
            assert abs(optimizer.grad_norm.item() / expected - 1) < 1e-13
        assert ours.grad_norm.device == a[0].device
        if dtype == torch.float64:  # where the norm's last places show
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert_same(ours, reference, a, b, f"step {step + 1}")


# Triton's kernel for it has shared memory, which tests/ptx does not translate.
@pytest.mark.parametrize(
    "target", ["cpu-2-threads", "emulated", "interpreted", "compiled-cuda-90"], indirect=True
)
def test_the_squares_of_some_parameters_alone(target):
    params = [Parameter(torch.zeros(n)) for n in (3, 300, 1, 40)]
    for value, param in enumerate(params, 1):
        param.grad = torch.full_like(param, float(value))
    optimizer = RAdam([params[1], params[0]], backend=target.backend)
    optimizer.add_param_group({"params": [params[3], params[2]]})
    optimizer.step()
    dispatcher = optimizer._dispatcher
    dispatcher.collect(optimizer.param_groups, optimizer.state, optimizer._new_state)
    for places, expected in ((None, 1852), ({0}, 1200), ({1, 3}, 12), ({2, 0}, 1840)):
        assert sum(dispatcher.squares(places)).item() == expected
    dispatcher.release()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_of_any_dtype_count_as_they_are(backend, dtype):
    p = Parameter(torch.zeros(2000))
    p.grad_dtype = None
    p.grad = torch.linspace(-3, 3, 2000).to(dtype)
    optimizer = RAdam([p], max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert abs(optimizer.grad_norm.item() / exact_norm([p.grad]) - 1) < 1e-7


def test_squares_beyond_float32_are_no_overflow():
    p = Parameter(torch.zeros(4))
    optimizer = RAdam([p], lr=1.0, max_grad_norm=1.0)
    p.grad = torch.full((4,), 1e30)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(2e30, rel=1e-6)
    assert torch.allclose(optimizer.state[p]["exp_avg"], torch.full((4,), 0.05))


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    p = Parameter(torch.zeros(500_000))
    p.grad = spread((500_000,), torch.float32, torch.Generator().manual_seed(0))
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            optimizer = RAdam([p], max_grad_norm=1.0)
            optimizer.step()
            found.add(optimizer.grad_norm.item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("target", ["cpu-2-threads", "emulated", "interpreted"], indirect=True)
def test_a_float64_gradient_of_a_float32_parameter_counts_as_the_step_reads_it(target):
    for backend in (target.backend, "reference"):
        p = Parameter(torch.ones(3))
        p.grad_dtype = None
        p.grad = torch.full((3,), 1e60, dtype=torch.float64)  # infinite in float32
        optimizer = RAdam([p], nonfinite_grad_norm="skip", backend=backend)
        optimizer.step()
        assert optimizer.grad_norm == math.inf
        assert (p == 1.0).all()


def test_the_norm_is_this_step_s_or_none():
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RAdam([p], nonfinite_grad_norm="raise", max_grad_norm=1.0, amp_scaling=True)
    optimizer.step()
    assert optimizer.grad_norm == 3**0.5
    p.grad = torch.full((3,), math.inf)
    with pytest.raises(RuntimeError, match="norm of the gradients is inf"):
        optimizer.step()
    assert optimizer.grad_norm == math.inf
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.grad_norm is None


def test_around_an_optimizer_that_skips_steps_lookahead_is_refused():
    """It would count them."""
    inner = RAdam([Parameter(torch.ones(3))], nonfinite_grad_norm="skip")
    for cls in (Lookahead, DiLoCo):
        with pytest.raises(ValueError, match="would count a step that the inner optimizer skips"):
            cls(inner)


def test_there_is_no_norm_before_one_is_taken():
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    plain = RAdam([p])
    assert plain.grad_norm is None
    plain.step()
    assert plain.grad_norm is None
    clipping = RAdam([p], nonfinite_grad_norm="skip")
    clipping.step()
    assert clipping.grad_norm.item() == pytest.approx(3**0.5, rel=1e-15)


def test_the_norm_is_of_the_loss_s_gradients_under_a_grad_scaler():
    p = Parameter(torch.zeros(4))
    optimizer = RAdam([p], amp_scaling=True, max_grad_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    p.grad = torch.full((4,), 8.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 2.0


@pytest.mark.parametrize("cls", [RAdam, Ranger])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", ["cpu-2-threads", "emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("first", [True, False])
def test_a_step_with_a_norm_that_is_not_finite_is_skipped(target, first, bad, cls):
    a, b = twins([torch.ones(700), torch.ones(3)], target.move)
    options = {"nonfinite_grad_norm": "skip", "backend": target.backend, "lr": 0.1}
    ours, without = cls(a, **options), cls(b, **options)
    good = [torch.full((700,), 0.5), torch.ones(3)]
    if not first:
        give_gradients(good, a, b, move=target.move)
        ours.step()
        without.step()
    spoiled = [good[0].clone(), good[1]]
    spoiled[0][611] = bad
    give_gradients(spoiled, a, move=target.move)
    ours.step()
    assert not ours.grad_norm.isfinite()
    for _ in range(2):
        give_gradients(good, a, b, move=target.move)
        ours.step()
        without.step()
    assert_same(ours, without, a, b, "at the end")


@pytest.mark.parametrize("cls", [RAdam, Ranger])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_or_it_raises_and_changes_nothing(cls, backend, max_grad_norm):
    p = Parameter(torch.ones(3))
    optimizer = cls([p], nonfinite_grad_norm="raise", max_grad_norm=max_grad_norm, backend=backend)
    p.grad = torch.tensor([1.0, math.nan, 1.0])
    with pytest.raises(RuntimeError, match=r"norm of the gradients is nan; nothing has been"):
        optimizer.step()
    assert (p == 1.0).all()
    assert not optimizer.state[p]
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_an_overflow_that_grad_scaler_found_is_not_raised():
    p = Parameter(torch.ones(3))
    optimizer = RAdam([p], amp_scaling=True, nonfinite_grad_norm="raise", backend="reference")
    p.grad = torch.full((3,), math.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert (p == 1.0).all()


@pytest.mark.parametrize("cls", [RAdam, Ranger])
def test_another_way_is_refused(cls):
    with pytest.raises(ValueError, match="Invalid nonfinite_grad_norm value"):
        cls([Parameter(torch.ones(1))], nonfinite_grad_norm="ignore")


def test_copies_go_on_as_they_were_told():
    p = Parameter(torch.ones(3))
    optimizer = copy.deepcopy(RAdam([p], nonfinite_grad_norm="raise"))
    (q,) = optimizer.param_groups[0]["params"]
    q.grad = torch.full((3,), math.nan)
    with pytest.raises(RuntimeError, match="norm of the gradients"):
        optimizer.step()
