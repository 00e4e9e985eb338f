"""The CUDA kernels' source on the CPU, under sanitizers: every byte as a plain loop leaves it.

Then with defects planted, each of which must be found: the check itself is checked.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from emulation.programs import CSRC, EMULATION, compile_object, link, run, why_not

SMALL = [
    "-g1",
    "-DRANGER_EMULATE_CUDA",
    "-DRANGER_CUDA_THREADS=4",
    "-DRANGER_CUDA_CHUNK=64",
    "-DRANGER_CUDA_TIER=4",  # the largest there is
]
# Unoptimised, a sanitizer sees more, and compiling takes a fifth of the time.
BUILDS = {
    "optimised": ["-O1"],
    "plain": ["-O0"],
    "address": ["-O0", "-fsanitize=address"],
    "undefined": ["-O0", "-fsanitize=undefined,bounds-strict", "-fno-sanitize-recover=all"],
    "thread": ["-O0", "-fsanitize=thread"],
}
BRIEF = {"thread": ["brief"]}  # locks, which the emulation is made of, take long there
CHECK, LAUNCH, GEOMETRY = (
    EMULATION / "check_kernels.cpp",
    CSRC / "cuda/launch.cu",
    CSRC / "cuda/geometry.cpp",
)


class Defect(NamedTuple):
    """A text of csrc/cuda/, what to put in its place, and which build then says what."""

    file: str
    text: str
    instead: str
    build: str
    evidence: str


DIFFERS = r"step \d+, after the .*, row \d+ .* is -?\d+, not -?\d+"
OVERRUN = "AddressSanitizer: (heap|stack)-"
CONTEXT = "another context is current than before"
ANYTHING = ""  # it may crash before anything is compared
MISALIGNED = "runtime error: .* misaligned address"

DEFECTS = {
    "packs_too_many": Defect(
        "kernels.h",
        "count / kWidth * kWidth",
        "(count + kWidth - 1) / kWidth * kWidth",
        "address",
        OVERRUN,
    ),
    "packs_behind_the_end": Defect(
        "kernels.h", "if (i >= end) continue;\n    p[n]", "p[n]", "address", OVERRUN
    ),
    "stores_behind_the_end": Defect(
        "kernels.h", "if (i >= end) continue;\n    s.p.store", "s.p.store", "address", OVERRUN
    ),
    "tail_too_short": Defect(
        "kernels.h",
        "if (packed + thread.index() < count)",
        "if (packed + thread.index() < count - 1)",
        "plain",
        DIFFERS,
    ),
    "load_behind_a_store_of_the_same_element": Defect(
        "kernels.h",
        "    p[n] = s.p.template",
        "    s.p.store(i, p[n]);\n    p[n] = s.p.template",
        "plain",
        DIFFERS,
    ),
    "chunk_beyond_its_row": Defect(
        "kernels.h", "rest < kChunkSize ? rest : kChunkSize", "kChunkSize", "address", OVERRUN
    ),
    "no_barrier": Defect(
        "kernels.h", "thread.barrier();", "", "thread", "data race|ThreadSanitizer: SEGV"
    ),
    "gradients_of_the_first_launch": Defect(
        "kernels.h",
        "* kGroupWords + i]",
        "* kGroupWords + header.first_row + i]",
        "plain",
        ANYTHING,
    ),
    "gradient_of_the_next_row": Defect(
        "kernels.h", "* kGroupWords + i]", "* kGroupWords + i + 1]", "plain", ANYTHING
    ),
    "step_in_spite_of_found_inf": Defect(
        "kernels.h", "if (grad == 0 || skipped) {", "if (grad == 0) {", "plain", DIFFERS
    ),
    "sync_in_spite_of_found_inf": Defect(
        "kernels.h",
        "scalars.flags = 0;",
        "scalars.flags = grad != 0 && row.data[kSlowParam] != nullptr ? kSync : 0;",
        "plain",
        DIFFERS,
    ),
    "strides_of_another_stream": Defect(
        "memory.h",
        "sizes + ndim * (1 + tensor)",
        "sizes + ndim * (1 + (tensor ^ 1))",
        "plain",
        ANYTHING,
    ),
    "misaligned_stream_read_wide": Defect(
        "memory.h",
        "if (aligned_) {\n      pack",
        "if (true) {\n      pack",
        "undefined",
        MISALIGNED,
    ),
    "misaligned_stream_written_wide": Defect(
        "memory.h", "if (aligned_) {\n      *", "if (true) {\n      *", "undefined", MISALIGNED
    ),
    "gradients_all_of_one_dtype": Defect(
        "memory.h",
        "if (dtype_ == kDTypeOf<Value>) return as",
        "return as",
        "plain",
        ANYTHING,
    ),
    "group_of_the_first_launch": Defect(
        "kernels.h", "(row.group - header.first_group)", "row.group", "plain", ANYTHING
    ),
    "tier_too_small": Defect(
        "launch.cu",
        "words > kScheduleTiers[kTier]",
        "words > kScheduleTiers[kTier] + 10",
        "address",
        OVERRUN,
    ),
    "too_many_rows_for_a_schedule": Defect(
        "geometry.cpp", "with.words() <= words", "with.words() <= words + 10", "address", OVERRUN
    ),
    "the_device_before_is_left": Defect(
        "device_guard.h",
        "if (changed_) Driver::leave",
        "if (false) Driver::leave",
        "plain",
        CONTEXT,
    ),
    "no_context_taken_for_device_0_s": Defect(
        "device_guard.h",
        "changed_ = before_ == nullptr || Driver::device() != device;",
        "changed_ = (before_ == nullptr ? 0 : Driver::device()) != device;",
        "plain",
        CONTEXT,
    ),
    "no_context_given_back_as_device_0_s": Defect(
        "device_guard.h",
        "before_(Driver::current()) {",
        "before_(Driver::current()) {\n    if (before_ == nullptr) before_ = Driver::primary(0);",
        "plain",
        CONTEXT,
    ),
    "tables_freed_where_no_context_is": Defect(
        "launch.cu",
        "const DeviceGuard guard(device);\n      for",
        "for",
        "plain",
        CONTEXT,
    ),
    "slice_behind_the_last": Defect(
        "centralize_kernel.h",
        "const bool is_there = index * length < staged.row.numel;",
        "const bool is_there = true;",
        "address",
        OVERRUN,
    ),
    "lanes_not_all_folded": Defect(
        "centralize_kernel.h",
        "int left = kTeam / 2; left > 0;",
        "int left = kTeam / 2; left > 1;",
        "plain",
        DIFFERS,
    ),
    "sums_read_too_early": Defect(
        "centralize_kernel.h",
        "*room = sums[0];\n      thread.barrier();",
        "*room = sums[0];",
        "thread",
        "data race",
    ),
    "slices_of_the_first_row": Defect(
        "geometry.cpp",
        "{static_cast<int32_t>(at), static_cast<int32_t>(first",
        "{0, static_cast<int32_t>(first",
        "plain",
        ANYTHING,
    ),
    "gradients_upon_each_other": Defect(
        "launch.cu",
        "reinterpret_cast<uint64_t>(scratch) + geometry_.scratch[at]",
        "reinterpret_cast<uint64_t>(scratch)",
        "plain",
        DIFFERS,
    ),
    "last_group_left_out": Defect("geometry.cpp", "group + 1);", "group);", "plain", ANYTHING),
    "first_group_left_out": Defect(
        "geometry.cpp", "std::min(with.first_group, group)", "with.first_group", "plain", ANYTHING
    ),
    "last_chunk_dropped": Defect(
        "geometry.cpp", "begin < row.numel;", "begin + kChunkSize <= row.numel;", "plain", DIFFERS
    ),
    "chunks_of_the_first_launch": Defect(
        "geometry.cpp", "false, first, 0}", "false, 0, 0}", "plain", ANYTHING
    ),
    "chunks_from_the_second_on": Defect(
        "geometry.cpp", "false, first, 0}", "false, first + 1, 0}", "plain", ANYTHING
    ),
}


def build_of(name: str) -> str:
    return DEFECTS[name].build if name in DEFECTS else name


def with_plain_formats(csrc: Path) -> Path:
    """A copy of csrc/ with those formats alone that the check has: half the time to compile."""
    shutil.copytree(CSRC, csrc)
    header = csrc / "formats" / "formats.h"
    start, row = "#define RANGER_FORMATS(X) \\\n", r"  X\((\w+), .*\)( \\)?\n"
    before, table = header.read_text().split(start)
    rows = list(re.finditer(row, table))
    plain = [match[0].rstrip("\\\n ") for match in rows if match[1] in ("Float32", "Float64")]
    assert len(plain) == 2
    header.write_text(before + start + " \\\n".join(plain) + "\n" + table[rows[-1].end() :])
    return csrc


class Builder:
    """Programs made side by side, of objects that are compiled once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.csrc = with_plain_formats(folder / "csrc")
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.why_not = functools.cache(lambda build: why_not(folder, BUILDS[build]))
        self.objects: dict[tuple[Path, str], Future[Path]] = {}
        self.programs: dict[str, Future[Path]] = {}

    def unchanged(self, source: Path, build: str) -> Future[Path]:
        if (source, build) not in self.objects:
            target = self.folder / f"{source.stem}_{build}.o"
            options = SMALL + BUILDS[build]
            own = self.csrc / source.relative_to(CSRC) if source.is_relative_to(CSRC) else source
            self.objects[source, build] = self.pool.submit(
                compile_object, own, target, options, self.csrc
            )
        return self.objects[source, build]

    def changed(self, source: Path, name: str) -> Path:
        csrc = self.folder / name / "csrc"
        shutil.copytree(self.csrc, csrc)
        file = csrc / "cuda" / DEFECTS[name].file
        text = file.read_text()
        assert text.count(DEFECTS[name].text) == 1, f"{DEFECTS[name].text!r} is not there once"
        file.write_text(text.replace(DEFECTS[name].text, DEFECTS[name].instead))
        options = SMALL + BUILDS[DEFECTS[name].build]
        target = self.folder / name / f"{source.stem}.o"
        return compile_object(csrc / source.relative_to(CSRC), target, options, csrc)

    def start(self, name: str) -> None:
        """Compiles the check: a build of it as it is, or with the defect of this name."""
        build = build_of(name)
        if name in self.programs or self.why_not(build):
            return
        parts = [self.unchanged(CHECK, build)]
        for source in (LAUNCH, GEOMETRY):
            if name in DEFECTS and (DEFECTS[name].file == GEOMETRY.name) == (source == GEOMETRY):
                parts.append(self.pool.submit(self.changed, source, name))
            else:
                parts.append(self.unchanged(source, build))
        target = self.folder / f"check_{name}"
        self.programs[name] = self.pool.submit(
            lambda: link([part.result() for part in parts], target, BUILDS[build])
        )

    def program(self, name: str) -> Path:
        if self.why_not(build_of(name)):
            pytest.skip(self.why_not(build_of(name)))
        self.start(name)
        return self.programs[name].result()


@pytest.fixture(scope="module")
def builder(request, tmp_path_factory):
    made = Builder(tmp_path_factory.mktemp("kernels"))
    for item in request.session.items:  # while the first runs, the next are compiled
        if item.path == request.path:
            made.start(next(iter(item.callspec.params.values())))
    yield made
    made.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", BUILDS)
def test_every_byte_is_the_plain_loop_s(builder, name):
    done = run([builder.program(name), *BRIEF.get(name, [])])
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(builder, name):
    done = run([builder.program(name), *BRIEF.get(DEFECTS[name].build, [])])
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert re.search(DEFECTS[name].evidence, said), said[-4000:]
