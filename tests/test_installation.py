"""What is installed, in place or from a wheel: its types for a user's script, and its command."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import ranger_cuda

ROOT = Path(__file__).parent.parent
SOURCES = ("ranger_cuda", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")

SCRIPT = """\
import torch

from ranger_cuda import Lookahead, RAdam, Ranger

model = torch.nn.Linear(2, 1)


def closure() -> float:
    return float(model(torch.ones(2)))


optimizers = (
    Ranger(model.parameters(), lr=4e-3, backend="cpu"),
    RAdam(model.named_parameters(), backend=None),
    Lookahead(torch.optim.AdamW(model.parameters()), backend="reference"),
)
for optimizer in optimizers:
    loss: float = optimizer.step(closure)
    optimizer.step()
with Ranger(model.parameters()).slow_weights():
    closure()
"""
WRONG = """\
import torch

from ranger_cuda import Ranger

Ranger([torch.nn.Parameter(torch.ones(1))], backend="gpu")
loss: float = Ranger([torch.nn.Parameter(torch.ones(1))]).step()
"""


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "", **environment}
    )


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders are others there")


@pytest.fixture(scope="module", params=["editable", "wheel"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment where the package is installed, pure Python, beside this one's."""
    for needed in ("setuptools", "pip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"no {needed}, to install without a network")
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv").glob("lib/**/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clone = folder / "clone"
    clone.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    pip += ["--no-build-isolation", "--ignore-installed"]  # a copy in this environment is not meant
    what = ["--editable", clone] if request.param == "editable" else [clone]
    done = run(*pip, *what, RANGER_BACKENDS="none")
    if "setuptools" in done.stderr and "license" in done.stderr:
        pytest.skip("setuptools is too old for this package's pyproject.toml")
    assert done.returncode == 0, done.stderr
    return python


def test_the_command_ranger_cuda_is_there(environment: Path) -> None:
    done = run(environment.with_name("ranger-cuda"), "--version")
    assert done.stdout == f"ranger_cuda {ranger_cuda.__version__}\n", done.stderr


def test_mypy_strict_takes_a_user_s_script_and_finds_what_is_wrong(
    environment: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("no mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(WRONG)
    cache = ROOT / "build" / "mypy"  # torch alone takes a minute
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", environment]
    done = subprocess.run(
        [*mypy, "--cache-dir", cache, "script.py", "wrong.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "MYPYPATH": ""},
    )
    errors = [line.split(": error: ") for line in done.stdout.splitlines() if ": error: " in line]
    assert [where for where, _ in errors] == ["wrong.py:5", "wrong.py:6"], done.stdout
    assert "'gpu'" in errors[0][1]
    assert '"None"' in errors[1][1]
