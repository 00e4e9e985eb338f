"""The table of formats: its twin in C++, and what is read from it."""

from __future__ import annotations

import pytest
import torch

from ranger_cuda import _C, Ranger
from ranger_cuda.state import formats
from ranger_cuda.state.formats import FORMATS
from ranger_cuda.step.algorithms import RANGER


def text(dtype):
    return str(dtype).removeprefix("torch.")


def test_the_tables_in_python_and_in_cpp_have_the_same_rows():
    rows = [(f.name, text(f.value), *(codec.name for codec in f.codecs())) for f in FORMATS]
    assert sorted(_C.formats()) == sorted(rows)


def test_codecs_in_python_and_in_cpp_store_the_same():
    codecs = {codec.name: codec for format in FORMATS for codec in format.codecs()}
    rows = [
        (
            name,
            text(codec.dtype),
            text(codec.rest[0].dtype) if codec.rest else None,
            codec.is_random,
            codec.is_grouped,
        )
        for name, codec in codecs.items()
    ]
    assert sorted(_C.codecs()) == sorted(rows)


def test_every_dtype_has_one_format_for_what_may_be_asked():
    for dtype in formats.dtypes():
        if dtype.is_complex:
            continue  # whose moments are numbers
        for rounding in formats.WEIGHT_ROUNDINGS:
            for state_dtype in formats.STATE_DTYPES:
                fits = [
                    f
                    for f in FORMATS
                    if f.param.dtype == dtype
                    and f.weight_rounding in (None, rounding)
                    and f.state_dtype in (None, state_dtype)
                ]
                if dtype == torch.float16 and rounding == "stochastic24":
                    assert not fits
                else:
                    assert fits == [formats.of(dtype, rounding, state_dtype)]


def test_a_dtype_without_a_format_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no format for parameters of torch\.int32.*bfloat16"):
        formats.of(torch.int32)


ASKED = [
    (dtype, rounding, state_dtype)
    for dtype in formats.dtypes()
    for rounding in formats.WEIGHT_ROUNDINGS
    for state_dtype in formats.STATE_DTYPES
    if (dtype, rounding) != (torch.float16, "stochastic24")
]


@pytest.mark.parametrize("shape", [(65, 64), (4100,), (3, 2)])
@pytest.mark.parametrize(("dtype", "rounding", "state_dtype"), ASKED, ids=str)
def test_state_is_what_the_table_says(dtype, rounding, state_dtype, shape):
    param = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = Ranger(
        [param], weight_rounding=rounding, state_dtype=state_dtype, backend="reference"
    )
    optimizer.step()
    state = optimizer.state[param]
    parts = formats.of_param(param, rounding, state_dtype).parts(RANGER.streams_of({}))
    assert state.keys() == {"step", *(part.name for part in parts)}
    for part in parts:
        assert state[part.name].dtype == part.dtype_for(param), part
        shape = part.shape_for(param.shape)
        assert state[part.name].shape == shape, part
        assert not part.is_grouped or len(shape) == param.dim(), "a scale for 32 elements of a row"
    narrow = state_dtype == "8bit" and param.numel() >= 4096 and not dtype.is_complex
    assert ("exp_avg_scale" in state) == (narrow and dtype != torch.float64)
    # What collectives carry: NCCL and gloo have no 16-bit integers.
    carried = {torch.uint8, torch.int8, *formats.dtypes()}
    assert {value.dtype for value in state.values()} <= carried
