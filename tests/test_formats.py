"""The table of formats: its twin in C++, and what is read from it."""

from __future__ import annotations

import pytest
import torch

from ranger_cuda import _C, Ranger
from ranger_cuda.state import formats
from ranger_cuda.state.formats import FORMATS


def text(dtype):
    return str(dtype).removeprefix("torch.")


def test_the_tables_in_python_and_in_cpp_have_the_same_rows():
    native = [format for format in FORMATS if format.native]
    rows = [(f.name, *map(text, (f.value, *(codec.dtype for codec in f[2:6])))) for f in native]
    assert sorted(_C.formats()) == sorted(rows)


def test_every_dtype_has_one_format_for_what_may_be_asked():
    for dtype in formats.dtypes():
        for rounding in formats.WEIGHT_ROUNDINGS:
            for state_dtype in formats.STATE_DTYPES:
                fits = [
                    f
                    for f in FORMATS
                    if f.param.dtype == formats.real(dtype)
                    and f.weight_rounding in (None, rounding)
                    and f.state_dtype in (None, state_dtype)
                ]
                assert fits == [formats.of(dtype, rounding, state_dtype)]


def test_a_dtype_without_a_format_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no format for parameters of torch\.int32.*bfloat16"):
        formats.of(torch.int32)


@pytest.mark.parametrize("dtype", formats.dtypes())
@pytest.mark.parametrize("rounding", formats.WEIGHT_ROUNDINGS)
def test_state_is_what_the_table_says(dtype, rounding):
    param = torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = Ranger([param], weight_rounding=rounding, backend="reference")
    optimizer.step()
    state = optimizer.state[param]
    parts = formats.of(dtype, rounding).parts()
    assert state.keys() == {"step", *(part.name for part in parts)}
    for part in parts:
        assert state[part.name].dtype == part.dtype_for(param), part
        assert state[part.name].shape == param.shape, part
