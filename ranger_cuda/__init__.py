"""ranger_cuda: Ranger (RAdam + Lookahead) for PyTorch as one fused multi-tensor step."""

from .lookahead import Lookahead
from .radam import RAdam
from .ranger import Ranger

__version__ = "0.1.0"
__all__ = ["Lookahead", "RAdam", "Ranger", "__version__"]
