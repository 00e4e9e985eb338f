"""skorch: a scikit-learn estimator that trains with Ranger."""

from pathlib import Path

import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, GradientNormClipping

from ranger_cuda import Ranger


def train(out: Path, steps: int, resume: bool = False) -> torch.nn.Module:
    """Train until step ``steps``, from the start or from where ``out`` is."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    targets = (inputs.sum(1) > 0).long()
    saver = Checkpoint(lambda net: len(net.history) % 10 == 0, dirname=str(out))
    net = NeuralNetClassifier(
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)),
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=Ranger,
        lr=4e-3,
        optimizer__weight_decay=0.01,
        batch_size=64,  # a step an epoch
        train_split=None,
        callbacks=[GradientNormClipping(1.0), saver],
        verbose=0,
    ).initialize()
    if resume:
        net.load_params(checkpoint=saver)
    net.partial_fit(inputs, targets, epochs=steps - len(net.history))
    with net.optimizer_.slow_weights():
        print("accuracy", net.score(inputs, targets))
    return net.module_


if __name__ == "__main__":
    train(Path("runs/skorch"), 20)
