"""`help()` of each class stands alone, and its example runs."""

from __future__ import annotations

import doctest
import inspect
import re
from typing import get_args

import pytest

from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda import lookahead as lookahead_module
from ranger_cuda import radam as radam_module
from ranger_cuda import ranger as ranger_module
from ranger_cuda.backends import support

CLASSES = [RAdam, Ranger, Lookahead]


def section(documented: type, title: str) -> str:
    text = inspect.getdoc(documented)
    return re.search(rf"^{title}:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)[1]


def arguments(documented: type) -> dict[str, str]:
    """The text of each argument, by its name."""
    found = re.findall(
        r"^    (\w+): (.*\n(?:     .*\n)*)", section(documented, "Args"), re.MULTILINE
    )
    return {name: " ".join(text.split()) for name, text in found}


@pytest.mark.parametrize("documented", CLASSES)
def test_help_has_every_argument_in_its_order_and_what_is_raised(documented):
    assert [*arguments(documented)] == [*inspect.signature(documented).parameters]
    raised = section(documented, "Raises")
    assert {"ValueError", "TypeError", "RuntimeError"} == {
        *re.findall(r"^    (\w+):", raised, re.M)
    }


def test_ranger_says_of_an_argument_what_radam_says():
    ranger, radam = arguments(Ranger), arguments(RAdam)
    differing = {name for name in radam if ranger[name] != radam[name]}
    assert differing == {"lr"}
    assert ranger["lr"].startswith(radam["lr"])


@pytest.mark.parametrize("documented", CLASSES)
def test_the_example_runs(documented):
    module = {RAdam: radam_module, Ranger: ranger_module, Lookahead: lookahead_module}[documented]
    (test,) = [
        test
        for test in doctest.DocTestFinder(recurse=False).find(documented, module=module, globs={})
        if test.examples
    ]
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 3
    assert result.failed == 0


def test_the_type_of_backend_is_the_support_table():
    assert get_args(support.BackendName) == (*support.BACKENDS,)
