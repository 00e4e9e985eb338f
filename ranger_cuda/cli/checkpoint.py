"""Checkpoint files that are whole at every moment, also when the process is killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .errors import CommandError

FORMAT = 1


def path_in(out: Path) -> Path:
    """Where a run's checkpoint lies in its output folder."""
    return out / "checkpoint.pt"


def files_in(out: Path) -> list[Path]:
    """The checkpoint, and what a killed process may leave of the next one."""
    return [path_in(out), _temporary(path_in(out))]


def save(content: dict[str, Any], path: Path) -> None:
    """Replace the checkpoint at ``path``: a reader finds the old one or the new one, never a part.

    Raises:
        CommandError: the file cannot be written; the old one is still there.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the name is
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CommandError(
            f"cannot write {path}: {reason}; make room there or choose another --out "
            "(a checkpoint that was there before is unchanged)"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code that it may contain."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader raise
        raise CommandError(
            f"cannot read {path} ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "start over with --overwrite, or choose another --out"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CommandError(
            f"{path} is no checkpoint of this version's `train`; "
            "start over with --overwrite, or choose another --out"
        )
    return content


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
