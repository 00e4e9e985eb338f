"""Property-based tests: no deadlines, for busy machines; the same examples every time in CI."""

import os

import pytest
import torch
from hypothesis import settings

from expendable import Expendable
from targets import NAMES, open_target

PLACES = (*NAMES, "uncompiled")

settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")


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
    """A process for each place where kernels run, and where what stands in for the extension does:
    one that may die of a test."""
    started = {name: Expendable(name) for name in PLACES}
    yield started
    for process in started.values():
        process.stop()


@pytest.fixture(params=PLACES)
def elsewhere(request, processes, monkeypatch):
    """Each of them."""
    open_target(request.param, monkeypatch)  # or the test is skipped
    return processes[request.param]
