"""State in few bits: what is behind it, what becomes of it on loading, and what a step takes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import assert_same
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.backends import reference
from ranger_cuda.state import formats
from test_format_parity import NEW, arguments

BY_NAME = {format.name: format for format in formats.FORMATS}
SHAPE = (70, 64)  # 8 bits have their least
# The largest relative error of a number in each, if it is not far below its group's largest.
PRECISION = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, "8bit": 2.0**-4}


def param_of(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype))


def train(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", NEW)
def test_a_resumed_run_has_the_same_bits(name):
    format = BY_NAME[name]
    a, b = param_of(format.param.dtype), param_of(format.param.dtype)
    options = {"k": 3, "seed": 3, **arguments(format)}
    first = Ranger([a], **options)
    train(first, [a], range(4))
    b.data.copy_(a)
    second = Ranger([b], **options | {"seed": 99})  # which a checkpoint knows better
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(first, second, [a], [b], "loaded")
    train(first, [a], range(4, 8))
    train(second, [b], range(4, 8))
    assert_same(first, second, [a], [b], "and trained")


@pytest.mark.parametrize("to", formats.STATE_DTYPES, ids=str)
@pytest.mark.parametrize("of", formats.STATE_DTYPES, ids=str)
def test_moments_are_converted_on_loading(of, to):
    a, b = param_of(torch.float32), param_of(torch.float32)
    first, second = Ranger([a], state_dtype=of), Ranger([b], state_dtype=to)
    train(first, [a], range(5))
    b.data.copy_(a)
    second.load_state_dict(first.state_dict())
    before, after = first.decoded_state(a), second.decoded_state(b)
    error = PRECISION[to] if of != to else 0.0
    for stream in ("exp_avg", "exp_avg_sq"):
        tolerance = 2 * error if stream == "exp_avg_sq" else error  # which is a root's square
        largest = before[stream].abs().max()
        torch.testing.assert_close(
            after[stream], before[stream], rtol=tolerance, atol=float(largest) * error / 32
        )
    assert torch.equal(after["slow_param"], before["slow_param"])
    train(second, [b], range(5, 7))


@pytest.mark.parametrize("to", formats.WEIGHT_ROUNDINGS)
@pytest.mark.parametrize("of", formats.WEIGHT_ROUNDINGS)
def test_another_rounding_takes_what_it_can_of_a_master(of, to):
    """A group's rounding may be changed before its state is loaded anew."""
    param = param_of(torch.bfloat16)
    optimizer = Ranger([param], weight_rounding=of, k=2)
    train(optimizer, [param], range(5))
    before = optimizer.decoded_state(param)
    optimizer.param_groups[0]["weight_rounding"] = to
    optimizer.load_state_dict(optimizer.state_dict())
    after = optimizer.decoded_state(param)
    places = {"exact": 24, "stochastic24": 16, "stochastic": 8, "nearest": 8}
    kept = min(places[of], places[to])
    for stream, its in (("param", kept), ("slow_param", 8 if to == "stochastic" else kept)):
        torch.testing.assert_close(after[stream], before[stream], rtol=2.0**-its, atol=0)
    assert torch.equal(after["exp_avg"], before["exp_avg"])
    train(optimizer, [param], range(5, 7))


def test_another_rounding_without_loading_is_an_error_that_says_so():
    param = param_of(torch.bfloat16)
    optimizer = Ranger([param])
    train(optimizer, [param], range(2))
    optimizer.param_groups[0]["weight_rounding"] = "stochastic24"
    with pytest.raises(
        RuntimeError, match=r"'residual'.*load_state_dict\(optimizer\.state_dict\(\)"
    ):
        optimizer.step()


def test_8_bit_moments_without_their_scales_are_refused():
    param = param_of(torch.float32)
    optimizer = Ranger([param], state_dtype="8bit")
    train(optimizer, [param], range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match=r"8-bit moments but no 'exp_avg_scale'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoded_state_is_that_of_float32(dtype):
    low, full = param_of(dtype), torch.nn.Parameter(param_of(dtype).detach().float())
    a, b = Ranger([low], k=2), Ranger([full], k=2)
    train(a, [low], range(5))
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        full.grad = torch.randn(SHAPE, generator=generator).to(dtype).float()
        b.step()
    mine, its = a.decoded_state(low), b.decoded_state(full)
    assert mine.keys() == its.keys() == {"param", "exp_avg", "exp_avg_sq", "slow_param"}
    for stream, value in its.items():
        assert torch.equal(mine[stream], value), stream


def test_decoded_state_says_what_it_is_not_of():
    param, other = param_of(torch.float32), param_of(torch.float32)
    optimizer = RAdam([param])
    with pytest.raises(ValueError, match="no state yet"):
        optimizer.decoded_state(param)
    with pytest.raises(ValueError, match="a parameter of this optimizer"):
        optimizer.decoded_state(other)


def test_random_bits_are_of_the_seed_and_of_the_parameter_s_place():
    def run(seed, count=1, place=0, late=False):
        params = [param_of(torch.bfloat16) for _ in range(count)]
        first = params[:1] if late else params
        optimizer = Ranger(first, weight_rounding="stochastic", seed=seed)
        if late:
            optimizer.add_param_group({"params": params[1:]})
        train(optimizer, params, range(3))
        return params[place]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1), run(1, count=2))
    assert torch.equal(run(1), run(1, count=2, late=True))
    assert not torch.equal(run(1), run(1, count=2, place=1))


