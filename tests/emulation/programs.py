"""The small C++ programs here, compiled with g++ alone: no Python, torch or CUDA in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EMULATION = Path(__file__).parent
CSRC = ROOT / "csrc"


def cmake_flags(name: str) -> list[str]:
    """The flags that every build of the extension gets, from CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (flags,) = re.findall(rf"set\({name} ([^\n)]*)", text)
    return flags.split()


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def checked(command: list[str | Path]) -> str:
    done = run(command)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def compile_object(source: Path, target: Path, options: list[str], csrc: Path = CSRC) -> Path:
    """One source, .cu too, to an object file, with the headers of ``csrc``."""
    command = ["g++", "-std=c++17", *cmake_flags("RANGER_EXACT")]
    command += [f"-I{csrc}", f"-I{EMULATION}", *options, "-x", "c++", "-c", source, "-o", target]
    checked(command)
    return target


def link(objects: list[Path], target: Path, options: list[str]) -> Path:
    checked(["g++", *options, *objects, "-o", target, "-pthread"])
    return target


def why_not(folder: Path, options: list[str]) -> str:
    """Why no program with these options runs here; empty if one does."""
    if shutil.which("g++") is None:
        return "no g++"
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    built = run(["g++", *options, source, "-o", program])
    if built.returncode != 0:
        return f"g++ cannot link with {' '.join(options)}: is its library installed?"
    if run([program]).returncode != 0:
        return f"programs with {' '.join(options)} do not run here"
    return ""
