"""Property-based tests: no deadlines, for busy machines; the same examples every time in CI.

``-m gpu`` selects the tests that run on a GPU."""

import os
import sys
import unittest
from types import ModuleType

import pytest
import torch
from hypothesis import settings

try:
    import expecttest  # noqa: F401
except ImportError:  # torch.testing._internal imports it, for a base class that nothing here uses
    sys.modules["expecttest"] = ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

from expendable import Expendable
from targets import NAMES, open_target

settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a GPU, and is skipped where there is none")


def pytest_collection_modifyitems(items):
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        places = [given.get(name) for name in ("target", "device_target", "backend")]
        skips = [mark.kwargs.get("reason") for mark in item.iter_markers("skipif")]
        if "no CUDA device" in skips or {"cuda", "triton"} & {*places}:
            item.add_marker("gpu")


@pytest.fixture(params=["emulated", "cuda", "interpreted", "triton"])
def device_target(request, monkeypatch):
    """Each place where a GPU's backend runs."""
    return open_target(request.param, monkeypatch)


@pytest.fixture
def interpreted(monkeypatch):
    """The Triton backend in Triton's interpreter."""
    return open_target("interpreted", monkeypatch)


@pytest.fixture(params=NAMES)
def target(request, monkeypatch):
    """Each place where kernels run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "cpu-1-thread" else 2)
    yield open_target(request.param, monkeypatch)
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processes():
    """A process for each place where kernels run: one that may die of a test."""
    started = {name: Expendable(name) for name in NAMES}
    yield started
    for process in started.values():
        process.stop()


@pytest.fixture(params=NAMES)
def elsewhere(request, processes, monkeypatch):
    """Each of them."""
    open_target(request.param, monkeypatch)  # or the test is skipped
    return processes[request.param]
