"""A small GPT over bytes: pre-norm transformer blocks in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256  # every byte is a token: no tokenizer to download


class Shape(NamedTuple):
    """The size of a model."""

    layers: int
    heads: int
    width: int
    context: int


SHAPES = {
    "tiny": Shape(layers=2, heads=2, width=64, context=64),
    "small": Shape(layers=4, heads=4, width=128, context=128),
    "medium": Shape(layers=6, heads=6, width=384, context=256),
    "large": Shape(layers=12, heads=12, width=768, context=512),
}


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a norm and a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = x + self._attention(self.attention_norm(x))
        return x + self.contract(F.gelu(self.expand(self.feed_forward_norm(x))))

    def _attention(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).flatten(-2))


class GPT(nn.Module):
    """Bytes of shape (batch, time) to logits of shape (batch, time, 256)."""

    block = Block

    def __init__(self, shape: Shape, seed: int) -> None:
        """Initialise as GPT-2 does, from ``seed`` alone: the same weights for every optimizer."""
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, shape.width)
        self.position_embedding = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(self.block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)

        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attention_out.weight", "contract.weight"))
                std = 0.02 / math.sqrt(2 * shape.layers) if into_residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the byte after each one, from it and those before it."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        return self.head(self.norm(self.blocks(x)))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the next byte, in nats."""
        return next_byte_loss(self(inputs), targets)


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats: of (batch, time, 256) and (batch, time)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
