"""Ignite: an engine, whose Checkpoint handler saves, and resumes in mid-cycle."""

from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ranger_cuda import Ranger


def train(out: Path, steps: int, resume: bool = False) -> torch.nn.Module:
    """Train until step ``steps``, from the start or from where ``out`` is."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    optimizer = Ranger(model.parameters(), lr=4e-3)

    def step(engine, batch):
        generator = torch.Generator().manual_seed(engine.state.iteration)
        inputs = torch.randn(16, 8, generator=generator)
        loss = torch.nn.functional.cross_entropy(model(inputs), (inputs.sum(1) > 0).long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    trainer = Engine(step)
    parts = {"model": model, "optimizer": optimizer, "trainer": trainer}
    files = DiskSaver(out, create_dir=True, require_empty=False)
    saver = Checkpoint(parts, files, n_saved=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10), saver)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=steps), trainer.terminate)
    for path in out.glob("*.pt") if resume else ():
        Checkpoint.load_objects(parts, torch.load(path))
    trainer.run(range(5), max_epochs=20)
    return model


if __name__ == "__main__":
    train(Path("runs/ignite"), 20)
