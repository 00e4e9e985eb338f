"""`python -m ranger_cuda train`: killed or stopped anywhere, it resumes with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

from ranger_cuda.cli import corpus
from ranger_cuda.cli.training import Run
from train_runs import (
    ENVIRONMENT,
    OPTIMIZERS,
    STEPS,
    TINY,
    assert_same_run,
    saved,
    train,
)

# Imports once and forks, so that there is time for many kills.
ATTEMPTS = """
import os, sys
import ranger_cuda.cli.report, ranger_cuda.cli.progress, ranger_cuda.cli.train
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # the lines of one process are not mixed with the other's
        os._exit(ranger_cuda.cli.main(sys.argv[1:]))
    print(f"child {child}", flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"exit {status}", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_random_points_it_resumes_with_the_same_bits(
    tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", ATTEMPTS, "train", "--out", str(out), *TINY, "--resume"]
    reached = []  # the steps at which it was killed

    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as attempts:

        def answer(word: str) -> int:
            for line in attempts.stdout:
                if line.startswith(word):
                    return int(line.split()[1])
            raise AssertionError(f"the process ended without '{word}'")

        for attempt in count():
            attempts.stdin.write("go\n")
            attempts.stdin.flush()
            child = answer("child")
            if attempt == 3:  # at least once behind a checkpoint, on a machine of any speed
                while not (out / "checkpoint.pt").exists():
                    time.sleep(0.001)
            else:  # later and later, so that it ends
                time.sleep(random.uniform(0.5, 1.0) * 0.1 * 1.3**attempt)
            with suppress(ProcessLookupError):  # it is through
                os.kill(child, signal.SIGKILL)
            status = answer("exit")
            if status == 0:
                break
            assert status == -signal.SIGKILL
            if (out / "checkpoint.pt").exists():
                reached.append(saved(out)["step"])
        attempts.stdin.close()

    assert any(0 < step < STEPS for step in reached), reached
    assert_same_run(out, uninterrupted)


@pytest.fixture
def not_ignored() -> Iterator[None]:
    """Signals as at a terminal; in a script's background job SIGINT starts ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("not_ignored")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
) -> None:
    handler = signal.getsignal(number)
    step = Run.step

    def interrupted_step(run: Run, batch: corpus.Batch) -> None:
        if run.name == OPTIMIZERS[1] and len(run.history.loss) == 8:
            signal.raise_signal(number)
        step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupted_step)
        assert train(tmp_path, *TINY, "--checkpoint-every", "1000") == status
    assert saved(tmp_path)["step"] == 9
    assert f"train --resume --out {tmp_path}" in capsys.readouterr().out
    assert signal.getsignal(number) is handler

    assert train(tmp_path, "--resume") == 0
    assert "Resuming at step 9" in capsys.readouterr().out
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.usefixtures("not_ignored")
def test_ctrl_c_in_a_shell_ends_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ranger_cuda", "train", "--out", str(tmp_path), *TINY]
    with subprocess.Popen(
        [*command, "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == 130


def test_low_precision_resumes_with_the_same_bits(tmp_path: Path) -> None:
    storage = ["--dtype", "bfloat16", "--weight-rounding", "stochastic24", "--state-dtype", "8bit"]
    storage += ["--optimizers", "ranger", "--width", "64"]  # matrices of 4,096 elements and more
    storage += ["--evaluate-every", "4"]  # as a run does at its end
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(whole, *TINY, *storage, "--steps", "8") == 0
    assert train(halves, *TINY, *storage, "--steps", "4") == 0
    assert train(halves, "--resume", "--steps", "8") == 0
    assert_same_run(halves, whole)
    state = saved(whole)["runs"]["ranger"]["optimizer"]["state"]
    found = {value.dtype for values in state.values() for value in values.values()}
    assert found == {torch.bfloat16, torch.float32, torch.int8, torch.uint8}
