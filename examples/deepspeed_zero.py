"""DeepSpeed: Ranger as the client optimizer under ZeRO, on one process or on those of torchrun::

torchrun --nproc-per-node 2 examples/deepspeed_zero.py
"""

import os
from pathlib import Path

import deepspeed
import torch

from ranger_cuda import Ranger


def train(out: Path, steps: int, resume: bool = False, stage: int = 1) -> torch.nn.Module:
    """Train until step ``steps``, from the start or from where ``out`` is."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=Ranger(model.parameters(), lr=4e-3),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": True},
        },
    )
    first_step = 0
    if resume:
        _, client = engine.load_checkpoint(str(out))
        first_step = client["step"]
    for step in range(first_step, steps):
        seed = step * engine.world_size + engine.global_rank
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        targets = (inputs.sum(1) > 0).long()
        engine.backward(
            torch.nn.functional.cross_entropy(engine(inputs.bfloat16()).float(), targets)
        )
        engine.step()
        if (step + 1) % 10 == 0:
            engine.save_checkpoint(str(out), client_state={"step": step + 1})
    return model


if __name__ == "__main__":
    train(Path("runs/deepspeed"), 20)
