"""The benchmarks' own promises: what is timed and told, and what a run on a borrowed GPU leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import contestants, machine, race, step, tables, workloads
from benchmarks.__main__ import main
from benchmarks.contestants import ADAMW, CONTESTANTS, LOW, LOWEST, OURS, PURE
from benchmarks.on_gpu import runner

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SLOW = ["pytorch-optimizer Ranger compiled", "torch RAdam compiled"]
PEERS = [c.name for c in CONTESTANTS if c.package not in ("torch", "ranger_cuda")] + SLOW[1:]


def measured(tmp_path, *options, skip=PEERS):
    """The result of two rounds on the CPU, and the exit status."""
    out = tmp_path / "result.json"
    command = ["step", "--rounds", "2", "--out", str(out), *options]
    status = main([*command, "--skip", *skip])
    return json.loads(out.read_text()), status


# --- one entry -----------------------------------------------------------------------------------


def test_one_entry_has_every_command(capsys):
    assert main([]) == 0
    listed = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)
    expected = ["step", "show", "memory", "scale", "release", "sharded", "sweep", "gpu"]
    assert listed == expected
    assert main(["steps"]) == 2
    for name in listed:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([name, "--help"])


def test_a_run_on_a_gpu_starts_where_torch_is_broken():
    code = "import sys; sys.modules['torch'] = None; from benchmarks.__main__ import main; "
    code += "main(['gpu', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_sharded_and_whole_parameters_are_both_measured(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert main(["sharded", "--tensors", "2", "--rounds", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [*rows] == ["sharded, kept", "sharded, fresh", "whole, kept", "whole, fresh"]
    shown = capsys.readouterr().out
    for found in rows.values():
        assert found[OURS]["over_ours"] == 1
        for name, row in found.items():
            assert f"| {name} | {row['ms']:.3f} | {row['over_ours']:.2f} |" in shown
    assert not torch.distributed.is_initialized()


# --- on_gpu --------------------------------------------------------------------------------------


def test_each_of_the_three_calls_takes_less_than_nine_minutes():
    call = re.compile(r"benchmarks gpu --only (environment .*)")
    calls = call.findall(runner.__doc__)
    assert len(calls) == 3
    assert calls == call.findall((BENCHMARKS / "README.md").read_text())
    stages = [set(call.split(" --")[0].split()) for call in calls]
    assert set.union(*stages) == set(runner.LIMITS)
    for chosen in stages:
        assert chosen <= set(runner.LIMITS)
        limits = [
            max([runner.LIMITS[s] for s in chosen & {n.split("-")[0] for n in group}], default=0)
            for group in runner.STAGES
        ]
        assert sum(limits) < 540


def test_a_terminated_run_leaves_what_it_found_so_far(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(tmp_path)]
    command += ["--only", "environment", "tests", "--pytest=--collect-only"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
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


def test_new_gradients_are_new_at_every_step_and_kept_ones_never():
    seen = []

    def build(params):
        return lambda: (seen.append(params[0].grad), params[0].data.add_(1))

    shared = [torch.randn(3)]
    taken = race.Runner(contestants.Contestant("spy", "torch", build), shared, None, 0)
    taken.sample("kept")
    assert all(gradient is shared[0] for gradient in seen)
    seen.clear()
    taken.sample("fresh")
    assert len(set(map(id, [*seen, *shared]))) == 2 * race.CYCLE + 1
    assert all(torch.equal(gradient, shared[0]) for gradient in seen)
    assert taken.params[0].grad is shared[0]


def test_misaligned_rows_lie_as_they_say_in_the_aligned_row_s_shapes(monkeypatch):
    args = Namespace(compile_limit=0, end=float("inf"))
    names = [name for name in workloads.DEFAULT["cuda"] if name.endswith("odd")]
    aligned = workloads.WORKLOADS["64 x 1024^2"]
    assert [workloads.WORKLOADS[name] for name in names] == [aligned] * 3
    every, others = range(6), range(1, 6, 2)
    odd = ((), every), (every, every), (others, others)  # of parameters, and of gradients
    chosen = [c for c in CONTESTANTS if c.name in ("ranger", "torch AdamW fused, pure bf16")]
    for name, (params, gradients) in zip(names, odd, strict=True):
        monkeypatch.setitem(workloads.WORKLOADS, name, [(4, 4)] * 6)
        raced = race.Race(name, CPU, args, chosen)
        for taken in map(raced._start, chosen):
            for i, param in enumerate(taken.params):
                places = [n * param.dtype.itemsize for n in (1, 3)]
                assert param.data_ptr() % 16 in (places if i in params else (0,))
                assert param.grad.data_ptr() % 16 in (places if i in gradients else (0,))


def test_misaligned_rows_are_verified_and_measured(monkeypatch, tmp_path):
    names = [name for name in workloads.WORKLOADS if name.endswith("odd")]
    for name in names:
        monkeypatch.setitem(workloads.WORKLOADS, name, [(4, 4)] * 40)
    result, status = measured(tmp_path, "--workloads", *names)
    assert status == 0
    for found in result["workloads"].values():
        assert found["verified"] == "yes"
        assert found["rows"]["ranger"]["ms"] > 0


def test_on_a_gpu_what_matters_most_is_measured_on_all_workloads_first():
    raced = [c for c in CONTESTANTS if c.device != "cpu"]
    assert {c.name for c in raced if c.turn == 0} == {
        "ranger",
        "radam",
        "ranger triton",
        "ranger, CUDA graph",
        "ranger triton, CUDA graph",
        "torch AdamW fused",
        "torch AdamW fused, CUDA graph",
        "optimi Ranger",
        "flashoptim AdamW float32",
        "flashoptim AdamW 8-bit",
    }
    assert {c.name for c in raced if c.turn == 2} == {c.name for c in raced if c.compiled}


def test_a_later_turn_is_compared_with_what_is_measured_beside_it(monkeypatch, tmp_path, capsys):
    names = ["1000 x 1", "1000 x 1024"]
    for name in names:
        monkeypatch.setitem(workloads.WORKLOADS, name, [(64,)] * 3)  # some bfloat16 moves
    order = []
    measure = step.measure
    monkeypatch.setattr(step, "measure", lambda *a: (order.append((a[0], a[-1])), measure(*a)))
    result, status = measured(tmp_path, "--workloads", *names)
    assert status == 0
    assert order == [(name, turn) for turn in (0, 1) for name in names]
    for found in result["workloads"].values():
        rows = found["rows"]
        late = {"torch AdamW foreach", "torch RAdam foreach", PURE, LOW, LOWEST}
        assert {who for who, row in rows.items() if row["turn"] == 1 and "ms" in row} == late
        assert found["again"]["1"].keys() == {"ranger", ADAMW}
        for row in [*rows.values(), *found["again"]["1"].values()]:
            if "missing" in row:
                assert row["missing"] == "measured on cuda only"
            else:
                wanted = {"ms", "host_ms", "ratio", "ratio_quartiles", "of_adamw"}
                assert wanted <= row["fresh"].keys() <= row.keys()
        for kind in (rows[ADAMW], rows[ADAMW]["fresh"]):
            assert kind["of_adamw"] == 1
        for kind in (rows["ranger"], rows["ranger"]["fresh"]):
            assert kind["ratio"] == 1
    assert "new gradients" in capsys.readouterr().out


def test_where_not_all_fit_into_memory_each_is_measured_alone_twice_over(monkeypatch, tmp_path):
    monkeypatch.setitem(workloads.WORKLOADS, "1000 x 1", [(64,)] * 3)  # some bfloat16 moves
    monkeypatch.setattr(step, "fits", lambda *_: False)
    there, most = [], []

    class Runner(race.Runner):
        def __init__(self, *args):
            super().__init__(*args)
            there.append(weakref.ref(self))
            most.append(sum(runner() is not None for runner in there))

    monkeypatch.setattr(race, "Runner", Runner)
    result, status = measured(tmp_path, "--workloads", "1000 x 1", "--rounds", "3")
    assert status == 0
    rows = result["workloads"]["1000 x 1"]["rows"]
    assert {len(row["samples"]) for row in rows.values() if "ms" in row} == {3}
    assert len(there) == 2 * 10  # eight, and two of them beside a later turn
    assert max(most) == 1


def test_a_run_out_of_time_says_so(tmp_path):
    result, status = measured(tmp_path, "--limit", "-1", "--workloads", "1000 x 1")
    assert status == 0
    rows = result["workloads"]["1000 x 1"]["rows"]
    assert rows["ranger"]["missing"] == race.NO_TIME


# --- the peers -----------------------------------------------------------------------------------


def test_who_cannot_run_says_why(monkeypatch):
    by_name = {c.name: c for c in CONTESTANTS}
    monkeypatch.setattr(contestants, "installed", lambda package: None)
    why = by_name["optimi Ranger"].obstacle(CPU, 3)
    assert why == "not installed (pip install --no-deps torch-optimi)"
    assert by_name["ranger"].obstacle(CPU, 3) is None  # which need not be installed
    monkeypatch.setattr(contestants, "installed", lambda package: "1")
    assert by_name["flashoptim AdamW 8-bit"].obstacle(CPU, 3) == "measured on cuda only"
    for name in SLOW:
        assert by_name[name].obstacle(CPU, 100) is None
        assert "takes long" in by_name[name].obstacle(CPU, 101)
    assert "from 1000 tensors on" in by_name["ranger, CUDA graph"].obstacle(CUDA, 999)
    assert by_name["ranger, CUDA graph"].obstacle(CUDA, 1000) is None


def test_pure_bfloat16_is_bfloat16_all_over_and_nobody_else_is():
    args = Namespace(compile_limit=0, end=float("inf"))
    chosen = [c for c in CONTESTANTS if c.name.startswith("torch AdamW fused") and not c.device]
    raced = race.Race("1000 x 1", CPU, args, chosen)
    for contestant, dtype in zip(chosen, (torch.float32, torch.bfloat16), strict=True):
        taken = raced._start(contestant)
        (param, *_), state = taken.params, taken.step.__self__.state
        moments = state[param]["exp_avg"], state[param]["exp_avg_sq"]
        assert {t.dtype for t in (param, param.grad, *moments)} == {dtype}


def test_bfloat16_moments_are_in_place_before_torch_makes_its_own():
    param = torch.nn.Parameter(torch.randn(3))
    taken = contestants._bfloat16_moments([param])
    state = taken.__self__.state[param]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    param.grad = torch.randn(3)
    with pytest.raises(RuntimeError, match="BFloat16"):  # why it is measured on CUDA only
        taken()


@pytest.mark.parametrize(
    ("cuda", "size"), [(None, None), ("11.8", 4096), ("12.8", 4096), ("13.0", 32764)]
)
def test_a_torch_says_how_many_arguments_its_kernels_take(cuda, size):
    header = machine.multi_tensor_header()
    assert machine.kernel_arguments(cuda, header) == size
    assert machine.kernel_arguments(cuda, "") == (cuda and 4096)  # a torch from before
    environment = {"device": "H", "threads": 1, "torch": "2.13", "torch_kernel_arguments": size}
    said = tables.heading({"environment": environment})
    assert ("KB of arguments" in said) == (size is not None)
    assert size is None or f"{round(size / 1024)} KB" in said


@pytest.mark.parametrize("name", ["old.json", "result.json"])  # the latter is written over
def test_a_run_that_compares_fails_where_it_fell_back(monkeypatch, tmp_path, name):
    monkeypatch.setitem(workloads.WORKLOADS, "1000 x 1", [(2,)] * 3)
    old = tmp_path / name
    for ratio, status in ((1e-9, 1), (1e9, 0)):
        row = {"ms": 1.0, "of_adamw": ratio, "of_adamw_quartiles": [ratio, ratio]}
        found = {"1000 x 1": {"rows": {"ranger": row}}}
        old.write_text(json.dumps({"environment": {}, "workloads": found}))
        options = ["--workloads", "1000 x 1", "--compare", str(old)]
        assert measured(tmp_path, *options)[1] == status


def test_a_result_to_compare_with_that_is_not_there_ends_a_run_before_it_begins(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(step, "measure", None)
    with pytest.raises(FileNotFoundError):
        measured(tmp_path, "--compare", str(tmp_path / "old.json"))
    assert not list(tmp_path.iterdir())
