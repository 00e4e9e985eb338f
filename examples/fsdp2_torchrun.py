"""FSDP2 under torchrun, with checkpoints of torch.distributed.checkpoint::

torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py runs/fsdp2 100
torchrun --nproc-per-node 4 examples/fsdp2_torchrun.py runs/fsdp2 200 --resume
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ranger_cuda import Ranger


def train(out: Path, steps: int, resume: bool = False) -> nn.Module:
    """Train until step ``steps``, from the start or from the checkpoint in ``out``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).to(device)
    fully_shard(model, mesh=init_device_mesh(device, (world,)))
    optimizer = Ranger(model.parameters(), lr=4e-3, weight_decay=0.01)
    done = torch.tensor(0)
    if resume:  # from the last that is whole: what describes it is written at its end
        last = max(out.glob("step-*/.metadata")).parent
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state, "step": done}, checkpoint_id=last)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in range(int(done), steps):
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(step)).to(device)
        own = inputs[rank::world]
        (model(own) - own.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            weights, state = get_state_dict(model, optimizer)
            run = {"model": weights, "optimizer": state, "step": torch.tensor(step + 1)}
            dcp.save(run, checkpoint_id=out / f"step-{step + 1:06}")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--resume", action="store_true")
    dist.init_process_group()
    train(**vars(parser.parse_args()))
    dist.destroy_process_group()
