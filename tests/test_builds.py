"""What tests compile is kept from run to run, until something that it is made of changes."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import targets
from builds import MOST, hash_of, kept

TESTS = Path(__file__).parent


def made(folder: Path, key: str, calls: list[str]) -> Path:
    def make(path: Path) -> None:
        calls.append(key)
        path.mkdir()
        (path / "what").write_text(key)

    return kept("thing", key, make, folder)


def test_a_build_is_made_once_for_a_key(tmp_path):
    calls = []
    for key in ("a", "b", "a", "b"):
        assert (made(tmp_path, key, calls) / "what").read_text() == key
    assert calls == ["a", "b"]


def test_only_the_last_used_are_kept(tmp_path):
    calls = []
    for key in "abcdef":
        made(tmp_path, key, calls)
        time.sleep(0.01)
        made(tmp_path, "a", calls)
    assert calls == [*"abcdef"]
    assert len([*tmp_path.glob("thing-*")]) == MOST


def test_a_build_that_failed_or_was_killed_is_made_anew(tmp_path):
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        kept("thing", "a", fail, tmp_path)
    assert [path.name for path in made(tmp_path, "a", []).iterdir()] == ["what"]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").touch()
    calls = []
    path = made(tmp_path / "file", "a", calls)
    assert (path / "what").read_text() == "a"
    assert not path.is_relative_to(tmp_path)


RACER = """
import pathlib, sys, time
from builds import kept
def make(path):
    path.mkdir(); time.sleep(0.5); (path / "what").touch(); print("made")
assert (kept("thing", "a", make, pathlib.Path(sys.argv[1])) / "what").exists()
"""


def test_of_processes_that_ask_at_once_one_builds(tmp_path):
    def race(_: int) -> str:
        command = [sys.executable, "-c", RACER, tmp_path]
        return subprocess.run(command, cwd=TESTS, check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor() as pool:
        assert "".join(pool.map(race, range(4))) == "made\n"


def test_names_contents_and_options_make_the_hash(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x")
    second.write_text("x")
    hashes = {
        hash_of([first]),
        hash_of([second]),
        hash_of([first, second]),
        hash_of([first], "-O1"),
    }
    first.write_text("y")
    assert len({*hashes, hash_of([first])}) == 5
    assert hash_of([first, second]) == hash_of([second, first])


def test_an_emulation_s_key_follows_flags_compiler_and_python(monkeypatch):
    keys = {targets.emulation_key(), targets.emulation_key("-O1")}
    monkeypatch.setenv("CXXFLAGS", "-O0")
    keys.add(targets.emulation_key())
    monkeypatch.setattr(sys, "version", "another")
    keys.add(targets.emulation_key())
    monkeypatch.setattr(targets, "release_of", lambda package: "another")
    keys.add(targets.emulation_key())
    assert len(keys) == 5
    assert targets.emulation_key() == targets.emulation_key()


@pytest.mark.slow
def test_packages_that_pip_installs_anew_for_each_build_compile_nothing_anew(tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    pytest.importorskip("tvm_ffi")
    packages = [Path(pybind11.__file__).parent, Path(sys.modules["tvm_ffi"].__file__).parent]
    configure = ["cmake", "-G", "Ninja", "-S", targets.ROOT, "-B", tmp_path]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DRANGER_EMULATE_CUDA=ON"]
    times = []
    for _ in range(2):
        (tmp_path / "CMakeCache.txt").unlink(missing_ok=True)  # as setup.py does
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        headers = [*tmp_path.glob("dlpack/*.h"), *tmp_path.glob("pybind11/**/*.h")]
        times.append({path: path.stat().st_mtime_ns for path in headers})
    assert times[0] == times[1]
    assert {"dlpack.h", "pybind11.h"} <= {path.name for path in times[0]}
    includes = [x for x in (tmp_path / "build.ninja").read_text().splitlines() if "INCLUDES" in x]
    assert includes
    assert not [x for x in includes if any(str(package) in x for package in packages)]
