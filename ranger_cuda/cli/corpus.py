"""The text to train on, and batches of it as a pure function of (seed, step)."""

from __future__ import annotations

import codecs
import hashlib
import os
import platform
import random
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import CommandError

STDLIB = "stdlib"
VALIDATION_FRACTION = 0.1
VALIDATION_WINDOWS = 128

# Not prose or programs but tables, third-party code or fixtures.
_NOT_STDLIB_SOURCE = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


class Batch(NamedTuple):
    """``inputs`` and, one byte later, ``targets``: int64 of shape (batch, context)."""

    inputs: Tensor
    targets: Tensor


class Corpus(NamedTuple):
    """Bytes to train on and bytes held out, with what the user should know about them."""

    training: Tensor  # uint8
    validation: Tensor  # uint8
    description: str
    digest: str  # of all bytes: two corpora with the same digest are the same


def load(data: str, max_bytes: int, context: int, exclude: Collection[Path]) -> Corpus:
    """Read the text: ``"stdlib"``, a file, or every text file (UTF-8, no zero bytes) in a folder.

    Args:
        data: the standard library's source, or a path.
        max_bytes: stop reading here.
        context: the length of the windows that both parts must hold.
        exclude: files to leave out of a folder of text: those that the run itself writes.

    Raises:
        CommandError: there is no text, or too little, or the file is none.
    """
    if data == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in _walk(root) if path.suffix == ".py" and _is_source(path, root)]
        title = f"the Python {platform.python_version()} standard library"
        if not files:
            raise CommandError(f"no Python source in {root}; give a text with --data PATH")
    else:
        root = Path(data)
        if not os.path.exists(root):  # unlike Path.exists, it never raises
            raise CommandError(f"--data {data} does not exist; give a text file or a folder")
        own = {os.path.realpath(path) for path in exclude}
        files = [path for path in _walk(root) if path == root or os.path.realpath(path) not in own]
        title = root.name or str(root)

    text, used = _read(files, root, max_bytes)
    split = len(text) - int(len(text) * VALIDATION_FRACTION)
    size = f"{len(text) / 1e6:.1f} MB" if len(text) >= 1e5 else f"{len(text):,} bytes"
    capped = ", capped by --max-bytes" if len(text) == max_bytes else ""
    description = f"{title} ({size} in {used} file{'s' * (used != 1)}{capped})"
    if len(text) - split <= context:
        raise CommandError(
            f"{description} is too short: a context of {context} needs about "
            f"{int((context + 1) / VALIDATION_FRACTION):,} bytes of text, a tenth of it held out; "
            "give more with --data or --max-bytes, or a smaller --context"
        )
    tokens = torch.frombuffer(text, dtype=torch.uint8)
    return Corpus(tokens[:split], tokens[split:], description, hashlib.sha256(text).hexdigest())


def training_batch(corpus: Corpus, *, seed: int, step: int, batch_size: int, context: int) -> Batch:
    """The batch of a step. It depends on nothing else, so a resumed run needs no loader state."""
    last = len(corpus.training) - context - 1
    # Seeded by text: all of it counts, where torch's generator drops a seed's high 32 bits.
    generator = random.Random(f"{seed}/{step}")
    starts = [generator.randint(0, last) for _ in range(batch_size)]
    return _windows(corpus.training, starts, context)


def validation_batches(corpus: Corpus, *, batch_size: int, context: int) -> list[Batch]:
    """The same evenly spaced windows of the held-out text for every evaluation and seed."""
    last = len(corpus.validation) - context - 1
    count = min(VALIDATION_WINDOWS, last + 1)
    starts = [i * last // max(count - 1, 1) for i in range(count)]
    return [
        _windows(corpus.validation, starts[i : i + batch_size], context)
        for i in range(0, count, batch_size)
    ]


def _walk(root: Path) -> Iterator[Path]:
    """Regular files: a named pipe would never end, and a broken link cannot be read."""
    if root.is_file():
        yield root
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__pycache__"))]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from filter(os.path.isfile, paths)


def _is_source(path: Path, root: Path) -> bool:
    return _NOT_STDLIB_SOURCE.isdisjoint(path.relative_to(root).parts)


def _read(files: list[Path], root: Path, max_bytes: int) -> tuple[bytearray, int]:
    """Join files up to ``max_bytes``, and count them.

    They are taken in the order of their names' hashes: the same on every machine, and yet what
    falls within the limit, and what is held out at the end, is a fair sample of all.
    """

    def order(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(root).as_posix().encode(errors="replace")).digest()

    text = bytearray()
    used = 0
    for path in sorted(files, key=order):
        try:
            with path.open("rb") as file:
                content = file.read(max_bytes - len(text))
        except OSError as error:
            raise CommandError(f"cannot read {path}: {error.strerror}") from error
        why_not = _why_no_text(content, is_whole=len(text) + len(content) < max_bytes)
        if why_not and path == root:
            raise CommandError(
                f"--data {path} is no text: {why_not}; give a file in UTF-8, or a folder of them"
            )
        if content and not why_not:
            text += content
            used += 1
        if len(text) == max_bytes:
            break
    return text, used


def _why_no_text(content: bytes, is_whole: bool) -> str:
    """Why these bytes, to the end of a file or not, are no text; empty if they are."""
    if (zero := content.find(0)) >= 0:
        return f"it has a zero byte, at {zero:,}"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content, final=is_whole)
    except UnicodeDecodeError as error:
        return f"byte {content[error.start]:#04x} at {error.start:,} is not UTF-8"
    return ""


def _windows(tokens: Tensor, starts: list[int], context: int) -> Batch:
    windows = torch.stack([tokens[start : start + context + 1] for start in starts]).long()
    return Batch(windows[:, :-1], windows[:, 1:])
