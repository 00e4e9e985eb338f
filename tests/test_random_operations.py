"""Random operations on an optimizer and on its reference, in the package ``operations``.

More of them, once: ``RANGER_OPERATIONS=200000 python -m pytest tests/test_random_operations.py``.
A failure says which operations it takes, and how to play them again.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from expendable import UNFORGIVING
from operations.registry import EVERY, OPERATIONS
from operations.runner import Sequence, shrink

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="plays in forked processes")
NUMBER = int(os.environ.get("RANGER_OPERATIONS", 5600)) // len(EVERY)
SEED = 0 if "CI" in os.environ else random.randrange(10**6)


def python(*arguments: str) -> tuple[int, str]:
    """Run Python beside the tests, in a process that has not started torch's threads."""
    env = {**os.environ, **UNFORGIVING, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *arguments]
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=here)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("variant", EVERY)
def test_whatever_is_done_to_an_optimizer_it_goes_on_as_the_reference(variant):
    arguments = ["run", variant, "--seed", str(SEED), "--operations", str(NUMBER)]
    code, said = python("-m", "operations", *arguments)
    assert code == 0, said


FAULTS = {
    # A root that is not correctly rounded: one bit in few elements.
    "a rounding": "reference.sqrt = torch.sqrt",
    "Lookahead": "reference.lookahead = lambda p, slow, alpha: slow.copy_(p)",
    "a crash": "reference.lookahead = lambda p, slow, alpha: os.abort()",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_shrunk_and_played_again(fault):
    kept = {"give_gradients_and_step", "several_steps", "zero_grad", "parameters_are_reordered"}
    program = (
        "import os, sys, torch\n"
        "from ranger_cuda.backends import reference\n"
        "from operations import runner\n"
        f"{FAULTS[fault]}\n"
        f"sys.exit(runner.run('Ranger', 2, 2000, {sorted(OPERATIONS.keys() - kept)}))\n"
    )
    code, said = python("-c", program)
    assert code == 1, said
    (replay,) = [line for line in said.splitlines() if line.startswith("play it again")]
    assert 1 <= replay.count("step") < 20, said
    assert "zero_grad" not in replay, said
    assert ("died of signal 6" in said) == (fault == "a crash"), said


def test_shrinking_keeps_what_a_failure_takes():
    operations = [(name, i) for i, name in enumerate("abcdefghijklmnop")]
    found = shrink(
        Sequence("Ranger", 0, operations),
        lambda candidate: {"c", "n"} <= {name for name, _ in candidate.operations},
    )
    assert found.operations == [("c", 2), ("n", 13)]
