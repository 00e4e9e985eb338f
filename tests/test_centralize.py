"""Gradient centralization: which gradients, by which means, and what has none."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from helpers import assert_same, assert_same_bits, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.backends.reference import LANES

OPTIMIZERS = [RAdam, Ranger]
BACKENDS = ["cpu", "reference"]
SHAPES = [(), (7,), (5, 4), (3, 2, 2), (6, 3, 3, 3), (2, 3, 2, 2, 2)]
CENTRALIZED = {None: 0, "conv": 2, "all": 4}  # of SHAPES, from the last


def gradients(shapes, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def in_float64(g):
    """As equation (1) of the paper has it."""
    return g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True)


@pytest.mark.parametrize("centralize", CENTRALIZED)
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_step_by_gradients_less_the_means_of_their_slices(backend, cls, centralize):
    made = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    a, b = twins(made)
    options = {"lr": 0.01, "weight_decay": 0.1, "backend": backend}
    ours, plain = cls(a, centralize=centralize, **options), cls(b, **options)
    least = len(SHAPES) - CENTRALIZED[centralize]
    for step in range(14):
        its = gradients(SHAPES, step, torch.float64)
        give_gradients(its, a)
        give_gradients([in_float64(g) if i >= least else g for i, g in enumerate(its)], b)
        ours.step()
        plain.step()
        for p, g in zip(a, its, strict=True):
            assert_same_bits(p.grad, g, "the gradient was written")
    for i, (p, q, start) in enumerate(zip(a, b, made, strict=True)):
        if i < least:
            assert torch.equal(p, q)
        else:
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
            assert not torch.equal(p, start)


@pytest.mark.parametrize(
    "length", [1, 9, 63, 64, 65, 127, 128, 129, 1000, 2048, 2049, 5000, 40_001]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_is_the_sum_of_lanes_folded_in_halves(dtype, length):
    """Written out once more, number by number. With beta1 = 0 the first moment is the gradient."""
    g = torch.randn(3, length, dtype=dtype, generator=torch.Generator().manual_seed(0))
    means = []
    for row in g:
        lanes = [torch.zeros((), dtype=dtype) for _ in range(LANES)]
        for i, value in enumerate(row):
            lanes[i % LANES] = lanes[i % LANES] + value
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [x + y for x, y in zip(lanes[:half], lanes[half:], strict=True)]
        means.append(lanes[0] / torch.tensor(float(length), dtype=dtype))
    wanted = g - torch.stack(means)[:, None]
    for backend in BACKENDS:
        p = Parameter(torch.zeros(3, length, dtype=dtype))
        optimizer = RAdam([p], betas=(0.0, 0.5), centralize="all", backend=backend)
        p.grad = g.clone()
        optimizer.step()
        assert_same_bits(optimizer.state[p]["exp_avg"], wanted, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_the_same_everywhere_moves_nothing(backend):
    p = Parameter(torch.ones(4, 130))
    optimizer = Ranger([p], lr=0.1, centralize="all", backend=backend)
    for _ in range(7):
        p.grad = torch.full((4, 130), 0.5)
        optimizer.step()
    assert (p == 1.0).all()


LAYOUTS = {
    "rows apart": lambda t: torch.stack([t, t], 1)[:, 0],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand_as(t),
    "dense": lambda t: t,
}


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", [name for name in LAYOUTS if name != "expanded"])
def test_in_every_layout_of_parameters_and_gradients(target, of_param, of_grad):
    """Slices of 300 elements are several times a piece of the emulated kernels' chunks."""
    shape = (3, 4, 15, 5) if target.small or target.slow else (9, 40, 15, 5)
    a, b = twins([LAYOUTS[of_param](gradients([shape], 100)[0])], target.move)
    options = {"lr": 0.01, "k": 2, "centralize": "conv"}
    native = Ranger(a, backend=target.backend, **options)
    reference = Ranger(b, backend="reference", **options)
    for step in range(2 if target.small or target.slow else 4):
        its = [LAYOUTS[of_grad](g) for g in gradients([shape], step)]
        give_gradients(its, a, b, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step + 1}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_goes_by_gradients_as_they_come(backend):
    a, b = twins(gradients([(6, 50)], 100))
    options = {"lr": 0.01, "backend": backend}
    ours, plain = RAdam(a, centralize="all", max_grad_norm=0.1, **options), RAdam(b, **options)
    for step in range(7):
        (g,) = gradients([(6, 50)], step)
        g = g + 1.0
        give_gradients([g], a)
        ours.step()
        norm = g.double().norm()
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-12, atol=0.0)
        give_gradients([in_float64(g) * (0.1 / norm).float()], b)
        plain.step()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_each_group_has_its_own_and_it_may_change():
    a, b = (Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = RAdam([{"params": [a], "centralize": "all"}, {"params": [b]}], lr=0.1)
    ones = [torch.ones(2, 3)] * 2
    give_gradients(ones, [a, b])
    optimizer.step()
    assert (a == 1.0).all()
    assert (b < 1.0).all()
    optimizer.param_groups[0]["centralize"] = None
    optimizer.step()
    assert (a < 1.0).all()
    saved = optimizer.state_dict()
    assert "centralize" in saved["param_groups"][0]
    del saved["param_groups"][0]["centralize"]  # as one from before it was there
    other = RAdam([{"params": [a]}, {"params": [b]}], centralize="conv")
    other.load_state_dict(saved)
    assert [group["centralize"] for group in other.param_groups] == ["conv", None]


@pytest.mark.parametrize("value", [True, "convs", 3, 1.5, ("all",), torch.ones(1)])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_another_value_is_refused(cls, value):
    p = Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match="Invalid centralize value"):
        cls([p], centralize=value)
    optimizer = cls([p])
    optimizer.param_groups[0]["centralize"] = value
    p.grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match="Invalid centralize value"):
        optimizer.step()
    assert (p == 1.0).all()
    assert not optimizer.state[p]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_parameters_are_refused_before_anything_moves(backend, stepped):
    p, q = Parameter(torch.ones(2, 3)), Parameter(torch.ones(2, 3, dtype=torch.complex64))
    optimizer = Ranger([p, q], backend=backend)
    give_gradients([torch.randn(2, 3), torch.randn(2, 3, dtype=torch.complex64)], [p, q])
    if stepped:
        optimizer.step()
    before = [p.detach().clone(), q.detach().clone()]
    optimizer.param_groups[0]["centralize"] = "all"
    with pytest.raises(
        RuntimeError, match="does not go with parameter 1 of group 0: it is complex"
    ):
        optimizer.step()
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_parameters_of_too_few_dimensions_are_left_alone(backend):
    """Whose pairs have one more."""
    p, q = (Parameter(torch.ones(5, dtype=torch.complex64)) for _ in range(2))
    ours, plain = RAdam([p], centralize="all", backend=backend), RAdam([q], backend=backend)
    for step in range(3):
        give_gradients(gradients([5], step, torch.complex64), [p], [q])
        ours.step()
        plain.step()
        assert_same_bits(p, q, "complex")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_fsdp1_has_flattened_is_refused_later_too(backend):
    p = Parameter(torch.ones(6))
    optimizer = RAdam([p], backend=backend)
    p.grad = torch.ones(6)
    optimizer.step()
    p._fsdp_flattened = True
    optimizer.param_groups[0]["centralize"] = "conv"
    with pytest.raises(RuntimeError, match="FullyShardedDataParallel keeps it flat"):
        optimizer.step()


def test_it_ends_where_a_parameter_rests(target):
    a, b = twins(gradients([(4, 30), (3, 20)], 100), target.move)
    options = {"lr": 0.01, "centralize": "all"}
    native = RAdam(a, backend=target.backend, **options)
    reference = RAdam(b, backend="reference", **options)
    for step in range(5):
        its = gradients([(4, 30), (3, 20)], step)
        if step in (2, 3):
            its[1] = None
        give_gradients(its, a, b, move=target.move)
        for optimizer in (native, reference):
            optimizer.param_groups[0]["centralize"] = None if step >= 2 else "all"
            optimizer.step()
        assert_same(native, reference, a, b, f"step {step}")


def test_lookahead_around_it_pulls_what_it_moved():
    a, b = twins(gradients([(4, 30)], 100))
    outside = Lookahead(RAdam(a, lr=0.01, betas=(0.95, 0.999), eps=1e-5, centralize="all"))
    inside = Ranger(b, lr=0.01, decoupled_weight_decay=False, centralize="all")
    for step in range(13):
        give_gradients(gradients([(4, 30)], step), a, b)
        outside.step()
        inside.step()
    assert_same_bits(a[0], b[0], "13 steps")
