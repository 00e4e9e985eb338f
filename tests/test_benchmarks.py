"""The benchmarks' own promises: what a run on a borrowed GPU leaves behind, and what is timed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PEERS = ["torch RAdam compiled", "optimi Ranger", "pytorch-optimizer Ranger"]
PEERS.append("timm Lookahead(RAdam)")


@pytest.fixture
def module(monkeypatch):
    """Imports a module as a benchmark imports it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: __import__(name)


# --- on_gpu.py -----------------------------------------------------------------------------------


def test_each_of_the_three_calls_takes_less_than_nine_minutes(module):
    on_gpu = module("on_gpu")
    call = re.compile(r"on_gpu\.py --only (environment .*)")
    calls = call.findall(on_gpu.__doc__)
    assert len(calls) == 3
    assert calls == call.findall((BENCHMARKS / "README.md").read_text())
    stages = [set(call.split(" --")[0].split()) for call in calls]
    assert set.union(*stages) == set(on_gpu.LIMITS)
    for chosen in stages:
        assert chosen <= set(on_gpu.LIMITS)
        limits = [
            max([on_gpu.LIMITS[s] for s in chosen & {n.split("-")[0] for n in group}], default=0)
            for group in on_gpu.STAGES
        ]
        assert sum(limits) < 540


def test_a_terminated_run_leaves_what_it_found_so_far(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), "--out", str(tmp_path)]
    command += ["--only", "environment", "tests", "--pytest=--collect-only"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("environment")
        time.sleep(1)  # the first test files are being collected
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        process.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert process.returncode == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "logs.tar.gz"}
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert stages["environment"]["versions"]["torch"] == torch.__version__
    assert "stopped by signal 15" in stages["tests"]["why"]
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert "logs/test_checkpoints.log" in archive.getnames()


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


# --- what is timed -------------------------------------------------------------------------------


def test_new_gradients_are_new_at_every_step_and_kept_ones_never(module):
    step_time = module("step_time")
    shared = [torch.randn(3)]
    params = [torch.nn.Parameter(torch.randn(3))]
    step_time.give(params, shared)
    seen = []
    runner = step_time.Ready(lambda: seen.append(params[0].grad), params)
    step_time.sample(runner)
    assert all(gradient is shared[0] for gradient in seen)
    seen.clear()
    step_time.sample(runner, shared)
    assert len(set(map(id, [*seen, *shared]))) == 2 * step_time.CYCLE + 1
    assert all(torch.equal(gradient, shared[0]) for gradient in seen)
    assert params[0].grad is shared[0]


def test_both_kinds_of_gradients_have_ratios_to_fused_adamw(module, monkeypatch):
    step_time = module("step_time")
    monkeypatch.setitem(step_time.WORKLOADS, "1000 x 1", [(1,)] * 3)
    args = Namespace(skip=PEERS, rounds=3)
    rows = step_time.measure("1000 x 1", torch.device("cpu"), args)
    for row in rows.values():
        assert {"ms", "ms_quartiles", "ratio", "of_adamw"} == row["fresh"].keys() <= row.keys()
    for kind in (rows[step_time.ADAMW], rows[step_time.ADAMW]["fresh"]):
        assert kind["of_adamw"] == 1
    for kind in (rows["ranger"], rows["ranger"]["fresh"]):
        assert kind["ratio"] == 1
    assert "new gradients" in step_time.as_table("1000 x 1", rows)


def test_misaligned_rows_lie_as_they_say_in_the_aligned_row_s_shapes(module, monkeypatch):
    gpu_step_time = module("gpu_step_time")
    contestants, workloads = module("contestants").CONTESTANTS, module("workloads")
    args = Namespace(compile_limit=0, end=float("inf"))
    names = [name for name in workloads.GPU_DEFAULT if name.endswith("odd")]
    aligned = workloads.WORKLOADS["64 x 1024^2"]
    assert [workloads.WORKLOADS[name] for name in names] == [aligned] * 3
    every, others = range(6), range(1, 6, 2)
    odd = ((), every), (every, every), (others, others)  # of parameters, and of gradients
    for name, (params, gradients) in zip(names, odd, strict=True):
        monkeypatch.setitem(gpu_step_time.WORKLOADS, name, [(4, 4)] * 6)
        race = gpu_step_time.Race(name, torch.device("cpu"), args, contestants[:1])
        runner = race._start(contestants[0])
        for i in range(6):
            param = runner.params[i]
            assert param.data_ptr() % 16 in ((4, 12) if i in params else (0,))
            assert param.grad.data_ptr() % 16 in ((4, 12) if i in gradients else (0,))


def test_misaligned_rows_are_verified_and_measured(module, monkeypatch, tmp_path):
    gpu_step_time = module("gpu_step_time")
    names = [name for name in gpu_step_time.WORKLOADS if name.endswith("odd")]
    for name in names:
        monkeypatch.setitem(gpu_step_time.WORKLOADS, name, [(4, 4)] * 40)
    out = tmp_path / "result.json"
    command = ["gpu_step_time.py", "--device", "cpu", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--workloads", *names, "--skip", *PEERS])
    assert gpu_step_time.main() == 0
    for found in json.loads(out.read_text())["workloads"].values():
        assert found["verified"] == "yes"
        assert found["rows"]["ranger"]["ms"] > 0


def test_on_a_gpu_what_matters_most_is_measured_on_all_workloads_first(module):
    contestants = module("contestants").contestants_on(torch.device("cuda"))
    first = {c.name for c in contestants if c.turn == 0}
    assert first == {
        "ranger",
        "radam",
        "ranger triton",
        "torch AdamW fused",
        "optimi Ranger",
        "flashoptim AdamW float32",
        "flashoptim AdamW 8-bit",
    }
    assert max(contestants, key=lambda c: c.turn).compiled


def test_a_later_turn_is_compared_with_what_is_measured_beside_it(module, monkeypatch, tmp_path):
    gpu_step_time = module("gpu_step_time")
    workloads = ["1000 x 1", "1000 x 1024"]
    for name in workloads:
        monkeypatch.setitem(gpu_step_time.WORKLOADS, name, [(2,)] * 3)
    out = tmp_path / "result.json"
    command = ["gpu_step_time.py", "--device", "cpu", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--workloads", *workloads, "--skip", *PEERS])
    order = []
    measure = gpu_step_time.measure
    monkeypatch.setattr(
        gpu_step_time, "measure", lambda *a: (order.append((a[0], a[-1])), measure(*a))
    )
    assert gpu_step_time.main() == 0
    assert order == [(name, turn) for turn in (0, 1) for name in workloads]
    for found in json.loads(out.read_text())["workloads"].values():
        rows = found["rows"]
        late = {"torch AdamW foreach", "torch RAdam foreach"}
        assert {who for who, row in rows.items() if row["turn"] == 1} == late
        assert found["again"]["1"].keys() == {"ranger", "torch AdamW fused"}
        for row in [*rows.values(), *found["again"]["1"].values()]:
            assert {"ms", "host_ms", "ratio", "of_adamw"} <= row["fresh"].keys() <= row.keys()


def test_a_run_out_of_time_says_so(module, monkeypatch, tmp_path):
    gpu_step_time = module("gpu_step_time")
    out = tmp_path / "result.json"
    command = ["gpu_step_time.py", "--device", "cpu", "--limit", "-1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--workloads", "1000 x 1"])
    assert gpu_step_time.main() == 0
    assert json.loads(out.read_text())["workloads"] == {
        "1000 x 1": {"missing": gpu_step_time.NO_TIME}
    }
