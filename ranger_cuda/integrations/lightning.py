"""Lightning: validation and checkpoints on the slow weights."""

from __future__ import annotations

from typing import Any

from ..state import eval_mode
from ..step.slow_weights import SlowWeights
from .missing import stand_in


def _base() -> Any:
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        try:
            from pytorch_lightning import Callback as OtherCallback
        except ImportError:
            return stand_in("SlowWeightsCallback", "lightning", error)
        return OtherCallback
    return Callback


class SlowWeightsCallback(_base()):  # type: ignore[misc]
    """Validate, and save, the slow weights of an optimizer with ``eval_with_slow_weights=True``::

        optimizer = Ranger(self.parameters(), lr=4e-3, eval_with_slow_weights=True)
        ...
        Trainer(callbacks=[SlowWeightsCallback(), ModelCheckpoint(monitor="validation_loss")])

    Training goes on from the fast weights, which a checkpoint has among the optimizer's state: a
    run that is resumed from it with ``ckpt_path`` has the bits of one that was not interrupted. The
    weights of every checkpoint that has the optimizer's state are slow ones, and after
    ``fit`` the model holds them, for ``Trainer.test``. With ``save_weights_only=True`` they are
    where ``ModelCheckpoint`` saves after validation; in other places Lightning asks no callback.

    Raises:
        ModuleNotFoundError: Lightning cannot be imported.
        ValueError: at the start of ``fit``: no optimizer has ``eval_with_slow_weights=True``.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to go on if nothing would be evaluated on slow weights."""
        if not _with_slow_weights(trainer):
            raise ValueError(
                "SlowWeightsCallback found no optimizer with eval_with_slow_weights=True; make it "
                "with Ranger(..., eval_with_slow_weights=True), or leave the callback out"
            )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Slow weights, until training goes on: ``ModelCheckpoint`` saves after validation."""
        if trainer.state.fn == "fit":  # elsewhere the weights are what the user asked for
            _evaluate(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Slow weights where Lightning saves in the middle of training."""
        evaluating = [
            eval_mode.is_on(each.param_groups, each._options)
            for each in _with_slow_weights(trainer)
        ]
        if trainer.state.fn != "fit" or all(evaluating):
            return
        _evaluate(trainer, pl_module)
        checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        checkpoint["optimizer_states"] = [
            trainer.strategy.optimizer_state(each) for each in trainer.optimizers
        ]

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fast weights."""
        for optimizer in _with_slow_weights(trainer):
            optimizer.train(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the slow weights in the model."""
        _evaluate(trainer, pl_module)


def _evaluate(trainer: Any, pl_module: Any) -> None:
    for optimizer in _with_slow_weights(trainer):
        optimizer.eval(pl_module)


def _with_slow_weights(trainer: Any) -> list[SlowWeights]:
    """The optimizers that opted in."""
    return [
        each
        for each in trainer.optimizers
        if isinstance(each, SlowWeights) and eval_mode.has_opted_in(each._options)
    ]
