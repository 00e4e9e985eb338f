"""fastai: a Learner around Ranger, whose hyperparameters fastai's schedules set."""

from functools import partial
from pathlib import Path

import torch
from fastai.basics import DataLoader, DataLoaders, Learner, OptimWrapper
from fastai.callback.tracker import SaveModelCallback

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
        cbs=SaveModelCallback(every_epoch=10, with_opt=True),
    )
    first_step = 0
    if resume:
        last = max(learner.path.glob("models/model_*.pth"), key=lambda path: path.stat().st_mtime)
        learner.create_opt()
        learner.load(last.stem, with_opt=True)
        first_step = int(last.stem.split("_")[1]) + 1
    with learner.no_logging():
        learner.fit(steps, start_epoch=first_step)
    return learner.model


if __name__ == "__main__":
    train(Path("runs/fastai"), 20)
