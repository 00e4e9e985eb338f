"""ranger_cuda: Ranger (RAdam + Lookahead) for PyTorch as one fused multi-tensor step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert_checkpoint
    from .diloco import DiLoCo
    from .distributed import load_distributed_checkpoint
    from .lookahead import Lookahead
    from .radam import RAdam
    from .ranger import Ranger

__version__ = "0.1.0"
__all__ = [
    "DiLoCo",
    "Lookahead",
    "RAdam",
    "Ranger",
    "__version__",
    "convert_checkpoint",
    "load_distributed_checkpoint",
]
_MODULES = {"convert_checkpoint": "convert", "load_distributed_checkpoint": "distributed"}


# Not until one is asked for: the command line answers Ctrl-C, --help and --version before torch,
# which takes seconds, is imported.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, name.lower())
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
