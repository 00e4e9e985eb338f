"""Moments and weights of few bits learn as float32 does: nothing stalls, nothing vanishes.

Updates below half a unit of the last place are what rounding to nearest loses, whatever their
number. Here they arrive on average. Backends return the same bits, so the long runs are for the
fast one only. ``docs/studies/eight_bit`` measures other codes and optimizers by the same.
"""

from __future__ import annotations

import pytest
import torch

from ranger_cuda import RAdam, Ranger
from ranger_cuda.backends import reference
from ranger_cuda.state import codecs, formats
from ranger_cuda.state.random_bits import Bits

BACKENDS = ["reference", "cpu"]
LOW = [torch.bfloat16, "8bit"]
BETAS2 = [0.95, 0.99, 0.999, 0.9999]
COUNT = 4096
NEVER = 1e9  # rho_threshold: without rectification, constant gradients of 1 move weights by lr
RUNS = [
    (backend, beta2)
    for backend in BACKENDS
    for beta2 in BETAS2
    if backend == "cpu" or beta2 < 0.999
]


@pytest.fixture(autouse=True)
def one_thread():
    """Two that wait for each other take long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rms(v, beta2):
    """The gradient that makes v of 0."""
    return (v / (1 - beta2)).sqrt()


def steady(beta2, count=COUNT):
    """v as many normal gradients leave it: a gamma distribution of its mean and variance."""
    torch.manual_seed(0)
    shape = (1 + beta2) / (2 * (1 - beta2))
    return torch.distributions.Gamma(shape, shape).sample((count,))


class Run:
    """A parameter that stays where it is, for its v."""

    def __init__(self, backend, state_dtype, beta2, first):
        self.param = torch.nn.Parameter(torch.ones_like(first))
        options = {"betas": (0.9, beta2), "backend": backend, "state_dtype": state_dtype}
        self.optimizer = RAdam([self.param], 0.0, **options)
        self.state_dtype = state_dtype
        self.step(first)

    def step(self, gradient):
        self.param.grad = gradient
        self.optimizer.step()

    def v(self):
        state = self.optimizer.state[self.param]
        codec = formats.of_param(self.param, "exact", self.state_dtype).exp_avg_sq
        flat = {name: value.flatten() for name, value in state.items()}
        return codec.decode(flat["exp_avg_sq"], flat, torch.float32)


def decay(backend, state_dtype, beta2):
    """v after 3 time constants without gradients, over what is due."""
    run = Run(backend, state_dtype, beta2, rms(steady(beta2), beta2))
    start, nothing = run.v().mean(), torch.zeros(COUNT)
    steps = round(3 / (1 - beta2))
    for _ in range(steps):
        run.step(nothing)
    return float(run.v().mean() / start) / beta2**steps


@pytest.mark.parametrize("state_dtype", LOW)
@pytest.mark.parametrize(("backend", "beta2"), RUNS)
def test_v_decays_without_gradients(backend, beta2, state_dtype):
    assert decay(backend, state_dtype, beta2) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("state_dtype", LOW)
def test_v_decays_beside_an_element_that_keeps_its_scale(state_dtype):
    beta2 = 0.999
    goes_on = torch.arange(COUNT) % codecs.GROUP == 0
    run = Run("cpu", state_dtype, beta2, rms(torch.ones(COUNT), beta2))
    steps = round(3 / (1 - beta2))
    for _ in range(steps):
        run.step(goes_on.float())
    assert float(run.v()[~goes_on].mean()) / beta2**steps == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("state_dtype", LOW)
@pytest.mark.parametrize(("backend", "beta2"), RUNS)
def test_v_is_right_on_average_under_normal_gradients(backend, beta2, state_dtype):
    generator = torch.Generator().manual_seed(0)
    run = Run(backend, state_dtype, beta2, rms(steady(beta2), beta2))
    exact, found, due = run.v(), 0.0, 0.0
    steps = round(1 / (1 - beta2))
    for step in range(steps):
        gradient = torch.randn(COUNT, generator=generator)
        run.step(gradient)
        exact = beta2 * exact + (1 - beta2) * gradient * gradient
        if step >= steps // 2 and step % max(1, steps // 50) == 0:
            found += float(run.v().mean())
            due += float(exact.mean())
    assert found / due == pytest.approx(1, abs=0.02)


def tiny(backend, state_dtype, beta2=0.999):
    """v after 300 steps of gradients of 1e-8, and float32's."""
    generator = torch.Generator().manual_seed(0)
    gradients = 1e-8 * torch.randn(300, COUNT, generator=generator)
    run, exact = Run(backend, state_dtype, beta2, gradients[0]), torch.zeros(COUNT)
    for gradient in gradients[1:]:
        run.step(gradient)
    for gradient in gradients:
        exact = beta2 * exact + (1 - beta2) * gradient * gradient
    return run.v(), exact


