"""FlashOptim without a GPU: its released kernels in Triton's interpreter, slowly.

For what it computes and keeps, not for its speed. FlashOptim refuses to run without CUDA; what it
asks is answered for it, within :func:`allowed`. Two things differ from a GPU:

- ``libdevice`` has no interpreter, so ``pow`` (for bias correction) and ``copysign`` are written
  in Triton's language here;
- the interpreter truncates to bfloat16 where a GPU rounds to nearest, so that only ``fused=False``,
  which leaves that to torch, moves weights as on a GPU. What is said of weights takes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch


@contextmanager
def allowed() -> Iterator[None]:
    """Let it run on the CPU, in a process that Triton interprets its kernels in."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("on a CPU it needs TRITON_INTERPRET=1 in the environment")
    import triton.language as tl
    from flashoptim import optimizers

    libdevice = SimpleNamespace(
        pow=lambda base, exponent: tl.exp2(exponent * tl.log2(base)),
        copysign=lambda magnitude, sign: tl.where(sign < 0, -magnitude, magnitude),
    )
    with ExitStack() as stack:
        change = stack.enter_context
        change(mock.patch.object(torch.cuda, "is_available", return_value=True))
        change(mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)))
        change(mock.patch.object(optimizers, "libdevice", libdevice))
        change(mock.patch.object(optimizers, "_get_sm_count", return_value=1))
        for kernel in vars(optimizers).values():
            if hasattr(kernel, "configs"):  # how large a block is; nothing to be tuned here
                change(mock.patch.object(kernel, "configs", kernel.configs[:1]))
        yield
