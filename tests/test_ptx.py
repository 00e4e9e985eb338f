"""The translation of PTX: what operations compute, which accesses are faults, what is refused."""

from __future__ import annotations

import ctypes
import math
import struct

import pytest
import torch

from ptx.build import kernel_library
from ptx.device import device
from ptx.translate import Untranslatable, translate

REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;"


def kernel(name: str, body: str) -> str:
    """A kernel of one argument, an address, which is in ``%rd1``; its index is in ``%r1``."""
    return (
        f".visible .entry {name}(\n\t.param .u64 {name}_param_0\n)\n.maxntid 64, 1, 1\n{{\n"
        f"\t{REGISTERS}\n\t.shared .align 8 .b8 {name}_shared[64];\n"
        f"\tld.param.u64 %rd1, [{name}_param_0];\n\tmov.u32 %r1, %tid.x;\n"
        f"\t{body}\n\tret;\n}}\n"
    )


# --- operations ----------------------------------------------------------------------------------

NAN, INFINITY = math.nan, math.inf
FORMATS = {"f32": "f", "f64": "d", "s16": "h", "s32": "i", "s64": "q", "u16": "H", "u32": "I"}
FORMATS |= {"u64": "Q", "b16": "H", "b32": "I", "b64": "Q", "s8": "b", "u8": "B", "pred": "I"}
LOWEST = -(2**31)
# An operation, the types of its operands and of its result, the operands, and the result.
EXAMPLES = (
    ("add.rn.f32", "f32 f32 f32", (1.0, 2**-24), 1.0),
    ("add.rn.f32", "f32 f32 f32", (1e-45, 1e-45), 2 * 2.0**-149),  # denormals are kept
    ("sub.rn.f32.f16", "b16 f32 f32", (0x3C00, 2.0**-25), 1.0),
    ("mul.rn.f64", "f64 f64 f64", (1 + 2**-30, 1 + 2**-30), 1 + 2**-29),  # without 2^-60
    ("div.rn.f32", "f32 f32 f32", (1.0, 3.0), 0.3333333432674407958984375),
    ("sqrt.rn.f32", "f32 f32", (2.0,), 1.41421353816986083984375),
    ("rcp.rn.f64", "f64 f64", (3.0,), 1 / 3),
    ("neg.f32", "f32 f32", (0.0,), -0.0),
    ("abs.f32", "f32 f32", (-0.0,), 0.0),
    ("add.s32", "s32 s32 s32", (2**31 - 1, 1), LOWEST),
    ("sub.u32", "u32 u32 u32", (0, 1), 2**32 - 1),
    ("mul.lo.s64", "s64 s64 s64", (-3, 5), -15),
    ("mad.lo.s32", "s32 s32 s32 s32", (-3, 5, 1), -14),
    ("mul.wide.s32", "s32 s32 s64", (LOWEST, 4), 4 * LOWEST),
    ("mul.wide.u32", "u32 u32 u64", (2**32 - 1, 8), 8 * (2**32 - 1)),
    ("mul.hi.u32", "u32 u32 u32", (2**32 - 1, 2**31), 2**31 - 1),
    ("mad.wide.s32", "s32 s32 s64 s64", (-2, 2**30, 2**40), 2**40 - 2**31),
    ("div.s32", "s32 s32 s32", (-7, 2), -3),
    ("div.s32", "s32 s32 s32", (LOWEST, -1), LOWEST),
    ("rem.s64", "s64 s64 s64", (-7, 2), -1),
    ("rem.s64", "s64 s64 s64", (7, -1), 0),
    ("min.s64", "s64 s64 s64", (-1, 1), -1),
    ("min.s16x2", "b32 b32 b32", (0xFFFF0001, 0x00010000), 0xFFFF0000),
    ("min.u16x2", "b32 b32 b32", (0xFFFF0001, 0x00010000), 0x00010000),
    ("shl.b32", "b32 u32 b32", (1, 31), 2**31),
    ("shl.b32", "b32 u32 b32", (1, 32), 0),
    ("shr.u32", "u32 u32 u32", (2**31, 32), 0),
    ("shr.u32", "u32 u32 u32", (2**31, 31), 1),
    ("shr.s32", "s32 u32 s32", (-5, 1), -3),
    ("shr.s32", "s32 u32 s32", (-5, 40), -1),
    ("bfe.u32", "u32 u32 u32 u32", (0xABCD, 4, 8), 0xBC),
    ("bfe.u32", "u32 u32 u32 u32", (0xABCD, 0, 32), 0xABCD),
    ("not.b32", "b32 b32", (1,), 2**32 - 2),
    ("xor.b64", "b64 b64 b64", (5, 3), 6),
    ("setp.lt.s32", "s32 s32 pred", (-1, 1), 1),
    ("setp.lt.u32", "s32 s32 pred", (-1, 1), 0),
    ("setp.ne.f32", "f32 f32 pred", (NAN, 1.0), 0),
    ("setp.neu.f32", "f32 f32 pred", (NAN, 1.0), 1),
    ("setp.eq.f16", "b16 b16 pred", (0x8000, 0), 1),
    ("setp.eq.f16", "b16 b16 pred", (0x7E00, 0x7E00), 0),
    ("setp.neu.f16", "b16 b16 pred", (0x7E00, 0x7E00), 1),
    ("setp.ge.f64", "f64 f64 pred", (1.0, 1.0), 1),
    ("setp.geu.f64", "f64 f64 pred", (NAN, 1.0), 1),
    ("cvt.s64.s32", "s32 s64", (-2,), -2),
    ("cvt.u64.u32", "s32 u64", (-2,), 2**32 - 2),
    ("cvt.u32.u64", "u64 u32", (2**32 + 3,), 3),
    ("cvt.rn.f32.f64", "f64 f32", (1 + 2**-24,), 1.0),
    ("cvt.rn.f32.s64", "s64 f32", (2**24 + 1,), 2.0**24),
    ("cvt.rn.f16.f32", "f32 b16", (0.0,), 0),
    ("cvt.rn.f16.f32", "f32 b16", (-INFINITY,), 0xFC00),
    ("cvt.rn.f16.f32", "f32 b16", (2047.0 / 2,), 0x63FF),
    ("cvt.rn.f16.f32", "f32 b16", (1e-45,), 0),
    ("cvt.rn.f16x2.f32", "f32 f32 b32", (1.0, -2.0), 0x3C00C000),
    ("cvt.rn.f16x2.f32", "f32 f32 b32", (2**-25, 65520.0), 0x00007C00),  # a tie, and the largest
    ("cvt.f64.f32", "f32 f64", (1e-45,), 2.0**-149),
    ("cvt.rzi.s64.f32", "f32 s64", (-2.75,), -2),
    ("cvt.rzi.s64.f32", "f32 s64", (INFINITY,), 2**63 - 1),
    ("cvt.rzi.s64.f32", "f32 s64", (-INFINITY,), -(2**63)),
    (
        "add.rn.f32x2",
        "b64 b64 b64",
        (0x3F800000_40000000, 0x3F800000_C0000000),
        0x40000000_00000000,
    ),
)


