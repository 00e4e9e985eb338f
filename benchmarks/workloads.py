"""Parameter shapes to step over: the published models' own, and sets that isolate one cost."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

Shapes = list[tuple[int, ...]]


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
# Parameters are neighbours in one buffer, and gradients in another, so that most of them start at
# an address that no wide access can take while the state's addresses are even.
FLAT = {"64 x (1024^2+1) flat"}
# Those that fit several optimizers' states into a small machine's memory and a coffee break.
CPU_DEFAULT = ["64 x 1024^2", "1000 x 64^2", "1000 x 1", "resnet50"]
# The most telling first: a run that ends early has them.
GPU_DEFAULT = [
    "1e9",
    "64 x 1024^2",
    "1000 x 1024",
    "1000 x 1",
    "64 x (1024^2+1)",
    "64 x (1024^2+1) flat",
    "resnet50",
    "gpt2",
    "10000 x 512",
    "llama-1b",
    "vit-l/16",
]


def random_tensors(shapes: Shapes, device: torch.device, flat: bool = False) -> list[Tensor]:
    """Fresh random numbers; ``flat``: views into one buffer, without gaps."""
    if not flat:
        return [torch.randn(shape, device=device) for shape in shapes]
    sizes = [prod(shape) for shape in shapes]
    parts = torch.randn(sum(sizes), device=device).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
