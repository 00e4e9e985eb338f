"""`python -m ranger_cuda train`: what it promises about settings, refusing and reporting."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranger_cuda.cli import checkpoint, corpus, main
from ranger_cuda.cli.errors import CommandError
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


def test_storage_that_there_is_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dtype", "float16", "--weight-rounding", "stochastic24"]
    assert train(tmp_path, *TINY, *flags) == 2
    assert "--dtype float16: there is no format" in capsys.readouterr().err


def test_more_steps_continue_a_finished_run(tmp_path: Path, uninterrupted: Path) -> None:
    assert train(tmp_path, *TINY, "--steps", "20") == 0
    assert train(tmp_path, "--resume", "--steps", str(STEPS)) == 0
    assert_same_run(tmp_path, uninterrupted)


def test_resume_with_nothing_to_resume_starts_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "new", *TINY, "--steps", "2", "--resume") == 0
    assert "Nothing to resume" in capsys.readouterr().out
    assert saved(tmp_path / "new")["step"] == 2


# Refusing


@pytest.mark.parametrize(
    ("flags", "differences"),
    [
        (["--batch-size", "3"], ["--batch-size is 3, and was 2"]),
        (["--lr", "ranger=1", "--seed", "4"], ["--lr is ranger=1", "--seed is 4, and was 3"]),
        (["--optimizers", "sgd"], ["--optimizers is sgd, and was ranger"]),
        (["--steps", "5"], ["has done 32 already"]),
        (["--data", subprocess.__file__], ["--data is"]),
    ],
    ids=lambda value: value[0],
)
def test_resume_with_other_settings_is_refused(
    uninterrupted: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    differences: list[str],
) -> None:
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    assert train(uninterrupted, "--resume", *flags) == 2
    message = capsys.readouterr().err
    assert [text for text in [*differences, "--out"] if text not in message] == []
    assert (uninterrupted / "checkpoint.pt").read_bytes() == before


def test_resume_on_changed_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("one and the same sentence. " * 100)
    assert train(tmp_path, *TINY, "--data", str(text), "--steps", "2") == 0
    text.write_text("quite another sentence. " * 100)
    assert train(tmp_path, "--resume") == 2
    assert "the text has changed" in capsys.readouterr().err


def test_a_run_is_not_overwritten_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, *TINY, "--steps", "2") == 0
    assert train(tmp_path, *TINY, "--steps", "1") == 2
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--overwrite" in message
    assert saved(tmp_path)["step"] == 2
    assert train(tmp_path, *TINY, "--steps", "1", "--overwrite") == 0
    assert saved(tmp_path)["step"] == 1


def test_a_damaged_checkpoint_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert train(tmp_path, *TINY, "--resume") == 2
    assert "cannot read" in capsys.readouterr().err


def test_missing_extras_are_named_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name)
    )
    assert train(tmp_path / "run", *TINY) == 2
    assert "pip install rich" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--data", "no/such/text"], "does not exist"),
        (["--max-bytes", "100"], "too short"),
        (["--heads", "3"], "no multiple of"),
        (["--lr", "adamw=1"], "does not train"),
        (["--optimizers", "sgd", "sgd"], "twice"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--threads", "100000"], "--threads 100000 is far more than"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    assert train(tmp_path / "run", *TINY, *flags) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/sub", "x" * 300], ids=lambda out: out[:8])
@pytest.mark.parametrize("flag", ["", "--resume", "--overwrite"])
def test_an_out_that_can_be_no_folder_is_refused_before_any_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    flag: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.delattr(Run, "step")
    assert train(tmp_path / out, *TINY, *flag.split()) == 2
    assert f"cannot make the folder {tmp_path / out}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_results_that_cannot_be_removed_are_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loss.png").mkdir()
    monkeypatch.delattr(Run, "step")
    assert train(tmp_path, *TINY) == 2
    assert f"cannot remove {tmp_path / 'loss.png'}" in capsys.readouterr().err


# Checkpoint files


def test_a_failed_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"step": 1}, path)

    def full(content: object, file: object) -> None:
        file.write(b"the beginning of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CommandError, match="No space left on device"):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.load(path)["step"] == 1


# Text and batches


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    text = corpus.load(argparse.__file__, 10_000, 8, exclude=[])
    shape = {"batch_size": 2, "context": 8}
    batch = corpus.training_batch(text, seed=2**32, step=5, **shape)
    again = corpus.training_batch(text, seed=2**32, step=5, **shape)
    assert torch.equal(batch.inputs, again.inputs)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for seed, step in ((2**32, 6), (0, 5)):
        other = corpus.training_batch(text, seed=seed, step=step, **shape)
        assert not torch.equal(batch.inputs, other.inputs)


def test_validation_text_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(1, 101)) * 2)
    text = corpus.load(str(tmp_path / "text"), 1_000, 8, exclude=[])
    assert len(text.training) == 180
    batches = corpus.validation_batches(text, batch_size=4, context=8)
    assert {int(byte) for batch in batches for byte in batch.inputs.flatten()} <= {*range(81, 101)}


def test_a_folder_is_read_without_binaries_hidden_files_and_the_excluded(tmp_path: Path) -> None:
    files = {
        "a.txt": b"a" * 50,
        "b/c.md": b"c" * 50,
        "d.bin": b"\0" * 50,
        ".e": b"e",
        "out/f": b"f" * 50,
        "out/g": b"g",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    text = corpus.load(str(tmp_path), 1_000, 8, exclude=[tmp_path / "out/g"])
    everything = torch.cat([text.training, text.validation])
    assert sorted(everything.tolist()) == [*b"a" * 50, *b"c" * 50, *b"f" * 50]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_regular_file_is_left_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a" * 200)
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    load = f"from ranger_cuda.cli import corpus; corpus.load({str(tmp_path)!r}, 1_000, 8, [])"
    # In a process of its own, as one that waits for a pipe can only be killed.
    subprocess.run([sys.executable, "-c", load], env=ENVIRONMENT, check=True, timeout=60)


@pytest.mark.parametrize("out", [".", "", "sub/.."])
def test_the_text_may_lie_in_the_output_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/text").write_text("a sentence. " * 100)
    Path("text").write_text("another sentence. " * 100)
    for data in ("texts", "."):
        run = ["train", *TINY, "--steps", "2", "--data", data, "--out", out]
        assert main([*run, "--overwrite"]) == 0
        # The results, which were not there at the start, are no text either.
        assert main([*run, "--resume"]) == 0
        assert capsys.readouterr().out.rstrip().endswith("loss.png to .")


# Results


def test_every_optimizer_starts_from_the_same_weights_and_batch(uninterrupted: Path) -> None:
    runs = saved(uninterrupted)["runs"]
    assert list(runs) == OPTIMIZERS
    assert len({run["history"]["loss"][0] for run in runs.values()}) == 1


def test_the_loss_goes_down(tmp_path: Path) -> None:
    assert train(tmp_path, *TINY, "--steps", "100", "--batch-size", "8", "--lr", "1e-2") == 0
    for result in json.loads((tmp_path / "summary.json").read_text())["results"]:
        assert result["train_loss"] < 4.5, result  # ln 256 = 5.5 at the start
        assert result["validation_loss"] < 4.5, result


def test_results_are_written(uninterrupted: Path) -> None:
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert [result["optimizer"] for result in summary["results"]] == OPTIMIZERS
    slow = {result["optimizer"]: result["slow_validation_loss"] for result in summary["results"]}
    assert slow["ranger"] > 0
    assert slow["radam"] is None
    with (uninterrupted / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STEPS * len(OPTIMIZERS)
    assert [row["step"] for row in rows if row["validation_loss"]][:4] == ["10", "20", "30", "32"]
    assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_cannot_be_written_leave_the_checkpoint_and_say_so(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((uninterrupted / "checkpoint.pt").read_bytes())
    chart = tmp_path / "loss.png"
    chart.mkdir()
    assert train(tmp_path, "--resume") == 2
    message = capsys.readouterr().err
    assert f"cannot write {chart}: " in message
    assert "the checkpoint is safe" in message
    assert f"--resume --out {tmp_path}" in message
    assert_same_run(tmp_path, uninterrupted)

    chart.rmdir()
    assert train(tmp_path, "--resume") == 0
    assert chart.is_file()


def test_a_diverged_run_is_still_reported(tmp_path: Path) -> None:
    assert train(tmp_path, *TINY, "--optimizers", "sgd", "--lr", "1e9", "--steps", "12") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["results"][0]["train_loss"] is None
