"""torchtitan: its optimizers and schedulers, checkpointed by torch.distributed.checkpoint."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from ranger_cuda.integrations.torchtitan import RangerOptimizersContainer


def train(out: Path, steps: int, resume: bool = False) -> torch.nn.Module:
    """Train until step ``steps``, from the start or from where ``out`` is."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    ranger = {"lr": 4e-3, "weight_decay": 0.01}
    config = RangerOptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=r"bias$", optimizer_name="Ranger", optimizer_kwargs={"lr": 4e-3}
            ),
            ParamGroupConfig(pattern=".*", optimizer_name="Ranger", optimizer_kwargs=ranger),
        ]
    )
    optimizers = config.build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=3, decay_ratio=0.5).build(
        optimizers=optimizers, training_steps=20
    )
    parts = {"optimizer": optimizers, "lr_scheduler": schedulers, "model": model, "step": 0}
    if resume:
        dcp.load(parts, checkpoint_id=max(out.glob("step-*/.metadata")).parent)
    for step in range(parts["step"], steps):
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(inputs), (inputs.sum(1) > 0).long())
        loss.backward()
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()
        parts["step"] = step + 1
        if (step + 1) % 10 == 0:
            dcp.save(parts, checkpoint_id=out / f"step-{step + 1:06}")
    return model


if __name__ == "__main__":
    train(Path("runs/torchtitan"), 20)
