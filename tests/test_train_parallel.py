"""`python -m ranger_cuda train` on several processes: the bits of one, interrupted or not."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ranger_cuda
from helpers import assert_same_bits
from ranger_cuda.cli import main
from ranger_cuda.cli.parallel import PartialSums, sum_in_pairs

STEPS = 8  # past a sync, and no multiple of k = 6
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-size", "4"]
TINY += ["--data", argparse.__file__, "--threads", "1", "--device", "cpu", "--seed", "3"]
TINY += ["--steps", str(STEPS), "--evaluate-every", "3", "--checkpoint-every", "3"]
TINY += ["--optimizers", "ranger", "lookahead-adamw", "radam"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(ranger_cuda.__file__).parents[1]),
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}

# Imports once and forks the ranks of each run, with the variables that torchrun sets. A request may
# have one rank send itself a signal in a step, or end in its second save of shards.
SERVER = """
import json, os, signal, socket, sys
import ranger_cuda.cli.report, ranger_cuda.cli.progress, ranger_cuda.cli.train
from ranger_cuda.cli.training import Run
from torch.distributed.checkpoint import FileSystemWriter

def die_in(method):
    original, saves = getattr(FileSystemWriter, method), []
    def fatal(*args, **options):
        saves.append(args)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    setattr(FileSystemWriter, method, fatal)

def work(rank, ranks, port, flags, signals, kills):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    step = Run.step
    def signalled(run, batch):
        if len(run.history.loss) + 1 == signals.get(str(rank)):
            signals.clear()
            signal.raise_signal(signal.SIGTERM)
        step(run, batch)
    Run.step = signalled
    if str(rank) in kills:
        die_in(kills[str(rank)])
    os.dup2(2, 1)  # stdout is for answers
    status = ranger_cuda.cli.main(["train", *flags])
    sys.stdout.flush()
    os._exit(status)

for line in sys.stdin:
    ranks, flags, *events = json.loads(line)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            work(rank, ranks, port, flags, *events)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(statuses), flush=True)
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains on so many ranks; returns what they printed and their exit statuses."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    printed = tmp_path_factory.mktemp("printed") / "lines"
    with printed.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=ENVIRONMENT,
        )

    def run(ranks, out, *flags, signals=None, kills=None):
        begin = printed.stat().st_size
        request = [ranks, ["--out", str(out), *flags], signals or {}, kills or {}]
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        statuses = json.loads(process.stdout.readline())
        return printed.read_bytes()[begin:].decode(), statuses

    yield run
    process.stdin.close()
    process.wait()


def saved(out):
    """The checkpoint, with what was sharded."""
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    whole = out / "whole.pt"
    dcp_to_torch_save(out / content["shards"], whole)
    for name, run in torch.load(whole, weights_only=False).items():
        content["runs"][name] |= run
    return content


def assert_same_run(out, expected, ranks):
    """But for torch's fused AdamW on four: it rounds by where in its memory an element lies."""
    ours, theirs = saved(out), saved(expected)
    if ranks == 4:
        del theirs["runs"]["lookahead-adamw"]
    assert ours["step"] == theirs["step"]
    assert [folder.name for folder in out.glob("shards-*")] == [ours["shards"]]
    for name, run in theirs["runs"].items():
        mine = ours["runs"][name]
        for key in ("loss", "evaluated_at", "validation_loss", "slow_validation_loss"):
            assert mine["history"][key] == run["history"][key], (name, key)
        for key, value in run["model"].items():
            assert_same_bits(mine["model"][key], value, f"{name}, {key}")
        for param, state in run["optimizer"]["state"].items():
            assert mine["optimizer"]["state"][param].keys() == state.keys()
            for key, value in state.items():
                found = mine["optimizer"]["state"][param][key]
                assert_same_bits(found, value, f"{name}, {key} of {param}")


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """Four slices of a batch, two for each of two ranks."""
    out = tmp_path_factory.mktemp("parallel") / "fsdp"
    printed, statuses = train(2, out, *TINY, "--parallel", "fsdp", "--slices", "4")
    assert statuses == [0, 0], printed
    return out, printed


@pytest.mark.slow
def test_the_first_rank_alone_prints_and_draws(uninterrupted):
    out, printed = uninterrupted
    assert "on argparse.py" in printed
    for once in ("2 ranks (fsdp), 4 slices", f"step {STEPS}/{STEPS} ", "Wrote summary.json"):
        assert printed.count(once) == 1, printed
    assert "Traceback" not in printed
    assert {"summary.json", "history.csv", "loss.png"} <= {file.name for file in out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(1, "fsdp"), (4, "fsdp"), (1, "ddp"), (2, "ddp")])
