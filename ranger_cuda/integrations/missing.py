"""What is said where a trainer is not installed."""

from __future__ import annotations

from typing import Any, NoReturn


def refuse(what: str, package: str, error: ImportError) -> NoReturn:
    """Raise ``ModuleNotFoundError``, which says what to install for ``what``."""
    raise ModuleNotFoundError(
        f"{what} needs {package}, which cannot be imported here ({error}): pip install {package}"
    ) from error


def stand_in(what: str, package: str, error: ImportError) -> type[Any]:
    """A base class in place of one that cannot be imported: making an object of it says why."""

    class Missing:
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # a dataclass has another __init__
            refuse(what, package, error)

    return Missing
