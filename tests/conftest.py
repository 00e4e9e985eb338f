"""Property-based tests: no deadlines, for busy machines; the same examples every time in CI.

``-m gpu`` selects the tests that run on a GPU. ``-m ptx`` selects those that take too long for each
change, and that only ``make ptx`` runs: translated PTX beyond one architecture's parity, what
Triton's interpreter, slower than that by far, only repeats, and experiments. `make quick` leaves
out those that are ``slow``."""

import gc
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

try:
    import expecttest  # noqa: F401
except ImportError:  # torch.testing._internal imports it, for a base class that nothing here uses
    sys.modules["expecttest"] = ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

from builds import shared_folder
from expendable import Expendable
from targets import (
    ALL_COMPILED,
    ALL_NAMES,
    COMPILED,
    NAMES,
    fresh_triton,
    open_target,
    triton_on_the_cpu,
)
from train_runs import TINY, train

# Modules of tests that compile, start processes that import torch, or train.
SLOW = {
    "test_address_sanitizer",
    "test_benchmarks",
    "test_benchmark_results",
    "test_checkpoint_mutations",
    "test_cli",
    "test_cuda_kernels",
    "test_cuda_resources",
    "test_cuda_scale",
    "test_distributed",
    "test_distributed_release",
    "test_experiments",
    "test_installation",
    "test_interrupts",
    "test_low_precision_learning",
    "test_memory",
    "test_moved_memory",
    "test_ptx",
    "test_ptx_kernels",
    "test_random_bits",
    "test_random_operations",
    "test_resharding",
    "test_train_cli",
    "test_train_parallel",
    "test_trainers",
    "test_train_resume",
    "test_triton",
    "test_triton_launch",
    "test_triton_memory",
}
SLOW_PLACES = {"interpreted", *ALL_COMPILED}
# What is done to memory between steps is seen before there are kernels: in the interpreter's place,
# these of it are enough.
SEEN_IN_THE_INTERPRETER = {"replace_one_tensor", "load_own_state", "move_parameters"}

settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a GPU, and is skipped where there is none")
    config.addinivalue_line("markers", "ptx: takes too long for each change; `make ptx` runs it")
    config.addinivalue_line("markers", "slow: takes long; `make quick` leaves it out")
    shared_folder()  # which the processes that run tests inherit


def pytest_collection_modifyitems(items):
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        places = [given.get(name) for name in ("target", "device_target", "backend")]
        skips = [mark.kwargs.get("reason") for mark in item.iter_markers("skipif")]
        if "no CUDA device" in skips or {"cuda", "triton"} & {*places}:
            item.add_marker("gpu")
        compiled = {*ALL_COMPILED} & {*places, given.get("elsewhere")}
        if compiled and not (item.path.stem == "test_parity" and compiled <= {*COMPILED}):
            item.add_marker("ptx")
        if "interpreted" in {*places, given.get("elsewhere")} and only_repeats(item, given):
            item.add_marker("ptx")
        if item.path.stem in SLOW or SLOW_PLACES & {*places, given.get("elsewhere")}:
            item.add_marker("slow")


def only_repeats(item, given):
    """Whether a test in Triton's interpreter is no other than where kernels are compiled."""
    change = getattr(given.get("change"), "__name__", None)
    if item.path.stem in ("test_memory", "test_moved_memory", "test_shared_memory"):
        return change not in SEEN_IN_THE_INTERPRETER
    others = ("alpha", 0.5), ("dtype", torch.float32)
    return item.path.stem == "test_parity" and any(
        given.get(name, kept) != kept for name, kept in others
    )


@pytest.fixture(params=["emulated", "cuda", "interpreted", "triton", *ALL_COMPILED])
def device_target(request, monkeypatch):
    """Each place where a GPU's backend runs."""
    return open_target(request.param, monkeypatch)


@pytest.fixture
def interpreted(monkeypatch):
    """The Triton backend in Triton's interpreter."""
    return open_target("interpreted", monkeypatch)


@pytest.fixture
def gpu(monkeypatch):
    """``backend="triton"`` compiles for it, and finds it with nothing compiled yet."""
    driver = pytest.importorskip("triton.runtime.driver").driver
    kernels = fresh_triton()["triton_kernels"]
    triton_on_the_cpu(monkeypatch, kernels)
    idle = pytest.importorskip("ptx.triton_gpu").IdleGPU()
    monkeypatch.setattr(driver, "_active", idle)
    yield idle
    for kernel in vars(kernels).values():  # they are unloaded while there is a driver
        getattr(kernel, "device_caches", {}).clear()
    gc.collect()


@pytest.fixture(params=ALL_NAMES)
def target(request, monkeypatch):
    """Each place where kernels run."""
    before = torch.get_num_threads()
    # Two that wait for each other take long on a busy machine: only where they are the point.
    torch.set_num_threads(1 if request.param in ("cpu-1-thread", *ALL_COMPILED) else 2)
    yield open_target(request.param, monkeypatch)
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processes():
    """A process for each place where kernels run: one that may die of a test."""
    started = {name: Expendable(name) for name in (*NAMES, *COMPILED)}
    yield started
    for process in started.values():
        process.stop()


@pytest.fixture(params=[*NAMES, *COMPILED])
def elsewhere(request, processes, monkeypatch):
    """Each of them."""
    open_target(request.param, monkeypatch)  # or the test is skipped
    return processes[request.param]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert train(out, *TINY) == 0
    return out
