"""fastai: a Learner around Ranger, whose hyperparameters fastai's schedules set."""

from functools import partial
from pathlib import Path

import torch
from fastai.basics import DataLoader, DataLoaders, Learner, OptimWrapper

from ranger_cuda import Ranger


def train(out: Path, steps: int, resume: bool = False) -> torch.nn.Module:
    """Train until step ``steps``, from the start or from where ``out`` is."""
    torch.manual_seed(0)
    inputs = torch.randn(32, 8)
    data = list(zip(inputs, (inputs.sum(1) > 0).long(), strict=True))
    loaders = DataLoaders(DataLoader(data, bs=32), DataLoader(data, bs=32))  # a step an epoch
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    learner = Learner(
        loaders,
        model,
        loss_func=torch.nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=Ranger, weight_decay=0.01),
        lr=4e-3,
        path=out,
    )
    first_step = 0
    if resume:
        learner.create_opt()
        learner.load("last", with_opt=True)
        first_step = torch.load(out / "step.pt")
    with learner.no_logging():
        learner.fit(steps - first_step)
    learner.save("last", with_opt=True)
    torch.save(steps, out / "step.pt")
    return learner.model


if __name__ == "__main__":
    train(Path("runs/fastai"), 20)