def test_float16_with_24_bits_and_seeds_that_do_not_fit_are_refused():
    optimizer = Ranger([param_of(torch.float16)], weight_rounding="stochastic24")
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(SHAPE, dtype=torch.float16)
    with pytest.raises(ValueError, match="'stochastic24' is for bfloat16"):
        optimizer.step()
    with pytest.raises(ValueError, match="Invalid seed"):
        Ranger([param_of(torch.float32)], seed=2**63)


class Sizes(TorchDispatchMode):
    """The largest memory of a tensor that is made in the context, in elements."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if isinstance(made, torch.Tensor):
            storage = made.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.largest = max(self.largest, storage.nbytes() // made.element_size())
        return made


@pytest.mark.parametrize("rounding", ["exact", "stochastic24"])
def test_a_step_of_the_reference_takes_memory_for_a_piece(rounding, monkeypatch):
    monkeypatch.setattr(reference, "PIECE", 1024)
    param = param_of(torch.bfloat16)
    optimizer = Ranger(
        [param], backend="reference", weight_rounding=rounding, state_dtype="8bit", k=2
    )
    train(optimizer, [param], range(1))
    known = [param, param.grad, *optimizer.state[param].values()]
    with Sizes(known) as sizes:
        optimizer.step()
    assert 0 < sizes.largest <= 1024


def test_lookahead_around_an_optimizer_of_ours_is_ranger_in_exact_rounding():
    for state_dtype in formats.STATE_DTYPES:
        a, b = param_of(torch.bfloat16), param_of(torch.bfloat16)
        ranger = Ranger([a], k=2, state_dtype=state_dtype, betas=(0.9, 0.999), eps=1e-8)
        inner = RAdam([b], state_dtype=state_dtype, decoupled_weight_decay=True)
        lookahead = Lookahead(inner, k=2)
        train(ranger, [a], range(5))
        train(lookahead, [b], range(5))
        assert torch.equal(a, b)
        for name, value in ranger.state[a].items():
            assert torch.equal(
                value.view(-1).view(torch.uint8),
                lookahead.state[b][name].view(-1).view(torch.uint8),
            ), name


def test_state_that_is_none_of_ours_is_left_alone(monkeypatch):
    """An inner optimizer may keep what has no elements side by side."""
    monkeypatch.setattr(reference, "PIECE", 1024)
    param = param_of(torch.float32)
    optimizer = Lookahead(torch.optim.SGD([param], lr=0.1), k=1, backend="reference")
    optimizer.state[param]["mask"] = torch.eye(3).to_sparse()
    train(optimizer, [param], range(2))
    assert torch.equal(optimizer.state[param]["mask"].to_dense(), torch.eye(3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_sign_of_a_nan_is_in_no_code(backend):
    """Which it is depends on the order of operands, and what is stored is compared by bits."""
    codes = []
    for sign in (1.0, -1.0):
        param = torch.nn.Parameter(torch.zeros(4096))
        param.grad = torch.full((4096,), math.copysign(math.nan, sign))
        optimizer = RAdam([param], backend=backend, state_dtype="8bit")
        optimizer.step()
        codes.append(optimizer.state[param]["exp_avg"].clone())
    assert torch.equal(*codes)
    assert (codes[0] == 2).all()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_every_code_of_a_group_that_is_not_finite_means_the_same_everywhere(name):
    """Codes that nobody writes, too."""
    after = []
    for backend in ("cpu", "reference"):
        param = torch.nn.Parameter(torch.zeros(256 * 32))
        optimizer = RAdam([param], backend=backend, state_dtype="8bit", lr=0.0)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        state = optimizer.state[param]
        state[name].copy_(torch.arange(256, dtype=torch.uint8).repeat_interleave(32))
        state[f"{name}_scale"].fill_(255)
        optimizer.step()
        after.append([value.clone() for value in state.values()])
    for mine, its in zip(*after, strict=True):
        assert torch.equal(mine, its)