def example(name: str, opcode: str, types: list[str]) -> str:
    """Loads the operands from 8-byte slots, and stores the result to the next one."""
    lines = []
    sizes = [8 * struct.calcsize(FORMATS[t]) for t in types]
    registers = [f"%{'rd' if size == 64 else 'r'}{i + 2}" for i, size in enumerate(sizes)]
    for i, (t, register) in enumerate(zip(types[:-1], registers, strict=False)):
        lines.append(f"ld.global.{t} {register}, [%rd1+{8 * i}];")
    result = "%p1" if types[-1] == "pred" else registers[-1]
    lines.append(f"{opcode} {result}, {', '.join(registers[:-1])};")
    if types[-1] == "pred":
        lines.append(f"selp.u32 {registers[-1]}, 1, 0, %p1;")
    stored = f"b{sizes[-1]}"
    lines.append(f"st.global.{stored} [%rd1+{8 * (len(types) - 1)}], {registers[-1]};")
    return kernel(name, "\n\t".join(lines))


@pytest.fixture(scope="module")
def examples():
    parts = [example(f"k{i}", op, types.split()) for i, (op, types, *_) in enumerate(EXAMPLES)]
    return device().open(kernel_library("".join(parts)))


@pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=[example[0] for example in EXAMPLES])
def test_an_operation_computes_what_ptx_says(examples, index):
    _, types, operands, expected = EXAMPLES[index]
    formats = [FORMATS[t] for t in types.split()]
    slots = [struct.pack(f, v).ljust(8, b"\0") for f, v in zip(formats, operands, strict=False)]
    memory = ctypes.create_string_buffer(b"".join([*slots, b"\0" * 16]))
    argument = ctypes.c_uint64(ctypes.addressof(memory))
    device().launch(device().find(examples, f"k{index}"), 1, 1, [argument])
    end = struct.calcsize(formats[-1])
    found = memory.raw[8 * len(slots) :][:end]
    assert found == struct.pack(formats[-1], expected), struct.unpack(formats[-1], found)


# --- faults --------------------------------------------------------------------------------------

