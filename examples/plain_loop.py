"""A plain loop: everything that a run is goes into one file, and it resumes with the same bits."""

from pathlib import Path

import torch
from torch import nn

from ranger_cuda import Ranger


def train(out: Path, steps: int, resume: bool = False) -> nn.Module:
    """Train until step ``steps``, from the start or from where ``out`` is."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = Ranger(model.parameters(), lr=4e-3, weight_decay=0.01)
    done = 0
    if resume:
        saved = torch.load(out / "run.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    for step in range(done, steps):
        inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "step": step + 1}, out / "new.pt")
            (out / "new.pt").replace(out / "run.pt")  # whole, whenever the process is killed
    return model


if __name__ == "__main__":
    train(Path("runs/plain"), 100)
