"""What tests compile: once for all processes of a run."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = "RANGER_TEST_BUILDS"


def shared_folder() -> Path:
    """Of this process and those that it starts; gone at its end."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="ranger_builds_")
        atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
    return Path(os.environ[FOLDER])


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder that ``make(path)`` makes, by whoever asks first; the others wait."""
    path = shared_folder() / name
    part = path.with_name(f"part-{name}")
    with path.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(part)
            part.rename(path)
    return path