@pytest.mark.parametrize("state_dtype", LOW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_v_of_gradients_of_1e_8_does_not_vanish(backend, state_dtype):
    v, exact = tiny(backend, state_dtype)
    assert (v > 0).all()
    assert float(v.mean() / exact.mean()) == pytest.approx(1, abs=0.05)


def way(backend, rounding, state_dtype, count=COUNT):
    """How far 200 updates of 1e-5 move weights in [1, 2), over float32's way."""
    moved = []
    start = torch.linspace(1.01, 1.99, count).bfloat16()
    for param in (start.clone(), start.float()):
        param = torch.nn.Parameter(param)
        options = {"backend": backend, "weight_rounding": rounding, "rho_threshold": NEVER}
        low = param.dtype == torch.bfloat16
        options |= {"state_dtype": state_dtype if low else torch.float32}
        optimizer = Ranger([param], 1e-5, **options)
        param.grad = torch.ones_like(param)
        for _ in range(200):
            optimizer.step()
        codec = formats.of(param.dtype, rounding).param
        end = codec.decode(param.detach(), optimizer.state[param], torch.float32)
        moved.append(float((start.double() - end.double()).mean()))
    assert moved[1] == pytest.approx(1e-3, rel=0.02)  # Lookahead's half of 200 * 1e-5
    return moved[0] / moved[1]


@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"])
@pytest.mark.parametrize("rounding", ["stochastic24", "stochastic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_updates_move_weights_of_few_bits(backend, rounding, state_dtype):
    # Each 2^-7 that a bfloat16 takes is a coin that falls rarely: it needs many for an average.
    many = COUNT if rounding == "stochastic24" else 4 * COUNT
    assert way(backend, rounding, state_dtype, many) == pytest.approx(1, abs=0.05)


# --- what the tests above are for: each finds what it is meant to find ----------------------------


@pytest.fixture
def nearest(monkeypatch):
    """Rounding that is not stochastic, in the reference."""

    def half(row, keys, begin, param):
        return Bits(*(torch.full((param.numel(),), 0x7FFF, dtype=torch.int32),) * 3)

    monkeypatch.setattr(reference, "bits_of", half)


@pytest.mark.usefixtures("nearest")
@pytest.mark.parametrize("state_dtype", LOW)
def test_nearest_rounding_freezes_v(state_dtype):
    assert decay("reference", state_dtype, 0.99) > (15 if state_dtype == "8bit" else 1.05)


@pytest.mark.usefixtures("nearest")
@pytest.mark.parametrize("rounding", ["stochastic24", "stochastic"])
def test_nearest_rounding_loses_small_updates(rounding):
    assert way("reference", rounding, torch.float32) == 0


def test_a_scale_with_the_range_of_float16_loses_gradients_of_1e_8(monkeypatch):
    scales = codecs.Grouped.scales
    least = 127 - 24  # float16's smallest power of two
    monkeypatch.setattr(codecs.Grouped, "scales", lambda *a: scales(*a).clamp(min=least))
    v, exact = tiny("reference", "8bit")
    assert float(v.mean() / exact.mean()) != pytest.approx(1, abs=0.5)
