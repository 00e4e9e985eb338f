"""The benchmarks' own promises: what a run on a borrowed GPU leaves behind, and what is timed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PEERS = ["torch RAdam compiled", "optimi Ranger", "pytorch-optimizer Ranger"]
PEERS.append("timm Lookahead(RAdam)")


@pytest.fixture
def module(monkeypatch):
    """Imports a module as a benchmark imports it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: __import__(name)


# --- the tests on a GPU machine ------------------------------------------------------------------

WITHOUT_EXPECTTEST = """
import sys
import pytest
sys.modules["expecttest"] = None
sys.exit(pytest.main(["--collect-only", "-q", *sys.argv[1:]]))
"""


def collected(*arguments):
    command = [sys.executable, "-c", WITHOUT_EXPECTTEST, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_without_expecttest_every_test_is_collected():
    files = {test.split("::")[0] for test in collected()}
    assert files >= {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}


def test_what_is_marked_gpu_runs_on_a_gpu():
    names = collected("-m", "gpu", "tests/test_cuda.py", "tests/test_parity.py")
    assert "tests/test_cuda.py::test_what_the_host_moves_is_not_captured" in names
    assert any("goes_from_the_cpu_to_the_gpu_and_back[Ranger-cuda]" in name for name in names)
    assert any("test_parity" in name for name in names)
    for name in names:
        assert not re.search(r"\[.*(emulated|interpreted|cpu-\d)", name)
