"""timm: Ranger by name, from its factory of optimizers, with its rules for weight decay."""

from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ranger_cuda.integrations.timm import register_timm


def train(out: Path, steps: int, resume: bool = False) -> nn.Module:
    """Train until step ``steps``, from the start or from where ``out`` is."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    register_timm()
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    optimizer = create_optimizer_v2(model, opt="rangercuda", lr=4e-3, weight_decay=0.05, k=6)
    done = 0
    if resume:
        saved = torch.load(out / "run.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    for step in range(done, steps):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        wanted = (images.mean((1, 2, 3)) > 0).long()
        nn.functional.cross_entropy(model(images), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "step": step + 1}, out / "new.pt")
            (out / "new.pt").replace(out / "run.pt")  # whole, whenever the process is killed
    return model


if __name__ == "__main__":
    train(Path("runs/timm"), 100)