WRITE = "shl.b32 %r2, %r1, 3; mov.u32 %r3, {0}_shared; add.s32 %r2, %r2, %r3; "
WRITE += "st.shared.u64 [%r2], %rd1; "
IS_FIRST = "setp.eq.s32 %p1, %r1, 0; "
# A kernel for eight threads, and what it is stopped for; nothing: it runs to its end.
BODIES = {
    "aligned": ("ld.global.v4.f32 {{%r2, %r3, %r4, %r5}}, [%rd1];", ""),
    "misaligned": ("ld.global.v4.f32 {{%r2, %r3, %r4, %r5}}, [%rd1+4];", "misaligned: load of 16"),
    "misaligned_store": ("st.global.u64 [%rd1+4], %rd1;", "misaligned: store of 8"),
    "null": ("mov.u64 %rd2, 0; ld.global.u32 %r2, [%rd2+16];", "null: load of 4"),
    "outside": ("ld.global.u32 %r2, [%rd1+64];", "memory that is nobody's"),
    "before": ("ld.global.u32 %r2, [%rd1+-4];", "memory that is nobody's"),
    "last": ("ld.global.u32 %r2, [%rd1+60];", ""),
    "parameter": ("ld.param.u64 %rd2, [{0}_param_0+8];", "out of range: .* parameter"),
    "parameter_before": ("ld.param.u64 %rd2, [{0}_param_0+-8];", "out of range: .* parameter"),
    "parameter_store": ("st.param.u64 [{0}_param_0], %rd1;", "arguments are read only"),
    "shared": (WRITE + "bar.sync 0; ld.shared.u64 %rd2, [{0}_shared+56];", ""),
    "shared_outside": (WRITE + "st.shared.u64 [%r2+64], %rd1;", "out of range: store .* shared"),
    "shared_misaligned": (WRITE + "ld.shared.u64 %rd2, [%r2+4];", "misaligned"),
    "no_barrier": (WRITE + "ld.shared.u64 %rd2, [{0}_shared+56];", "nothing was written"),
    "race": ("st.shared.u64 [{0}_shared], %rd1; bar.sync 0;", "race with another thread"),
    "race_with_a_reader": (
        WRITE + "bar.sync 0; ld.shared.u64 %rd2, [{0}_shared+56]; st.shared.u64 [%r2], %rd1;",
        "race with another thread",
    ),
    "other_barrier": (
        IS_FIRST + "@%p1 bra $L1; bar.sync 0; bra.uni $L2; $L1: bar.sync 0; $L2: mov.u32 %r2, 0;",
        "threads at different barriers, or gone",
    ),
    "gone": (IS_FIRST + "@%p1 ret; bar.sync 0;", "threads at different barriers, or gone"),
}


@pytest.fixture(scope="module")
def bodies():
    text = "".join(kernel(name, body.format(name)) for name, (body, _) in BODIES.items())
    return device().open(kernel_library(text))


@pytest.mark.parametrize("name", BODIES)
def test_an_access_that_is_wrong_is_a_fault_and_none_that_is_right(bodies, name):
    memory = torch.zeros(32)[8:24]
    assert memory.data_ptr() % 16 == 0
    found, argument = device().find(bodies, name), ctypes.c_uint64(memory.data_ptr())
    expected = BODIES[name][1]
    with device().bounded([memory]):
        for _ in range(2):  # a fault leaves nothing behind
            if expected:
                with pytest.raises(RuntimeError, match=rf"{expected}.*, thread \d of block 0 of "):
                    device().launch(found, 2, 8, [argument])
            else:
                device().launch(found, 2, 8, [argument])


def test_more_threads_than_a_kernel_is_made_for_are_refused(bodies):
    with pytest.raises(RuntimeError, match="invalid configuration"):
        device().launch(device().find(bodies, "aligned"), 1, 65, [ctypes.c_uint64(4096)])


# --- what is not translated ----------------------------------------------------------------------

REFUSED = (
    "add.f32 %r2, %r3, %r4",  # it may be contracted
    "mul.f64 %rd2, %rd3, %rd4",
    "fma.rn.f32 %r2, %r3, %r4, %r5",
    "mad.rn.f32 %r2, %r3, %r4, %r5",
    "add.rn.ftz.f32 %r2, %r3, %r4",
    "add.rz.f32 %r2, %r3, %r4",
    "add.rn.sat.f32 %r2, %r3, %r4",
    "setp.lt.ftz.f32 %p1, %r3, %r4",
    "cvt.rn.ftz.f32.f64 %r2, %rd3",
    "cvt.rz.f32.f64 %r2, %rd3",
    "div.approx.f32 %r2, %r3, %r4",
    "div.full.f32 %r2, %r3, %r4",
    "sqrt.approx.f32 %r2, %r3",
    "rsqrt.approx.f32 %r2, %r3",
    "fma.rn.f32x2 %rd2, %rd3, %rd4, %rd5",
    "atom.global.add.u32 %r2, [%rd1], %r3",
    "ld.volatile.global.u32 %r2, [%rd1]",
    "ld.u32 %r2, [%rd1]",
    "ld.local.u32 %r2, [%rd1]",
    "bar.warp.sync -1",
    "bar.sync 1",
    "shfl.sync.up.b32 %r2, %r3, 1, 0, -1",
    "call.uni f",
    "mov.u32 %r2, %clock",
    "mov.u32 %r2, %r77",
    "add.u64 %rd2, %r3, %rd4",  # a narrower register
    "add.u64 %r2, %rd3, %rd4",
    "add.rn.f32 %rd2, %r3, %r4",
    "add.u32 %r2, %r3",
    ".local .align 8 .b8 depot[8]",
)


@pytest.mark.parametrize("instruction", REFUSED)
def test_what_nothing_says_the_meaning_of_is_refused(instruction):
    with pytest.raises(Untranslatable):
        translate(kernel("one", instruction + ";"))


@pytest.mark.parametrize("instruction", ["add.rn.f32 %r2, %r3, %r4", "add.u64 %rd2, %rd3, %rd4"])
def test_what_is_listed_is_translated(instruction):
    assert "+" in translate(kernel("one", instruction + ";")).code
