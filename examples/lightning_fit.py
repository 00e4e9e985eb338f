"""Lightning: validated and saved on the slow weights, resumed from the fast ones."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ranger_cuda import Ranger
from ranger_cuda.integrations.lightning import SlowWeightsCallback


class Regression(LightningModule):
    """A sum, learned."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("validation_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Ranger:
        return Ranger(self.parameters(), lr=4e-3, weight_decay=0.01, eval_with_slow_weights=True)


def train(out: Path, steps: int, resume: bool = False) -> nn.Module:
    """Train until step ``steps``, from the start or from the last checkpoint in ``out``."""
    torch.manual_seed(0)
    inputs = torch.randn(80, 8)
    data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)
    model = Regression()
    best = ModelCheckpoint(dirpath=out, monitor="validation_loss", save_last=True)
    trainer = Trainer(
        max_steps=steps, callbacks=[SlowWeightsCallback(), best], logger=False, accelerator="auto",
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, data, data, ckpt_path=str(out / "last.ckpt") if resume else None)
    return model


if __name__ == "__main__":
    train(Path("runs/lightning"), 100)
