"""Runs that are saved and go on: parameters of every dtype, gradients of a step, and files."""

from __future__ import annotations

import io

import torch

from helpers import give_gradients

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def gradients(step, params):
    generator = torch.Generator().manual_seed(step)
    made = [torch.randn(p.shape, generator=generator, dtype=p.dtype.to_complex()) for p in params]
    return [g if p.is_complex() else g.real.to(p.dtype) for g, p in zip(made, params, strict=True)]


def train(optimizer, params, steps):
    for step in steps:
        give_gradients(gradients(step, params), params)
        optimizer.step()
    return optimizer


def make(dtypes=DTYPES):
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (7,), (4, 3, 2, 2)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype.to_complex()).to(dtype)
        if dtype.is_complex
        else torch.randn(shape, generator=generator).to(dtype)
        for dtype in dtypes
        for shape in shapes
    ]


def through_a_file(state, **options):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)
