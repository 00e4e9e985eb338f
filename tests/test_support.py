"""The support table is true, and what cannot run says why and what would fix it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ranger_cuda
from ranger_cuda import Ranger
from ranger_cuda.backends import support
from ranger_cuda.cli import info, main

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*REAL, torch.complex64, torch.complex128, torch.complex32, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", support.BACKENDS)
def test_a_backend_serves_just_what_the_table_says(backend, dtype):
    if support.obstacle(backend) is not None:
        pytest.skip(support.obstacle(backend).cause)
    device = support.device_type_here(support.BACKENDS[backend])
    param = torch.nn.Parameter(torch.ones(4, device=device).to(dtype))
    param.grad = torch.ones_like(param)
    optimizer = Ranger([param], lr=0.5, backend=backend)
    if dtype not in support.BACKENDS[backend].dtypes:
        with pytest.raises(ValueError, match=rf"{dtype} on {device}.*backend='{backend}'"):
            optimizer.step()
        assert not optimizer.state
        return
    optimizer.step()
    # Not rectified at the first step: lr / (1 - beta1) * (1 - beta1) = 0.5 but for rounding.
    assert torch.allclose(param, torch.full_like(param, 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64])
def test_no_backend_named_means_one_that_serves(dtype):
    param = torch.nn.Parameter(torch.ones(4).to(dtype))
    chosen = support.choose(None, param, "it")
    first = next(b.name for b in support.BACKENDS.values() if support.serves(b, param))
    assert chosen == first
    assert (chosen == "cpu") == (dtype in support.BACKENDS["cpu"].dtypes)


@pytest.mark.parametrize("backend", support.BACKENDS)
def test_a_backend_that_cannot_run_says_cause_fix_and_diagnosis(backend):
    if support.obstacle(backend) is None:
        pytest.skip("it can")
    message = rf"backend='{backend}' cannot run here: .*install.*ranger_cuda info"
    with pytest.raises(RuntimeError, match=message):
        Ranger([torch.nn.Parameter(torch.ones(1))], backend=backend)


WITHOUT_EXTENSION = """
import sys
sys.modules["ranger_cuda._C"] = None
import torch, warnings, ranger_cuda
param = torch.nn.Parameter(torch.ones(3)); param.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ranger_cuda.Ranger([param], lr=0.0, backend="reference").step()
    assert not caught
    optimizer = ranger_cuda.Ranger([param], lr=0.5)
    optimizer.step()
    assert torch.allclose(param, torch.full((3,), 0.5))
    optimizer.step()
(warning,) = caught
print(warning.message)
try:
    ranger_cuda.Ranger([param], backend="cpu")
except RuntimeError as error:
    print(error)
from ranger_cuda.cli import main
assert main(["info"]) == 0
"""


def test_without_the_extension_everything_works_and_cpu_says_what_is_missing():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    for expected in (
        "ranger_cuda._C was not compiled",
        "its slow reference backend",
        "in a clone: pip install --force-reinstall --no-deps .",
        "python -m ranger_cuda info",
        "extension: none",
    ):
        assert expected in result.stdout


def test_a_source_tree_found_before_the_installed_package_is_recognised(tmp_path):
    here = Path(ranger_cuda.__file__).parent
    ignored = shutil.ignore_patterns("_C*.so", "_C*.pyd", "__pycache__")
    shutil.copytree(here, tmp_path / "clone/ranger_cuda", ignore=ignored)
    (tmp_path / "installed/ranger_cuda").mkdir(parents=True)
    (tmp_path / "installed/ranger_cuda" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    said = subprocess.run(
        [sys.executable, "-c", RUN_INFO, str(tmp_path / "installed")],
        capture_output=True,
        text=True,
        cwd=tmp_path / "clone",
        env={**os.environ, "PYTHONPATH": ""},
    ).stdout
    assert f"the installed package is {tmp_path / 'installed/ranger_cuda'}" in said
    assert "start Python in another folder, or install the clone itself: pip install -e ." in said


# The installed package comes after the current folder; that of this environment is out of the way.
RUN_INFO = """
import importlib.machinery, runpy, sys
sys.path.insert(1, sys.argv.pop())
kept = ("BuiltinImporter", "FrozenImporter", "PathFinder")
sys.meta_path[:] = [getattr(importlib.machinery, name) for name in kept]
sys.argv.append("info")
runpy.run_module("ranger_cuda", run_name="__main__")
"""


def test_info_has_every_backend_with_a_step_or_a_cause(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    report = info.collect()
    assert {row["name"] for row in report["backends"]} == set(support.BACKENDS)
    for row in report["backends"]:
        assert row["name"] in shown
        assert row["step"] == "ok" if row["works"] == "yes" else row["cause"] and row["fix"]
    assert ranger_cuda.__version__ in shown


def test_torch_and_the_extension_share_one_openmp_runtime():
    assert len(info.openmp_runtimes()) <= 1


NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed "
    "a driver from http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize("built", ["13.0", ""])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_torch_for_cuda_without_a_driver_is_told_so(monkeypatch, backend, built):
    if isinstance(support.extension(), support.Obstacle):
        pytest.skip(support.extension().cause)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def init():
        raise RuntimeError(NO_DRIVER)

    monkeypatch.setattr(torch.cuda, "init", init)
    found = ModuleType("_C")
    found.build_info = lambda: {"cuda": built, "cuda_reason": "no nvcc"}
    monkeypatch.setattr(support, "extension", lambda: found)
    support._triton_obstacle.cache_clear()
    try:
        cause, fix = support.obstacle(backend)
    finally:
        support._triton_obstacle.cache_clear()
    if "Triton" in cause:
        pytest.skip(cause)
    assert f"torch {torch.__version__} was built for CUDA 13.0, but finds no driver" in cause
    assert cause.endswith("Found no NVIDIA driver on your system")
    assert "install NVIDIA's driver" in fix
