"""Optimizers that Lookahead is put around, and Lookahead written out."""

from __future__ import annotations

import pytest
import torch
from torch import optim

from optimizer_infos import set_grads
from ranger_cuda import RAdam

SHAPES = ((5, 4), (3, 1), (1, 7))
INNER = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, alpha=0.7, centered=True),  # its own "alpha"
    "ASGD": lambda p: optim.ASGD(p, lr=0.01),  # and another
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),  # its state is there from the start
    "Rprop": lambda p: optim.Rprop(p),
    "Muon": lambda p: optim.Muon(p, lr=0.01),
    "torch RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3),
    "RAdam": lambda p: RAdam(p, lr=0.01, weight_decay=0.1),
}
each_inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER)
K, ALPHA = 3, 0.8


class WrittenOut:
    """Lookahead, Algorithm 1, around an optimizer of its own."""

    def __init__(self, params, make):
        self.params, self.inner, self.t = params, make(params), 0
        self.slow = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step(closure)
        self.t += 1
        if self.t % K == 0:
            for slow, param in zip(self.slow, self.params, strict=True):
                slow.add_(ALPHA * (param - slow))
                param.copy_(slow)


def step_on(optimizer, params, step):
    """Fixed gradients; within a closure, as LBFGS wants it and the others allow."""

    def closure():
        set_grads(params, step)
        return sum((p.detach() * p.grad).sum() for p in params)

    return optimizer.step(closure)


def raising(*_):
    raise StopIteration
