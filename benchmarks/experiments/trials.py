"""Training several contestants side by side: the same start, the same batches, one step each in
turn, so that a busy machine slows them all alike."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import Job, tasks
from .contestants import Contestant, build


class Narrow(nn.Module):
    """A model whose parameters, and their gradients, are of a narrower dtype; its arithmetic is
    float32's, which is fast on any processor, and leaves nothing but storage to compare."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """As the model's."""
        wide = {name: param.float() for name, param in self.model.named_parameters()}
        return functional_call(self.model, wide, (inputs,))


class Trial:
    """One contestant's training, and its curve: one entry an evaluation in each list."""

    def __init__(self, task: tasks.Task, contestant: Contestant, seed: int, steps: int) -> None:
        self.task = task
        self.model = task.model(seed)
        if "dtype" in contestant:
            self.model = Narrow(self.model, getattr(torch, contestant["dtype"]))
        self.optimizer, self.schedule = build(contestant, self.model.parameters(), steps)
        self.curve: dict[str, list[float]] = {
            "train_loss": [],  # the mean since the last evaluation, in nats
            "validation_loss": [],
            "accuracy": [],  # on the held-out data
            "seconds": [],  # forward, backward and optimizer, since the start
        }
        self._losses: list[float] = []
        self._seconds = 0.0
        self._diverged = False

    def step(self, batch: tasks.Batch) -> None:
        """Take one step; none any more once the loss is not finite."""
        if self._diverged:
            return
        start = time.perf_counter()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._seconds += time.perf_counter() - start
        self.schedule.step()
        self._losses.append(loss.item())
        self._diverged = not math.isfinite(self._losses[-1])

    def evaluate(self) -> None:
        """Add to the curve; NaN where it has diverged."""
        loss, accuracy = self.task.evaluate(self.model)
        train_loss = sum(self._losses) / len(self._losses) if self._losses else math.nan
        self._losses = []
        values = (train_loss, loss, accuracy, self._seconds)
        for column, value in zip(self.curve.values(), values, strict=True):
            column.append(math.nan if self._diverged else value)


def run(job: Job) -> dict[str, Any]:
    """Train the job's ``contestants`` on its ``task`` and ``seed`` for ``steps`` steps."""
    task = tasks.load(job["task"])
    trials = [Trial(task, c, job["seed"], job["steps"]) for c in job["contestants"]]
    for step in range(job["steps"]):
        batch = task.batch(job["seed"], step)
        for trial in trials:
            trial.step(batch)
        if (step + 1) % job["evaluate_every"] == 0:
            for trial in trials:
                trial.evaluate()
    return {"curves": [trial.curve for trial in trials]}