def test_the_bits_depend_on_no_number_of_ranks_and_on_no_sharding(
    train, uninterrupted, tmp_path, ranks, parallel
):
    flags = [*TINY, "--parallel", parallel, "--slices", "4"]
    printed, statuses = train(ranks, tmp_path, *flags)
    assert statuses == [0] * ranks, printed
    assert_same_run(tmp_path, uninterrupted[0], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
def test_a_signal_to_one_rank_stops_all_and_any_number_of_ranks_goes_on(
    train, uninterrupted, tmp_path, then
):
    flags = [*TINY, "--parallel", "fsdp", "--slices", "4"]
    printed, statuses = train(2, tmp_path, *flags, signals={1: 5})
    assert statuses == [143, 143], printed
    assert "Stopped by SIGTERM after step 5 of 8, saved." in printed
    assert f"torchrun --nproc-per-node 2 -m ranger_cuda train --resume --out {tmp_path}" in printed
    printed, statuses = train(then, tmp_path, "--resume")
    assert statuses == [0] * then, printed
    assert printed.count("Resuming at step 5") == 1
    assert_same_run(tmp_path, uninterrupted[0], then)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "method", "then"),
    [(1, "write_data", 4), (0, "finish", 2)],
    ids=["shards", "metadata"],
)
def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before_it_to_go_on_from(
    train, uninterrupted, tmp_path, killed, method, then
):
    flags = [*TINY, "--parallel", "fsdp", "--slices", "4"]
    printed, statuses = train(2, tmp_path, *flags, kills={killed: method})
    assert statuses[killed] == -signal.SIGKILL, printed
    assert statuses[1 - killed] == 2, printed
    assert "Traceback" not in printed
    assert (tmp_path / "shards-6").exists()
    assert saved(tmp_path)["step"] == 3
    printed, statuses = train(then, tmp_path, "--resume")
    assert statuses == [0] * then, printed
    assert printed.count("Resuming at step 3") == 1
    assert_same_run(tmp_path, uninterrupted[0], then)


def test_shards_that_cannot_be_written_or_read_are_an_error_and_no_traceback(train, tmp_path):
    (tmp_path / "shards-3").write_text("not a folder")
    printed, statuses = train(2, tmp_path, *TINY, "--parallel", "fsdp")
    assert statuses == [2, 2], printed
    assert "]: Traceback" not in printed  # torch logs one
    assert f"error: cannot write {tmp_path / 'shards-3'}: " in printed
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save(torch.load(checkpoint) | {"shards": "shards-3"}, checkpoint)
    printed, statuses = train(2, tmp_path, "--resume")
    assert statuses == [2, 2], printed
    assert "]: Traceback" not in printed  # torch logs one
    assert f"error: cannot read {tmp_path / 'shards-3'}: " in printed


@pytest.mark.slow
def test_ctrl_c_at_torchrun_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "ranger_cuda", "train", "--out", str(tmp_path), *TINY]
    command += ["--parallel", "fsdp", "--slices", "4", "--steps", "100000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
    assert sum("Stopped by SIGINT after step" in line for line in lines) == 1, lines
    found, expected = saved(tmp_path), saved(uninterrupted[0])
    assert found["step"] > 0
    for name, run in expected["runs"].items():
        losses = found["runs"][name]["history"]["loss"]
        assert len(losses) == found["step"]
        assert losses[:STEPS] == run["history"]["loss"][: len(losses)]


def test_shards_that_cut_groups_of_8_bits_are_refused_before_anything_is_written(train, tmp_path):
    flags = [*TINY, "--parallel", "fsdp", "--dtype", "bfloat16", "--state-dtype", "8bit"]
    printed, statuses = train(2, tmp_path / "new", *flags)
    assert statuses == [2, 2], printed
    assert "Traceback" not in printed
    assert re.search(
        r"error: --state-dtype 8bit .*\(256, 16\).* --width that is a multiple of 32", printed
    ), printed
    assert not (tmp_path / "new").exists()


def test_gradients_of_any_power_of_two_of_ranks_have_the_same_sum():
    generator = torch.Generator().manual_seed(0)
    slices = [torch.randn(1000, generator=generator) * 10.0**i for i in range(8)]
    expected = sum_in_pairs(slices)
    assert not torch.equal(expected, sum(slices))  # another order has other bits
    for ranks in (1, 2, 4, 8):
        sums = PartialSums()
        for begin in range(0, 8, ranks):
            sums.add([sum_in_pairs(slices[begin : begin + ranks]), None])
        assert torch.equal(sums.total()[0], expected), ranks
        assert sums.total()[1] is None


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (
            None,
            ["--parallel", "ddp"],
            "torchrun --nproc-per-node 2 -m ranger_cuda train --parallel",
        ),
        (2, [], "torchrun started 2 processes, which would all train the same; add --parallel ddp"),
        (None, ["--slices", "2"], "give it with --parallel"),
        (3, ["--parallel", "fsdp"], "in 3 slices .* give a power of two"),
        (4, ["--parallel", "fsdp", "--slices", "2"], "4 ranks cannot share the 2 slices"),
        (8, ["--parallel", "ddp"], "--batch-size 4 is no multiple of the 8 slices"),
    ],
)
def test_ranks_that_cannot_share_a_batch_are_refused(
    tmp_path, monkeypatch, capsys, ranks, flags, message
):
    if ranks is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert main(["train", "--out", str(tmp_path / "new"), *TINY, *flags]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "new").exists()
