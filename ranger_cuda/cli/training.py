"""Training several models side by side: the same start, the same batches, one optimizer each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch

from . import corpus
from .gpt import GPT, next_byte_loss
from .optimizers import OPTIMIZERS
from .parallel import PartialSums, Ranks
from .settings import Settings

SMOOTHING = 20  # steps: the loss of a single batch says little


@dataclass
class History:
    """What was measured, one entry a step, and one an evaluation."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # forward, backward and optimizer
    optimizer_seconds: list[float] = field(default_factory=list)
    evaluated_at: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    slow_validation_loss: list[float] = field(default_factory=list)  # empty without Lookahead

    @property
    def recent_loss(self) -> float:
        """The mean training loss of the last steps."""
        return fmean(self.loss[-SMOOTHING:]) if self.loss else float("nan")


class Run:
    """One optimizer's training: a model, the optimizer's state and the history."""

    def __init__(self, name: str, settings: Settings, ranks: Ranks | None = None) -> None:
        self.name = name
        self.ranks = ranks or Ranks()
        self.device = torch.device(settings.device)
        model = GPT(settings.shape, settings.seed)
        self.model = model.to(self.device, getattr(torch, settings.dtype))
        self._forward = self.ranks.spread(self.model, [*self.model.blocks], self.device)
        choice = OPTIMIZERS[name]
        storage = settings.storage if choice.takes_storage else {}
        if storage and self.ranks.parallel == "fsdp":
            self.ranks.check_shards([*self.model.parameters()], storage)
        self.optimizer = choice.build(self.model.parameters(), settings.lr[name], **storage)
        self.history = History()

    def step(self, batch: corpus.Batch) -> None:
        """Take one optimizer step and record its loss and its times."""
        start = self._now()
        losses = self._backward(self.ranks.cut(batch))
        before = self._now()
        self.optimizer.step()
        end = self._now()
        self.optimizer.zero_grad()
        self.history.loss.append(fmean(self.ranks.gathered([loss.item() for loss in losses])))
        self.history.seconds.append(end - start)
        self.history.optimizer_seconds.append(end - before)

    def _backward(self, slices: list[corpus.Batch]) -> list[torch.Tensor]:
        """The losses of this rank's slices; their gradient is the mean over all ranks' slices."""
        params = [*self.model.parameters()]
        sums = PartialSums()
        losses = []
        for inputs, targets in slices:
            loss = next_byte_loss(self._forward(inputs), targets)
            loss.backward()
            losses.append(loss.detach())
            if len(slices) > 1:
                sums.add([param.grad for param in params])
                self.optimizer.zero_grad()
        if len(slices) > 1:
            for param, total in zip(params, sums.total(), strict=True):
                param.grad = total
        if self.ranks.slices > 1:
            for param in params:
                if param.grad is not None:
                    param.grad.div_(self.ranks.slices)
        return losses

    def evaluate(self, batches: list[corpus.Batch]) -> None:
        """Record the loss on held-out text, and on the slow weights where there are any."""
        history = self.history
        history.evaluated_at.append(len(history.loss))
        history.validation_loss.append(self._mean_loss(batches))
        if hasattr(self.optimizer, "slow_weights"):
            with self.optimizer.slow_weights(self.model):
                history.slow_validation_loss.append(self._mean_loss(batches))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, and the history; of one of several ranks
        the history alone."""
        history = {"history": asdict(self.history)}
        if not self.ranks.is_alone:
            return history
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"model": model, "optimizer": optimizer, **history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where :meth:`state_dict` was taken."""
        if self.ranks.is_alone:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])

    @torch.no_grad()
    def _mean_loss(self, batches: list[corpus.Batch]) -> float:
        losses = [self.model.loss(*batch).item() * len(batch.inputs) for batch in batches]
        return sum(losses) / sum(len(batch.inputs) for batch in batches)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def train(
    runs: list[Run],
    text: corpus.Corpus,
    settings: Settings,
    first_step: int,
    after_step: Callable[[int], bool],
) -> None:
    """Train every run, one step each in turn, so that a busy machine slows them all alike.

    Args:
        runs: at ``first_step``.
        text: what to train on.
        settings: of the run.
        first_step: how many steps the runs have behind them.
        after_step: called with the number of steps done; training ends when it returns False.
    """
    shape = {"batch_size": settings.batch_size, "context": settings.context}
    validation = [_to(batch, settings.device) for batch in corpus.validation_batches(text, **shape)]
    for run in runs:
        if first_step == settings.steps and run.history.evaluated_at[-1:] != [first_step]:
            run.evaluate(validation)  # it was to take more steps when it was saved
    for step in range(first_step, settings.steps):
        batch = corpus.training_batch(text, seed=settings.seed, step=step, **shape)
        batch = _to(batch, settings.device)
        done = step + 1
        for run in runs:
            run.step(batch)
            if done % settings.evaluate_every == 0 or done == settings.steps:
                run.evaluate(validation)
        if not after_step(done):
            return


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Make PyTorch return the same bits for the same run, for as long as this lasts."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    had_threads = torch.get_num_threads()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # costs time, changes nothing
    torch.set_num_threads(threads)  # how a sum is split decides how it rounds
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        memory.fill_uninitialized_memory = filled
        torch.set_num_threads(had_threads)


def _to(batch: corpus.Batch, device: str) -> corpus.Batch:
    return corpus.Batch(batch.inputs.to(device), batch.targets.to(device))
