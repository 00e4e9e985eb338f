"""Which 8-bit code to keep Adam's moments in: candidates side by side, on the same gradients.

``python docs/studies/eight_bit/study.py``, in a clone with the package installed, takes about six
minutes of one core. It writes ``results.json`` and the plots beside it, and prints the tables of
``README.md``. What ``peers.py`` has measured stays in the file.
"""

from __future__ import annotations

import math
import time
from typing import Any

import report
import torch
from codes import GROUP, Candidate, Round, candidates
from torch import Tensor

BETAS2 = report.BETAS2
BETA1, EPS = 0.95, 1e-8
COUNT = 1024  # elements of a case


class Bits:
    """16 bits for each element; always the same ones where rounding is to nearest."""

    def __init__(self, candidate: Candidate) -> None:
        self.stochastic = candidate.stochastic
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, count: int) -> Tensor:
        """The next ones."""
        if not self.stochastic:
            return torch.full((count,), 0x7FFF, dtype=torch.int32)
        return torch.randint(1 << 16, (count,), dtype=torch.int32, generator=self.generator)


def steady_and_decay(candidate: Candidate, beta2: float) -> dict[str, Any]:
    """Mean v in a time constant of normal gradients, and its decay over 3 without any.

    Both over float32's. The decay once in groups that get no gradients at all, with twenty points a
    time constant for the plot; and once beside one element of each group that goes on getting them,
    all alike.
    """
    generator, bits = torch.Generator().manual_seed(0), Bits(candidate)
    constant = round(1 / (1 - beta2))
    exact = torch.ones(COUNT)
    v, sums = candidate.v(exact, bits(COUNT)), torch.zeros(2)
    for step in range(constant):
        square = torch.randn(COUNT, generator=generator).square()
        exact = beta2 * exact + (1 - beta2) * square
        v = candidate.v(beta2 * v + (1 - beta2) * square, bits(COUNT))
        if step >= constant // 2:
            sums += torch.stack([v.mean(), exact.mean()])
    goes_on = torch.arange(COUNT) % GROUP == 0
    square = torch.cat([torch.zeros(COUNT), goes_on * 1.0])
    v = torch.cat([v, torch.ones(COUNT)])
    start, curve, frozen = v[:COUNT].mean(), [], False
    for i in range(3 * constant + 1):
        if i % max(1, constant // 20) == 0:
            curve.append(float(v[:COUNT].mean() / start))
        if i < 3 * constant and not frozen:
            before, v = v, candidate.v(beta2 * v + (1 - beta2) * square, bits(2 * COUNT))
            frozen = not candidate.stochastic and torch.equal(v, before)  # for good
    due = beta2 ** (3 * constant)
    return {
        "steady": float(sums[0] / sums[1]),
        "decay": float(v[:COUNT].mean() / start) / due,
        "decay beside": float(v[COUNT:][~goes_on].mean()) / due,
        "curve": curve,
    }


def tiny(candidate: Candidate, size: float = 1e-8, beta2: float = 0.999) -> dict[str, float]:
    """v after 300 steps of tiny gradients, over float32's; and how much of it is 0."""
    generator, bits = torch.Generator().manual_seed(0), Bits(candidate)
    v, exact = torch.zeros(COUNT), torch.zeros(COUNT)
    for _ in range(300):
        square = (size * torch.randn(COUNT, generator=generator)).square()
        exact = beta2 * exact + (1 - beta2) * square
        v = candidate.v(beta2 * v + (1 - beta2) * square, bits(COUNT))
    return {"mean": float(v.mean() / exact.mean()), "zero": float((v == 0).float().mean())}


def spreads() -> dict[str, Tensor]:
    """Sizes of gradients within groups: log-normal ones, and one element above all others."""
    normal = torch.randn(COUNT, generator=torch.Generator().manual_seed(1))
    found = {f"sigma {sigma:g}": torch.exp(sigma * normal) for sigma in (0, 0.75, 1.5, 3)}
    for outlier in (1e3, 1e5):
        found[f"outlier {outlier:g}"] = torch.where(torch.arange(COUNT) % GROUP == 0, outlier, 1.0)
    return found


def updates(candidate: Candidate, beta2: float = 0.999) -> dict[str, dict[str, float]]:
    """u = m / (sqrt(v) + eps) against float32's over 800 steps, after 1,200.

    Bias: by how much the part along the exact u is longer, on average over the elements (in groups
    with an outlier: the others). Spread: what is left, root mean square over that of u. Least: the
    bias of the tenth with the smallest gradients. Largest: |u| over the largest exact one.
    """
    generator, bits = torch.Generator().manual_seed(2), Bits(candidate)
    cases = spreads()
    size = torch.cat([*cases.values()])
    m, exact_m = torch.zeros_like(size), torch.zeros_like(size)
    v, exact_v = size.square(), size.square()
    along, across, square = (torch.zeros_like(size) for _ in range(3))
    largest = torch.zeros(2, len(size))
    for step in range(2000):
        g = size * torch.randn(len(size), generator=generator)
        m = BETA1 * candidate.m(m, bits(len(m))) + (1 - BETA1) * g
        v = beta2 * candidate.v(v, bits(len(v))) + (1 - beta2) * g * g
        exact_m = BETA1 * exact_m + (1 - BETA1) * g
        exact_v = beta2 * exact_v + (1 - beta2) * g * g
        if step >= 1200:
            u, exact = m / (v.sqrt() + EPS), exact_m / (exact_v.sqrt() + EPS)
            along += u * exact
            across += u * u
            square += exact * exact
            largest = torch.maximum(largest, torch.stack([u.abs(), exact.abs()]))
    result = {}
    for i, name in enumerate(cases):
        here = slice(i * COUNT, (i + 1) * COUNT)
        ordinary = size[here] < 1e3 if "outlier" in name else size[here] > 0
        gain = (along[here] / square[here])[ordinary]
        left = across[here] - along[here] ** 2 / square[here]
        order = size[here][ordinary].argsort(stable=True)
        result[name] = {
            "bias": float(gain.mean()) - 1,
            "spread": math.sqrt(left[ordinary].clamp(min=0).sum() / square[here][ordinary].sum()),
            "least": float(gain[order[: len(order) // 10]].mean()) - 1,
            "largest": float(largest[0, here].max() / largest[1, here].max()),
        }
    return result


def special(candidate: Candidate) -> dict[str, bool]:
    """What becomes of values that are no ordinary numbers."""

    def read(code: Round, fill: float, first: float) -> Tensor:
        value = torch.full((256,), fill)
        value[0] = first
        return code(value, torch.full((256,), 0x7FFF, dtype=torch.int32))

    pairs = [(candidate.m, 0.5), (candidate.v, 0.5)]
    infinite, nan = ([read(c, fill, x) for c, fill in pairs] for x in (math.inf, math.nan))
    return {
        "infinity": all(bool(x[0].isinf()) for x in infinite),
        "nan": all(bool(x[0].isnan()) for x in nan),
        "neighbours": all(bool((x[1][1:] > 0).all()) for x in (infinite, nan)),
        "denormal": bool((read(candidate.v, 1e-40, 1e-40) > 0).all()),
    }


def measure() -> dict[str, Any]:
    """Everything, of every candidate."""
    result = {}
    for c in candidates():
        begin = time.perf_counter()
        result[c.name] = {
            "bytes": c.bytes,
            "in plots": c.in_plot,
            "beta2": {str(beta2): steady_and_decay(c, beta2) for beta2 in BETAS2},
            "tiny": tiny(c),
            "u": updates(c),
            "special": special(c),
        }
        print(f"{c.name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    report.save(torch=torch.__version__, codes=measure())
