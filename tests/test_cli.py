"""The command line before the training: its version, its answer to Ctrl-C, the text it takes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ranger_cuda
from ranger_cuda.cli import main

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(ranger_cuda.__file__).parents[1])}
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-size", "2"]
TINY += ["--steps", "6", "--device", "cpu", "--threads", "1"]

# Ctrl-C at a moment: when this module is imported, or this file opened.
INTERRUPTED = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without
moment = sys.argv.pop(1)
def interrupt(event, args):
    if event in ("import", "open") and args[0] == moment:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
runpy.run_module("ranger_cuda", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("moment", ["torch", "torch.optim", "matplotlib", "rich.console", "text"])
def test_ctrl_c_before_the_training_is_one_line(tmp_path: Path, moment: str) -> None:
    text = tmp_path / "text"
    text.write_text("a sentence. " * 100)
    train = ["train", *TINY, "--data", str(text), "--out", str(tmp_path / "out")]
    moment = str(text) if moment == "text" else moment
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, moment, *train],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert done.stderr == "Interrupted.\n"
    assert done.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("wanted", ["--version", "--help"])
def test_version_and_help_come_without_torch(wanted: str) -> None:
    without = "import sys; sys.modules['torch'] = None; import runpy\n"
    without += "runpy.run_module('ranger_cuda', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", without, wanted], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stderr == ""
    assert done.returncode == 0
    if wanted == "--version":
        assert done.stdout == f"ranger_cuda {ranger_cuda.__version__}\n"


def test_the_package_has_its_names_before_they_are_imported() -> None:
    code = "import ranger_cuda; assert {*ranger_cuda.__all__} <= {*dir(ranger_cuda)}\n"
    code += "assert not hasattr(ranger_cuda, 'Adam')\n"
    code += "from ranger_cuda import *; assert {Lookahead, RAdam, Ranger}"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a sentence. " * 100 + b"\0", "it has a zero byte, at 1,200"),
        (b"a sentence. " * 100 + b"\xff\xd8", "byte 0xff at 1,200 is not UTF-8"),
        ("ein Satz über Öl. ".encode("latin-1") * 100, "byte 0xfc at 9 is not UTF-8"),
        ("Öl".encode()[:1], "byte 0xc3 at 0 is not UTF-8"),
    ],
    ids=["zero byte", "picture", "latin-1", "cut"],
)
def test_a_file_that_is_no_text_is_refused_and_left_out_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, why: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "binary").write_bytes(content)
    train = ["train", *TINY, "--out", str(tmp_path / "out"), "--data"]
    assert main([*train, str(data / "binary")]) == 2
    message = capsys.readouterr().err
    assert f"--data {data / 'binary'} is no text: {why}" in message
    assert "give a file in UTF-8" in message
    assert not (tmp_path / "out").exists()

    (data / "text").write_text("a sentence. " * 100)
    assert main([*train, str(data)]) == 0
    assert "(1,200 bytes in 1 file)" in capsys.readouterr().out


def test_a_text_that_is_cut_within_a_character_is_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("Ö" * 1000, encoding="utf-8")
    data = ["--data", str(tmp_path / "text"), "--max-bytes", "1001"]
    assert main(["train", *TINY, *data, "--out", str(tmp_path / "out")]) == 0
    assert "1,001 bytes in 1 file, capped" in capsys.readouterr().out


def test_the_table_says_which_validation_loss_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("a sentence. " * 100)
    assert main(["train", *TINY, "--data", str(tmp_path / "text"), "--out", str(tmp_path)]) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "where there is a slow val. loss, compare that with the others' val. loss" in shown
