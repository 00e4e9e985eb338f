"""Optimizers that release gradients, and the same training loop with and without."""

from __future__ import annotations

import copy

import torch

from helpers import assert_same_bits, twin

STEPS = 7  # beyond t = 5, where RAdam begins to rectify
OPTIONS = {"lr": 0.05, "k": 3, "weight_decay": 0.1}
SHAPES = ((7, 5), (1,), (), (0, 3), (2, 3, 4), (131,))


def tensors(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradient(param, step, i=0):
    generator = torch.Generator().manual_seed(100 * step + i)
    value = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    return value.to(param.dtype).to(param.device)


def backward(params, step, resting=(), retain_graph=False):
    """A backward pass after which these have just these gradients."""
    moving = [i for i in range(len(params)) if i not in resting]
    total = sum((params[i] * gradient(params[i], step, i)).sum().real.double() for i in moving)
    total.backward(retain_graph=retain_graph)
    return total


def in_groups(params):
    """Two groups, the second of which has other hyperparameters."""
    half = len(params) // 2
    centralize = None if any(param.is_complex() for param in params) else "all"
    second = {"lr": 0.01, "seed": 7, "bounds": (-0.5, 0.5), "centralize": centralize}
    return [{"params": params[:half]}, {"params": params[half:], **second}]


def run(optimizer, params, steps=range(STEPS), resting=lambda step: ()):
    """Steps as they are without release, and the loop that goes on to work with it."""
    for step in steps:
        optimizer.zero_grad()
        backward(params, step, resting(step))
        optimizer.step()


def released(optimizer):
    """An optimizer that releases gradients, and the handle."""
    return optimizer, optimizer.release_gradients()


def unchanged(optimizer, params):
    """A function that asserts that nothing has changed since."""
    before = [twin(p.detach()) for p in params]
    states = copy.deepcopy([optimizer.state.get(p) for p in params])

    def check():
        for i, (p, value, state) in enumerate(zip(params, before, states, strict=True)):
            assert_same_bits(p, value, f"parameter {i}")
            now = optimizer.state.get(p)
            assert (now is None) == (state is None), i
            for name in state or ():
                assert_same_bits(now[name], state[name], f"{name} of parameter {i}")

    return check
