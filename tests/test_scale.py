"""docs/scale.md says what its script computes, from numbers that hold elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import scale
from ranger_cuda.backends import support
from ranger_cuda.state import formats
from test_cuda_scale import GROUP, WORDS
from test_cuda_scale import MODELS as CHECKED

ROOT = Path(__file__).parent.parent


def test_the_page_has_what_the_script_prints():
    page = (ROOT / "docs/scale.md").read_text()
    assert page.split("prints -->\n")[1] == scale.report()
    assert f"{len(scale.MODELS['a mixture of experts']):,} tensors" in page
    assert f"{scale.microseconds_per_tensor():.2f} µs" in page
    assert f"{scale.SCHEDULE_WORDS:,} words: {scale.GROUP_WORDS} for each" in page


def test_bytes_of_state_are_those_that_were_measured():
    result = ROOT / "benchmarks/results/memory/cpu-2026-11-26.json"
    checked = 0
    for row in json.loads(result.read_text())["rows"]:
        kind, _, rest = row["name"].partition(" ")
        if kind == "Ranger":
            state, _, rounding = rest.partition(", ")
            state_dtype = state if state == "8bit" else getattr(torch, state)
            found = formats.of(getattr(torch, row["dtype"]), rounding or "exact", state_dtype)
            step_count = 4 / 1024**2
            assert scale.bytes_of(found).state + step_count == pytest.approx(row["bytes"], abs=1e-6)
            checked += 1
    assert checked == 15


def test_bytes_moved_are_those_of_the_page_on_precision():
    page = (ROOT / "docs/design/precision.md").read_text()
    table = page[page.index("The floor of a step, per parameter") :].split("\n\n")[1]
    found = {(f.weight_rounding or "float32", f.state_dtype): f for f in scale.formats.FORMATS}
    states = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8 bits": "8bit"}
    rows = table.splitlines()[2:]
    for line in rows:
        what, fast, slow = (cell.strip() for cell in line.strip("|").split("|"))
        param, _, state = what.partition(" + ")
        format = found["float32", states[state]]
        if param != "float32":
            format = formats.of(torch.bfloat16, param.split()[1], states[state])
        expected = (5 * float(fast) + float(slow)) / 6
        assert scale.bytes_of(format).moved == pytest.approx(expected, abs=0.01), what
    assert len(rows) == 8


def test_launches_and_models_are_those_of_the_launcher_s_own_tests():
    assert (WORDS[4], GROUP) == (scale.SCHEDULE_WORDS, scale.GROUP_WORDS)
    extension = support.extension()
    if not isinstance(extension, support.Obstacle):
        assert extension.table_layout()["group_words"] == GROUP
    for name, ours in (("Llama-3-8B", "Llama 3 8B"), ("Llama-3-70B", "Llama 3 70B")):
        numels, _ = CHECKED[name]
        assert sorted(numels) == sorted(torch.Size(shape).numel() for shape in scale.MODELS[ours])
    numels, _ = CHECKED["Qwen3-30B-A3B"]
    assert sorted(numels) == sorted(torch.Size(shape).numel() for shape in scale.mixture(48))


def test_a_fullest_gpu_has_the_whole_of_what_cannot_be_cut():
    format = formats.of(torch.float32)
    one, many = (scale.on_a_gpu([(1, 1000)], gpus, format) for gpus in (1, 1024))
    assert one == many
    assert scale.on_a_gpu([(1, 1000)], 8, format)[0] == pytest.approx(12_004 / 1e9)
    small = formats.of(torch.bfloat16, state_dtype="8bit")
    assert scale.on_a_gpu([(1, 1000)], 1, small)[0] == pytest.approx(14_004 / 1e9)
