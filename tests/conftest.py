"""Property-based tests: no deadlines, for busy machines; the same examples every time in CI."""

import os

import pytest
import torch
from hypothesis import settings

from targets import NAMES, open_target

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
