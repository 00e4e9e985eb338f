"""Parameter shapes to step over: the published models' own, and sets that isolate one cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = list[tuple[int, ...]]
WIDE = 16  # bytes of an access


class Placed(NamedTuple):
    """How tensors lie, as :func:`random_tensors` has it."""

    params: Sequence[int] | None = None
    gradients: Sequence[int] | None = None


def resnet50() -> Shapes:
    """ResNet-50 (He et al., 2015, table 1): bottlenecks of 1x1, 3x3, 1x1 convolutions."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            if block == 0:
                convolutions.append((out, channels, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]  # and its batch norm
            channels = out
    return [*shapes, (1000, 2048), (1000,)]


def transformer(
    layers: int, width: int, hidden: int, vocabulary: int, context: int, classes: int = 0
) -> Shapes:
    """Pre-norm blocks with biases: GPT-2 (vocabulary and context), ViT (patches and classes)."""
    block: Shapes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    shapes: Shapes = [(vocabulary, width), (context, width), *block * layers, (width,), (width,)]
    return [*shapes, (classes, width), (classes,)] if classes else shapes


def llama(layers: int, width: int, hidden: int, vocabulary: int, kv_width: int) -> Shapes:
    """Llama: grouped-query attention, gated MLP, no biases, tied embeddings."""
    attention: Shapes = [(width, width), (kv_width, width), (kv_width, width), (width, width)]
    mlp: Shapes = [(hidden, width), (hidden, width), (width, hidden)]
    return [(vocabulary, width), *(attention + mlp + [(width,), (width,)]) * layers, (width,)]


WORKLOADS: dict[str, Shapes] = {
    "1e9": [(8192, 8192)] * 15,
    "2.5e8": [(4096, 4096)] * 15,
    "64 x 1024^2": [(1024, 1024)] * 64,
    "64 x 1024^2 gradients odd": [(1024, 1024)] * 64,
    "64 x 1024^2 all odd": [(1024, 1024)] * 64,
    "64 x 1024^2 every other odd": [(1024, 1024)] * 64,
    "64 x (1024^2+1)": [(1024 * 1024 + 1,)] * 64,
    "64 x (1024^2+1) flat": [(1024 * 1024 + 1,)] * 64,
    "1000 x 64^2": [(64, 64)] * 1000,
    "1000 x 1024": [(1024,)] * 1000,
    "1000 x 1": [(1,)] * 1000,
    "10000 x 512": [(512,)] * 10000,
    "resnet50": resnet50(),
    "gpt2": transformer(12, 768, 3072, 50257, 1024),
    "vit-l/16": transformer(24, 1024, 4096, 16 * 16 * 3, 197, classes=1000),
    "llama-1b": llama(16, 2048, 8192, 128256, 512),
}
# Views of one buffer, most of them at an address that no wide access can take, while the state's
# are even. Flat ones have no gaps, and gradients lie otherwise than parameters.
PLACED = {
    "64 x 1024^2 gradients odd": Placed(None, (1, 3)),
    "64 x 1024^2 all odd": Placed((1, 3), (1, 3)),
    "64 x 1024^2 every other odd": Placed((0, 1), (0, 1)),
    "64 x (1024^2+1) flat": Placed((0, 1, 2, 3), (1, 2, 3, 0)),
}
# On a CPU those that fit several optimizers' states into a small machine's memory and a coffee
# break. On a GPU the most telling first: a run that ends early has them.
DEFAULT = {
    "cpu": ["64 x 1024^2", "1000 x 64^2", "1000 x 1", "resnet50"],
    "cuda": [
        "1e9",
        "64 x 1024^2",
        "1000 x 1024",
        "1000 x 1",
        "64 x (1024^2+1)",
        "64 x (1024^2+1) flat",
        "resnet50",
        "gpt2",
        "64 x 1024^2 gradients odd",
        "64 x 1024^2 all odd",
        "64 x 1024^2 every other odd",
        "10000 x 512",
        "llama-1b",
        "vit-l/16",
    ],
}


def random_tensors(
    shapes: Shapes,
    device: torch.device,
    lanes: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Fresh random numbers.

    Args:
        lanes: of views into one buffer, how many elements behind a 16-byte boundary each starts, in
            turn; None: all have memory of their own.
    """
    if lanes is None:
        return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    spans, end = [], 0
    for i, shape in enumerate(shapes):
        start = end + (lanes[i % len(lanes)] - end) % (WIDE // dtype.itemsize)
        end = start + prod(shape)
        spans.append((start, end))
    buffer = torch.randn(end, device=device, dtype=dtype)
    return [buffer[slice(*span)].view(shape) for span, shape in zip(spans, shapes, strict=True)]
