"""``python -m ranger_cuda``, and the command ``ranger-cuda``: see :mod:`ranger_cuda.cli`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
