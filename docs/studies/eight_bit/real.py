"""The codes on the gradients of a small real model: ``python docs/studies/eight_bit/real.py``.

300 steps of the GPT of ``benchmarks.experiments`` under RAdam with float32 moments. Its gradients
are replayed through the candidates of the plots. A minute; adds ``real`` to ``results.json``.
"""

from __future__ import annotations

from typing import Any

import report
import torch
from codes import GROUP, Candidate, candidates
from study import Bits
from torch import Tensor

from benchmarks.experiments import tasks
from ranger_cuda import RAdam

STEPS, LAST, BETA1, BETA2, EPS = 300, 100, 0.9, 0.999, 1e-8


def gradients() -> dict[str, list[Tensor]]:
    """Of each large parameter, by its name; the two layers' together."""
    task = tasks.load("gpt")
    model = task.model(0)
    optimizer = RAdam(model.parameters(), 1e-3)
    found: dict[str, list[Tensor]] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        task.loss(model, task.batch(0, step)).backward()
        optimizer.step()
        for name, param in model.named_parameters():
            if param.numel() >= 4096 and not name.startswith("blocks.1"):
                assert param.grad is not None
                found.setdefault(name, []).append(param.grad.flatten().clone())
    return found


def exact(grads: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """float32's m and v after each step."""
    m, v, found = torch.zeros_like(grads[0]), torch.zeros_like(grads[0]), []
    for g in grads:
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        found.append((m, v))
    return found


def spread(moments: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Of the last moments within groups that all have gradients."""
    m, root = moments[0].view(-1, GROUP).abs(), moments[1].view(-1, GROUP).sqrt()
    used = (root > 0).all(1)
    m, root = m[used], root[used]
    result = {"sigma": float(root.log().std(1).median()), "share": float(used.float().mean())}
    for name, x in (("m", m), ("root", root)):
        part = x / x.amax(1, keepdim=True)
        result[f"{name} below 2^-6"] = float((part < 2.0**-6).float().mean())
        result[f"{name} below 2^-9"] = float((part < 2.0**-9).float().mean())
    return result


def updates(candidate: Candidate, grads: list[Tensor], right: list[tuple[Tensor, Tensor]]) -> Any:
    """Bias and spread of u over all elements and the last steps, as in ``study.py``."""
    bits, m, v = Bits(candidate), torch.zeros_like(grads[0]), torch.zeros_like(grads[0])
    sums = torch.zeros(3, dtype=torch.float64)
    for step, g in enumerate(grads):
        m = BETA1 * candidate.m(m, bits(len(m))) + (1 - BETA1) * g
        v = BETA2 * candidate.v(v, bits(len(v))) + (1 - BETA2) * g * g
        if step >= STEPS - LAST:
            due = right[step][0] / (right[step][1].sqrt() + EPS)
            u = m / (v.sqrt() + EPS)
            sums += torch.stack([(u * due).sum(), (u * u).sum(), (due * due).sum()]).double()
    gain = sums[0] / sums[2]
    rest = (sums[1] / sums[2] - gain**2).clamp(min=0).sqrt()
    return {"bias": float(gain) - 1, "spread": float(rest)}


def main() -> None:
    """Train once, and replay."""
    result: dict[str, Any] = {}
    for name, grads in gradients().items():
        right = exact(grads)
        result[name] = spread(right[-1])
        result[name]["u"] = {c.name: updates(c, grads, right) for c in candidates() if c.in_plot}
        print(name, result[name], flush=True)
    report.save(real=result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
