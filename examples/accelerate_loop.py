"""Accelerate: the loop as it is, prepared for whatever machine it runs on."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ranger_cuda import Ranger


def train(out: Path, steps: int, resume: bool = False) -> nn.Module:
    """Train until step ``steps``, from the start or from the state in ``out``."""
    torch.manual_seed(0)
    inputs = torch.randn(320, 8)
    data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    accelerator = Accelerator()
    model, optimizer, data = accelerator.prepare(
        model, Ranger(model.parameters(), lr=4e-3, weight_decay=0.01), data
    )
    done = 0
    if resume:
        accelerator.load_state(str(out))
        done = int((out / "step").read_text())
    for batch, targets in accelerator.skip_first_batches(data, done):
        if done == steps:
            break
        accelerator.backward(nn.functional.mse_loss(model(batch), targets))
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done % 10 == 0:
            accelerator.save_state(str(out))
            (out / "step").write_text(str(done))
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    train(Path("runs/accelerate"), 40)
