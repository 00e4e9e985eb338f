"""What tests compile: once for all processes of a run, or until its sources change."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

FOLDER = "RANGER_TEST_BUILDS"
KEPT = Path(__file__).parent.parent / "build" / "tests"
MOST = 4  # kept of one name: of as many branches, say


def shared_folder() -> Path:
    """Of this process and those that it starts; gone at its end."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="ranger_builds_")
        atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
    return Path(os.environ[FOLDER])


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder that ``make(path)`` makes, by whoever asks first; the others wait."""
    return _made_in(shared_folder(), name, name, make)


def kept(name: str, key: str, make: Callable[[Path], object], folder: Path = KEPT) -> Path:
    """The folder that ``make(path)`` makes, from the last run with this ``key`` if there was one.

    Where nothing can be kept, it is for this run alone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return made_once(name, make)
    path = _made_in(folder, name, f"{name}-{key}", make)
    os.utime(path)  # it is in use
    others = [p for p in folder.glob(f"{name}-*") if len(p.name) == len(path.name)]
    for old in sorted(others, key=lambda p: p.stat().st_mtime)[:-MOST]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _made_in(folder: Path, lock_name: str, name: str, make: Callable[[Path], object]) -> Path:
    path, part = folder / name, folder / f"part-{name}"
    with (folder / f"{lock_name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            if part.is_dir():  # of a process that was killed
                shutil.rmtree(part)
            make(part)
            part.rename(path)  # whole, or not there
    return path


def hash_of(files: Iterable[Path], *others: str) -> str:
    """Of the files' names and contents, and of what else decides what comes of them."""
    digest = hashlib.sha256(repr(others).encode())
    for path in sorted(files):
        digest.update(f"{path}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
