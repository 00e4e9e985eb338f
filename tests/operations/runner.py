"""Plays sequences of operations, each batch in a process that may die of one; shrinks a sequence
that fails, and says how to play it again."""

from __future__ import annotations

import faulthandler
import os
import pickle
import re
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from . import checkpoints, gradients, memory, state, steps  # noqa: F401  they register their own
from .registry import OPERATIONS
from .world import Draw, World

LENGTH = 40  # operations of a sequence
BATCH = 50  # sequences of a process
LIMIT_S = 60  # for a sequence: one that takes longer hangs


class Sequence(NamedTuple):
    """Twins and what is done to them: the same wherever it is played."""

    variant: str
    seed: int  # of the twins
    operations: list[tuple[str, int]]  # each with its seed
    backend: str | None = None  # of the first twin

    @classmethod
    def drawn(
        cls, variant: str, seed: int, without: Iterable[str] = (), backend: str | None = None
    ) -> Sequence:
        draw = Draw(seed)
        its = {n: o.weight for n, o in OPERATIONS.items() if variant in o.variants}
        its = {name: weight for name, weight in its.items() if name not in set(without)}
        names = draw.choices(list(its), list(its.values()), k=LENGTH)
        return cls(variant, seed, [(name, draw.getrandbits(32)) for name in names], backend)

    @classmethod
    def parse(cls, words: list[str], backend: str | None) -> Sequence:
        pairs = [word.split(":") for word in words[2:]]
        return cls(words[0], int(words[1]), [(name, int(seed)) for name, seed in pairs], backend)

    def __str__(self) -> str:
        listed = " ".join(f"{name}:{seed}" for name, seed in self.operations)
        backend = f"--backend {self.backend} " if self.backend else ""
        return f"{backend}'{self.variant}' {self.seed} {listed}"


class Failure(NamedTuple):
    """Where a sequence went wrong, and how."""

    at: int
    what: str
    trace: str


class Result(NamedTuple):
    """Of a sequence: how many operations did something, and the failure if there was one."""

    done: int
    failure: Failure | None


def play(sequence: Sequence) -> Result:
    """Play a sequence in this process."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    done = 0
    try:
        world = World(sequence.variant, sequence.seed, sequence.backend)
        for i, (name, seed) in enumerate(sequence.operations):
            try:
                done += OPERATIONS[name](world, seed)
                world.compare()
            except BaseException as error:
                what = f"{type(error).__name__}: {error}"
                return Result(done, Failure(i, what, trace_of(error)))
    finally:
        faulthandler.cancel_dump_traceback_later()
    return Result(done, None)


def elsewhere(sequences: Iterable[Sequence]) -> Iterator[Result]:
    """Play sequences in another process until one fails.

    It is a fork, which is soon made: nothing here has started torch's threads, which would be lost
    in it. It writes nothing to standard error but what faulthandler says of a hang.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _send(sequences, writing)
        finally:
            os._exit(0)
    os.close(writing)
    ended = False
    try:
        with os.fdopen(reading, "rb") as results:
            while True:
                try:
                    result = pickle.load(results)
                except (EOFError, pickle.UnpicklingError):
                    break
                yield result
        ended = True
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        what = f"died of signal {-status}" if status < 0 else "hung"
        yield Result(0, Failure(LENGTH - 1, what, ""))


def _send(sequences: Iterable[Sequence], writing: int) -> None:
    with os.fdopen(writing, "wb") as out:
        for sequence in sequences:
            result = play(sequence)
            pickle.dump(result, out)
            out.flush()
            if result.failure:
                break


def fails(sequence: Sequence) -> Failure | None:
    (result,) = elsewhere([sequence])
    return result.failure


def shrink(sequence: Sequence, fails: Callable[[Sequence], Any] = fails) -> Sequence:
    """As short as leaving out operations makes it."""
    size = max(1, len(sequence.operations) // 2)
    while True:
        at = 0
        shorter = False
        while at < len(sequence.operations):
            operations = [*sequence.operations[:at], *sequence.operations[at + size :]]
            candidate = sequence._replace(operations=operations)
            if operations and fails(candidate):
                sequence, shorter = candidate, True
            else:
                at += size
        if size == 1 and not shorter:
            return sequence
        size = max(1, size // 2)


def trace_of(error: BaseException) -> str:
    """Where it happened; what it says is said elsewhere, and can be long."""
    return "".join(traceback.format_tb(error.__traceback__)[-3:]).rstrip()


def shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:300]} ... {text[-80:]}"


def report(sequence: Sequence, failure: Failure) -> str:
    lines = [f"{sequence.variant}, operation {failure.at + 1}: {shortened(failure.what)}"]
    lines += [f"  {i + 1}. {name}" for i, (name, _) in enumerate(sequence.operations)]
    lines.append(f"play it again: cd tests && python -m operations play {sequence}")
    return "\n".join(lines)


def shrunk_report(sequence: Sequence, failure: Failure) -> tuple[str, str]:
    """What is said of a failing sequence, and what kind of failure it is."""
    sequence = sequence._replace(operations=sequence.operations[: failure.at + 1])
    said = ["(not every time: from its threads, a timer, or where memory was)"]
    if any(fails(sequence) for _ in range(3)):
        sequence = shrink(sequence)
        again = fails(sequence)
        failure = again or failure
        said = [] if again else said
    kind = re.sub(r"\d|parameter|tensor.*", "", failure.what)[:70]
    return "\n".join([report(sequence, failure), *said, failure.trace]), kind


def run(
    variant: str,
    seed: int,
    number: int,
    without: Iterable[str] = (),
    backend: str | None = None,
    *,
    go_on: bool = False,
) -> int:
    """Play sequences until ``number`` operations did something; 1 if one failed."""
    first, done, kinds = seed, 0, set()
    while done < number:
        batch = [Sequence.drawn(variant, seed + i, without, backend) for i in range(BATCH)]
        for result in elsewhere(batch):
            done += result.done
            if result.failure:
                said, kind = shrunk_report(batch[seed - batch[0].seed], result.failure)
                if kind not in kinds:
                    print(f"seed {seed} fails\n{said}", flush=True)
                kinds.add(kind)
            seed += 1
            if done >= number or (kinds and not go_on):
                break
        if kinds and not go_on:
            break
    print(f"{variant}: {done} operations in {seed - first} sequences, seeds {first} to {seed - 1}")
    return 1 if kinds else 0
