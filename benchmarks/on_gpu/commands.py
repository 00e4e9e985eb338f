"""Commands with a time limit and a log each, and the archive of the logs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
Result = dict[str, Any]


class Commands:
    """Starts commands in the clone, and stops them. Times are ``time.monotonic()``'s.

    Args:
        out: for results; made if it is not there.
        wheels: a folder of pure Python wheels, for what is started to import.
    """

    def __init__(self, out: Path, wheels: Path | None) -> None:
        self.out = out
        self.out.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="ranger_on_gpu_"))
        self.logs = self.scratch / "logs"
        self.logs.mkdir()
        self.stopped_by: int | None = None  # a signal
        self._running: set[subprocess.Popen[bytes]] = set()
        self._starting = threading.Lock()
        self.environment = dict(os.environ)
        path = [str(ROOT)]
        if wheels:
            path.append(str(unpack(wheels, self.scratch / "site")))
        path.append(os.environ.get("PYTHONPATH", ""))
        self.environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        self.environment["PYTHONUNBUFFERED"] = "1"
        tools = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        self.environment["PATH"] = os.pathsep.join(tools)

    def run(self, name: str, command: list[str], end: float, **environment: str) -> Result:
        """Run it with its output in ``name``.log; stop it, and what it started, at ``end``."""
        log = self.logs / f"{name}.log"
        begun = time.monotonic()
        result: Result = {"rc": None, "seconds": 0.0, "log": log.name}
        with log.open("w") as output:
            try:
                with self._starting:
                    if self.stopped_by is not None:
                        return result | {"why": "not started: stopped before"}
                    process = subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env={**self.environment, **environment},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                    self._running.add(process)
            except OSError as error:
                output.write(f"{error}\n")
                return result | {"why": str(error)}
            try:
                result["rc"] = process.wait(max(end - begun, 1.0))
            except subprocess.TimeoutExpired:
                kill([process])
            self._running.discard(process)
        result["seconds"] = round(time.monotonic() - begun, 1)
        if self.stopped_by is not None and result["rc"] != 0:
            result["why"] = f"stopped by signal {self.stopped_by}"
        elif result["rc"] is None:
            result["why"] = f"stopped after {result['seconds']:.0f} s"
        elif result["rc"] != 0:
            result["why"] = f"exit status {result['rc']}"
        return result

    def tell(self, end: float, *command: str) -> str | None:
        """What a command prints; None if it is not there or fails."""
        try:
            return subprocess.run(
                command,
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=max(end - time.monotonic(), 5.0),
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    def text(self, result: Result) -> str:
        """What a command that was run has printed."""
        return (self.logs / result["log"]).read_text(errors="replace")

    def stop(self, signal_number: int, _: object) -> None:
        """A signal handler: start nothing any more, and end what runs."""
        self.stopped_by = signal_number
        with self._starting:
            running = list(self._running)
        kill(running)

    def pack_logs(self) -> None:
        """All logs so far into one file of the output folder."""
        new = self.out / "logs.new"
        with tarfile.open(new, "w:gz") as archive:
            archive.add(self.logs, "logs")
        new.replace(self.out / "logs.tar.gz")

    def clean_up(self) -> None:
        """Remove everything but the output folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)


def kill(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End them and their groups, gently at first."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
        end = time.monotonic() + 3
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0))


def unpack(wheels: Path, site: Path) -> Path:
    """Pure Python wheels are archives; unpacked, they need no pip and change no environment."""
    for wheel in sorted(wheels.glob("*-none-any.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return site


def cmake(at: Path, settings: dict[str, str]) -> list[list[str]]:
    """The commands that build the extension into a folder."""
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(at)]
    settings = {"Python_EXECUTABLE": sys.executable, **settings}
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    return [configure, ["cmake", "--build", str(at)]]
