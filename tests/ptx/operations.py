"""What PTX's operations compute, as C++. What is not listed here is not translated.

Floating-point arithmetic is listed only where it rounds once, to nearest, and keeps denormals: no
``fma``, ``.ftz`` or ``.approx``, and nothing without ``.rn``, which may still be contracted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

FLOATS = ("f32", "f64")
SIGNED = ("s16", "s32", "s64")
UNSIGNED = ("u16", "u32", "u64")
UNTYPED = ("b16", "b32", "b64")
INTEGERS = (*SIGNED, *UNSIGNED)
WIDER = {"s16": "s32", "s32": "s64", "u16": "u32", "u32": "u64"}
SIZES = {"pred": 0} | {
    kind + str(8 * size): size
    for size in (1, 2, 4, 8)
    for kind in "bsuf"
    if (kind, size) != ("f", 1)
}


class Operation(NamedTuple):
    """``{0}``, ``{1}``, … are the operands, of these types."""

    code: str
    operands: tuple[str, ...]
    result: str


def arithmetic() -> Iterator[tuple[str, Operation]]:
    signs = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
    for t in FLOATS:
        for name, sign in signs.items():
            yield f"{name}.rn.{t}", Operation(f"{{0}} {sign} {{1}}", (t, t), t)
        yield f"sqrt.rn.{t}", Operation("std::sqrt({0})", (t,), t)
        yield f"rcp.rn.{t}", Operation("1 / {0}", (t,), t)
        yield f"neg.{t}", Operation("-{0}", (t,), t)
        yield f"abs.{t}", Operation("std::abs({0})", (t,), t)
    for name in ("add", "sub"):
        code = f"from_half({{0}}) {signs[name]} {{1}}"
        yield f"{name}.rn.f32.f16", Operation(code, ("b16", "f32"), "f32")
    for name in ("add", "sub", "mul"):
        code = f"pairwise({{0}}, {{1}}, [](f32 a, f32 b) {{{{ return a {signs[name]} b; }}}})"
        yield f"{name}.rn.f32x2", Operation(code, ("b64", "b64"), "b64")
    for t in INTEGERS:
        for name in ("add", "sub"):
            yield f"{name}.{t}", Operation(f"{{0}} {signs[name]} {{1}}", (t, t), t)
        yield f"mul.lo.{t}", Operation("{0} * {1}", (t, t), t)
        yield f"mad.lo.{t}", Operation("{0} * {1} + {2}", (t, t, t), t)
        yield f"div.{t}", Operation("divide({0}, {1})", (t, t), t)
        yield f"rem.{t}", Operation("remainder({0}, {1})", (t, t), t)
        for name in ("min", "max"):
            yield f"{name}.{t}", Operation(f"std::{name}({{0}}, {{1}})", (t, t), t)
    for name, t in itertools.product(("min", "max"), ("s16", "u16")):
        code = f"half_by_half({{0}}, {{1}}, []({t} a, {t} b) {{{{ return std::{name}(a, b); }}}})"
        yield f"{name}.{t}x2", Operation(code, ("b32", "b32"), "b32")
    for t, w in WIDER.items():
        yield f"mul.wide.{t}", Operation(f"{w}({{0}}) * {w}({{1}})", (t, t), w)
        yield f"mad.wide.{t}", Operation(f"{w}({{0}}) * {w}({{1}}) + {{2}}", (t, t, w), w)
    yield "mul.hi.u32", Operation("u64({0}) * u64({1}) >> 32", ("u32", "u32"), "u32")
    for t in SIGNED:
        yield f"neg.{t}", Operation("-{0}", (t,), t)


def bitwise() -> Iterator[tuple[str, Operation]]:
    for t in UNTYPED:
        yield f"not.{t}", Operation("~{0}", (t,), t)
        yield f"shl.{t}", Operation("shift_left({0}, {1})", (t, "u32"), t)
    for t in (*INTEGERS, *UNTYPED):
        yield f"shr.{t}", Operation("shift_right({0}, {1})", (t, "u32"), t)
    yield "bfe.u32", Operation("extract({0}, {1}, {2})", ("u32", "u32", "u32"), "u32")
    yield "bfi.b64", Operation("insert({0}, {1}, {2}, {3})", ("b64", "b64", "u32", "u32"), "b64")
    yield "prmt.b32", Operation("permute({0}, {1}, {2})", ("b32", "b32", "b32"), "b32")
    yield "not.pred", Operation("!{0}", ("pred",), "pred")
    for t in (*UNTYPED, "pred"):
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            yield f"{name}.{t}", Operation(f"{{0}} {sign} {{1}}", (t, t), t)


def comparisons() -> Iterator[tuple[str, Operation]]:
    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for t in (*INTEGERS, *UNTYPED):
        for name, sign in signs.items():
            yield f"setp.{name}.{t}", Operation(f"{{0}} {sign} {{1}}", (t, t), "pred")
    for t in FLOATS:
        for name, sign in signs.items():
            both, ordered = f"{{0}} {sign} {{1}}", "!std::isunordered({0}, {1})"
            yield f"setp.{name}.{t}", Operation(f"{ordered} && {both}", (t, t), "pred")
            code = f"std::isunordered({{0}}, {{1}}) || {both}"
            yield f"setp.{name}u.{t}", Operation(code, (t, t), "pred")
        yield f"setp.nan.{t}", Operation("std::isunordered({0}, {1})", (t, t), "pred")
        yield f"setp.num.{t}", Operation("!std::isunordered({0}, {1})", (t, t), "pred")
    for name, sign in (("eq", "=="), ("neu", "!=")):
        code = f"from_half({{0}}) {sign} from_half({{1}})"
        yield f"setp.{name}.f16", Operation(code, ("b16", "b16"), "pred")


def moves() -> Iterator[tuple[str, Operation]]:
    for t in (*FLOATS, *INTEGERS, *UNTYPED):
        yield f"mov.{t}", Operation("{0}", (t,), t)
        yield f"selp.{t}", Operation("{2} ? {0} : {1}", (t, t, "pred"), t)
    yield "mov.pred", Operation("{0}", ("pred",), "pred")
    yield "cvta.to.global.u64", Operation("{0}", ("u64",), "u64")


def conversions() -> Iterator[tuple[str, Operation]]:
    integers = (*INTEGERS, "s8", "u8")
    for to in integers:
        for of in integers:
            yield f"cvt.{to}.{of}", Operation(f"static_cast<{to}>({{0}})", (of,), to)
    rounded = [("f32", "f64")] + [(to, of) for to in FLOATS for of in INTEGERS]
    for to, of in rounded:
        yield f"cvt.rn.{to}.{of}", Operation(f"static_cast<{to}>({{0}})", (of,), to)
    for to in FLOATS:
        yield f"cvt.{to}.f16", Operation("from_half({0})", ("b16",), to)
    yield "cvt.rn.f16.f32", Operation("to_half({0})", ("f32",), "b16")
    both = "b32(to_half({0})) << 16 | to_half({1})"
    yield "cvt.rn.f16x2.f32", Operation(both, ("f32", "f32"), "b32")
    yield "cvt.f64.f32", Operation("static_cast<f64>({0})", ("f32",), "f64")
    yield "cvt.rzi.s64.f32", Operation("truncate({0})", ("f32",), "s64")


OPERATIONS: dict[str, Operation] = {
    name: operation
    for listed in (arithmetic(), bitwise(), comparisons(), moves(), conversions())
    for name, operation in listed
}
