"""What ``docs/studies`` says is what was measured, of the codes that the package has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from ranger_cuda.state import formats
from ranger_cuda.state.codecs import GROUP
from ranger_cuda.step.algorithms import RANGER

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "docs/studies/eight_bit"
README = (STUDY / "README.md").read_text()


@pytest.fixture
def study(monkeypatch):
    """The modules of the study, which run as scripts."""
    monkeypatch.syspath_prepend(str(STUDY))
    names = ("codes", "report")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import codes
    import report

    yield codes, report
    for name in names:
        del sys.modules[name]


def test_the_readme_has_the_tables_of_the_results(study):
    _, report = study
    for name, table in report.tables(report.load()).items():
        assert table in README, name


def test_the_readme_has_the_table_of_the_measured_memory():
    (path,) = (ROOT / "benchmarks/results/memory").glob("*.json")
    assert memory.table(json.loads(path.read_text())["rows"]) in README


def test_measured_memory_is_what_the_formats_say():
    (path,) = (ROOT / "benchmarks/results/memory").glob("*.json")
    rows = {row["name"]: row["bytes"] for row in json.loads(path.read_text())["rows"]}
    for row in memory.ours():
        format = formats.of(row.dtype, **row.build.keywords)
        streams = formats.MOMENTS if "RAdam" in row.name else RANGER.streams_of({})
        parts = format.parts(streams)
        due = sum(p.dtype.itemsize / (GROUP if p.is_grouped else 1) for p in parts)
        assert rows[row.name] == pytest.approx(due, abs=1e-5)  # and a step count


def test_the_table_of_a_small_float_is_the_codec(study):
    codes, _ = study
    _, ours = codes.ours()
    generator = torch.Generator().manual_seed(0)
    value = torch.exp(3 * torch.randn(4096, generator=generator))
    random = torch.randint(1 << 16, (4096,), dtype=torch.int32, generator=generator)
    m, v = formats.of(torch.float32, state_dtype="8bit")[3:5]
    options = {"scales": codes.power_of_two, "table": codes.minifloat(False, 8 - v.fraction)}
    table = codes.with_table(value, random, root=True, never_zero=True, **options)
    assert torch.equal(ours(value, random), table)
    options["table"] = codes.minifloat(True, 7 - m.fraction)
    table = codes.with_table(value, random, **options)
    assert torch.equal(codes.ours()[0](value, random), table)
