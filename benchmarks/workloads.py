"""Parameter shapes to step over: the published models' own, and sets that isolate one cost."""

from __future__ import annotations

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
    "64 x 1024^2": [(1024, 1024)] * 64,
    "1000 x 64^2": [(64, 64)] * 1000,
    "1000 x 1": [(1,)] * 1000,
    "resnet50": resnet50(),
    "gpt2": transformer(12, 768, 3072, 50257, 1024),
    "vit-l/16": transformer(24, 1024, 4096, 16 * 16 * 3, 197, classes=1000),
    "llama-1b": llama(16, 2048, 8192, 128256, 512),
}
# Those that fit several optimizers' states into a small machine's memory and a coffee break.
CPU_DEFAULT = ["64 x 1024^2", "1000 x 64^2", "1000 x 1", "resnet50"]
