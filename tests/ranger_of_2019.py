"""lessw2020's Ranger, to migrate from: no package has it."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer


class RangerOf2019(Optimizer):
    """lessw2020's Ranger as its repository states the update, without gradient centralization."""

    def __init__(self, params, lr=1e-3, alpha=0.5, k=6, threshold=5, betas=(0.95, 0.999), **rest):
        defaults = {"lr": lr, "alpha": alpha, "k": k, "step_counter": 0, "betas": betas}
        defaults |= {"N_sma_threshhold": threshold, "eps": 1e-5, "weight_decay": 0.0, **rest}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            n_max = 2 / (1 - beta2) - 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                    state.update(step=0, slow_buffer=p.clone(), **zeros)
                state["step"] += 1
                t = state["step"]
                m, v, slow = (state[key] for key in ("exp_avg", "exp_avg_sq", "slow_buffer"))
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                n = n_max - 2 * t * beta2**t / (1 - beta2**t)
                p.mul_(1 - group["weight_decay"] * group["lr"])
                size = group["lr"] / (1 - beta1**t)
                if n > group["N_sma_threshhold"]:
                    size *= math.sqrt(
                        (1 - beta2**t) * (n - 4) * (n - 2) * n_max / ((n_max - 4) * n * (n_max - 2))
                    )
                    p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-size)
                else:
                    p.add_(m, alpha=-size)
                if t % group["k"] == 0:
                    slow.add_(p - slow, alpha=group["alpha"])
                    p.copy_(slow)
