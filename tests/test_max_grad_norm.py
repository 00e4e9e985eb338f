"""``max_grad_norm``: clipping by total norm within the step."""

from __future__ import annotations

import pytest
import torch

from optimizer_infos import bytes_of, random_params, ranger, same, set_grads
from ranger_cuda import RAdam

each_class = pytest.mark.parametrize("cls", [RAdam, ranger], ids=["RAdam", "Ranger"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("limit", [0.1, 3.0, 1e6])
@each_class
def test_max_grad_norm_clips_as_clip_grad_norm_does(cls, limit, dtype):
    params = random_params((20, 3), (7,), (), dtype=dtype)
    others = random_params((20, 3), (7,), (), dtype=dtype)
    inside, outside = cls(params, max_grad_norm=limit), cls(others)
    set_grads(params, 0)
    set_grads(others, 0)
    before = [bytes_of(p.grad) for p in params]
    torch.nn.utils.clip_grad_norm_(others, limit)
    inside.step()
    outside.step()
    assert [bytes_of(p.grad) for p in params] == before
    # Both take the same norm. The factor then differs by torch's two roundings and our one, the
    # clipped gradient by one rounding each; squaring doubles that, and each moment rounds two
    # (three) times. A first step moves by lr * g, rounded three times, and rounds the result.
    unit = torch.finfo(dtype).eps / 2
    for p, q in zip(params, others, strict=True):
        m, n = inside.state[p]["exp_avg"], outside.state[q]["exp_avg"]
        v, w = inside.state[p]["exp_avg_sq"], outside.state[q]["exp_avg_sq"]
        parts = [(m, n), (v, w)]
        if dtype.is_complex:  # the bound holds for each real number
            parts = [(torch.view_as_real(a), torch.view_as_real(b)) for a, b in parts]
        (m, n), (v, w) = parts
        assert ((m - n).abs() <= 8 * unit * n.abs()).all()
        assert ((v - w).abs() <= 16 * unit * w.abs()).all()
        moved = 1e-3 * q.grad.abs().max()
        assert ((p - q).abs() <= 14 * unit * moved + 2 * unit * q.abs()).all()


@each_class
def test_max_grad_norm_takes_the_norm_over_all_groups_and_each_group_its_limit(cls):
    params = random_params((3,), (3,), (3,))
    limits = (0.5, 2.0, None)
    optimizer = cls(
        [{"params": [p], "max_grad_norm": n} for p, n in zip(params, limits, strict=True)]
    )
    for param in params:
        param.grad = torch.tensor([2.0, 2.0, 1.0])  # norm 3; over all three: sqrt(27)
    optimizer.step()
    for param, limit in zip(params, limits, strict=True):
        factor = 1.0 if limit is None else limit / (27**0.5 + 1e-6)
        expected = (1 - optimizer.defaults["betas"][0]) * factor * param.grad.double()
        # The norm's square root and sums, the factor, its products with g and 1 - beta1.
        bound = 10 * 2.0**-24 * expected.abs()
        assert ((optimizer.state[param]["exp_avg"] - expected).abs() <= bound).all()


@each_class
def test_a_norm_that_is_nan_or_infinite_is_not_hidden(cls):
    for bad in (float("nan"), float("inf")):
        hit, other = random_params((3,), (3,))
        optimizer = cls([hit, other], max_grad_norm=1.0)
        set_grads([hit, other], 0)
        clipped = [hit.grad.clone(), other.grad.clone()]
        hit.grad[0] = clipped[0][0] = bad
        optimizer.step()
        factor = 1.0 / torch.tensor(bad)  # 0 for an infinite norm, as clip_grad_norm_ has it
        assert same(hit.isnan(), (clipped[0] * factor).isnan())
        assert same(other.isnan(), (clipped[1] * factor).isnan())


@each_class
def test_the_norm_is_over_gradients_of_all_dtypes(cls):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    params = [random_params((4,), dtype=dtype)[0] for dtype in dtypes]
    optimizer = cls(params, max_grad_norm=1.0)
    for param in params:  # each of norm 2, exactly in every dtype; sqrt(20) over all
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param in params:
        expected = (1 - optimizer.defaults["betas"][0]) / (20**0.5 + 1e-6)
        # Five exact norms; the square root of their sum of squares, the factor, two products.
        assert (
            (optimizer.state[param]["exp_avg"] - expected).abs() <= 5 * 2.0**-24 * expected
        ).all()


@each_class
def test_parameters_without_a_gradient_do_not_count(cls):
    (param, idle), (alone,) = random_params((3,), (3,)), random_params((3,))
    optimizer, other = cls([param, idle], max_grad_norm=0.1), cls([alone], max_grad_norm=0.1)
    for step in range(4):
        set_grads([param], step)
        set_grads([alone], step)
        optimizer.step()
        other.step()
        assert bytes_of(param) == bytes_of(alone)
    assert idle not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_low_precision_gradients_does_not_overflow(dtype):
    (param,) = random_params((1000,), dtype=dtype)
    optimizer = RAdam([param], max_grad_norm=1.0)
    param.grad = torch.full((1000,), 3276.0, dtype=dtype)  # finite; their float16 norm is not
    optimizer.step()
    expected = 0.1 * 3276.0 / (3276.0**2 * 1000) ** 0.5
    assert torch.allclose(
        optimizer.state[param]["exp_avg"], torch.full((1000,), expected), rtol=1e-2
    )
