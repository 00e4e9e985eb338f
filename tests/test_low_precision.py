"""bfloat16 and float16 parameters: what rounding takes is kept, or lost as announced."""

from __future__ import annotations

import pytest
import torch

from helpers import bits
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.state import formats
from ranger_cuda.state.codecs import Split

LOW = [torch.bfloat16, torch.float16]


def master(optimizer, param):
    """The float32 value that a low-precision parameter and its state stand for."""
    format = formats.of(param.dtype)
    return format.param.decode(param.detach(), optimizer.state[param], format.value)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"k": 2, "alpha": 0.3}], ids=str)
def test_exact_rounding_follows_float32_bit_for_bit(dtype, options):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator).to(dtype)
    low, full = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    a, b = Ranger([low], **options), Ranger([full], **options)
    for _ in range(25):
        low.grad = torch.randn(1000, generator=generator).to(dtype)
        full.grad = low.grad.float()
        a.step()
        b.step()
        assert torch.equal(bits(master(a, low)), bits(full))
        nearest = full.detach().to(dtype)  # ties may go the other way, by design
        assert torch.equal(low, nearest) or dtype == torch.bfloat16
        assert ((low - nearest).abs() <= nearest.abs() * torch.finfo(dtype).eps).all()
        for name in ("exp_avg", "exp_avg_sq", "slow_param"):
            assert torch.equal(a.state[low][name], b.state[full][name])


def test_every_float32_is_a_bfloat16_and_a_residual():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int()
    edges = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, -(2**31), 0x7F800000, 0x3F807FFF]
    values = torch.cat([patterns, torch.tensor(edges, dtype=torch.int64).int()])
    values = values.view(torch.float32)
    param = torch.zeros_like(values, dtype=torch.bfloat16)
    state = {"residual": torch.zeros_like(values, dtype=torch.bfloat16)}
    Split().encode(values, param, state, None)
    assert torch.equal(bits(Split().decode(param, state, torch.float32)), bits(values))
    assert torch.equal(param.isnan(), values.isnan())
    ordinary = values.isfinite() & (values.abs() < torch.finfo(torch.bfloat16).max)
    error = (param.float() - values).abs()[ordinary]
    other = (values.to(torch.bfloat16).float() - values).abs()[ordinary]
    assert torch.equal(error, other)  # as near as the nearest


def test_a_residual_of_a_value_that_is_gone_makes_no_nan_of_zero_or_infinity():
    param = torch.tensor([0.0, -0.0, torch.inf, -torch.inf], dtype=torch.bfloat16)
    for residual in (-0x8000, -1, 1, 0x7FFF):
        state = {"residual": torch.full((4,), residual, dtype=torch.int16).view(torch.bfloat16)}
        loaded = Split().decode(param, state, torch.float32)
        assert not loaded.isnan().any(), residual
        assert torch.equal(loaded.to(torch.bfloat16)[:2].abs(), torch.zeros(2, dtype=param.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("build", [RAdam, Ranger])
def test_decoupled_weight_decay_is_not_lost(build, dtype):
    param = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = build([param], lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True)
    param.grad = torch.zeros(4, dtype=dtype)
    for _ in range(1000):
        optimizer.step()
    # 0.905; under Lookahead with k = 6 and alpha = 0.5 each whole cycle keeps half of its decay.
    decay = 1 - 1e-3 * 0.1
    expected = decay**1000 if build is RAdam else (0.5 + 0.5 * decay**6) ** 166 * decay**4
    # Half a unit of bfloat16's last place, and 1,000 roundings of float32.
    assert torch.allclose(param.float(), torch.tensor(expected), rtol=2**-9 + 1000 * 2**-24, atol=0)


def test_nearest_rounding_loses_what_plain_pytorch_loses():
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Ranger([param], lr=1e-3, weight_decay=0.1, weight_rounding="nearest")
    param.grad = torch.zeros(4, dtype=torch.bfloat16)
    for _ in range(100):
        optimizer.step()
    assert torch.equal(param, torch.ones(4, dtype=torch.bfloat16))
    assert "residual" not in optimizer.state[param]


@pytest.mark.parametrize("dtype", LOW)
def test_lookahead_in_low_precision_lands_where_float32_lands(dtype):
    low = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    full = torch.nn.Parameter(torch.ones(4))
    a, b = Ranger([low], lr=1e-4, k=6), Ranger([full], lr=1e-4, k=6)
    for _ in range(600):
        low.grad, full.grad = torch.ones_like(low), torch.ones_like(full)
        a.step()
        b.step()
    assert (full < 0.99).all()  # a cycle goes at most 3e-4: this needs all hundred of them
    assert torch.equal(master(a, low), full)


def test_the_wrapper_keeps_float32_slow_weights_for_bfloat16():
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Lookahead(torch.optim.SGD([param], lr=1.0), k=1, alpha=0.001)
    for _ in range(10):
        param.grad = torch.full_like(param, 0.25)
        optimizer.step()
    slow = optimizer.state[param]["slow_param"]
    assert slow.dtype == torch.float32
    # Each sync moves them by 0.001 * (fast - slow), near 0.001 * 0.25: bfloat16 would stay at 1.
    assert ((1 - slow) > 9 * 0.001 * 0.25 * 0.9).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float16_gradients_survive_where_float32_s_denormals_are_flushed(backend):
    """float16's smallest normal number, 6e-5, is none of float32's concern."""
    param = torch.nn.Parameter(torch.zeros(9, dtype=torch.float16))
    param.grad = torch.full((9,), 3e-5, dtype=torch.float16)
    optimizer = RAdam([param], backend=backend)
    try:
        torch.set_flush_denormal(True)
        optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    assert (optimizer.state[param]["exp_avg"] > 2.9e-6).all()
