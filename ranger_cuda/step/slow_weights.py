"""Evaluation on the slow weights: swapped in, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any

import torch

from ..state import eval_mode
from ..state.tensors import DTensor, FSDPModule, is_fsdp1_s
from .algorithms import members
from .dispatch import Dispatcher
from .interrupts import Deferred, insist
from .swaps import put_back, set_aside


class SlowWeights:
    """What an optimizer with slow weights adds to ``torch.optim.Optimizer``."""

    param_groups: list[dict[str, Any]]
    state: Any
    _dispatcher: Dispatcher
    _options: dict[str, Any]
    _slow_weights_are_in = False

    def slow_weights(self, model: torch.nn.Module | None = None) -> AbstractContextManager[None]:
        """Evaluate on the slow weights::

            with optimizer.slow_weights():
                validate(model)

        BatchNorm's running statistics stay those of the fast weights: run some batches first, with
        ``torch.optim.swa_utils.update_bn(batches, model)`` within the context. They stay as that
        leaves them, and training updates them as ever.

        Under FSDP2 (``fully_shard``) it is ``optimizer.slow_weights(model)``, with the whole model
        that the optimizer trains. What its modules have gathered is freed at both ends, so that no
        forward pass takes it for the weights of now.

        Within the context every parameter holds its slow weight; on leaving it, whatever happens
        within, each gets its own bits back. It is for reading: what is written to a parameter in
        between does not last. A parameter that has not been stepped yet stays as it is. ``step``,
        ``state_dict``, ``load_state_dict`` and copies of the optimizer are refused in between; an
        optimizer inside of it (:class:`Lookahead`'s) does not know, and is yours to leave alone.

        Args:
            model: is not needed unless parameters are sharded by FSDP2.

        Raises:
            RuntimeError: the slow weights are swapped in already; a parameter is a DTensor that
                ``model`` does not have, in a process that uses FSDP2; or one of
                FullyShardedDataParallel's, whose gathered weights nobody can free. Parts of a model
                that ZeRO deals out to ranks look like any other parameters: their slow weights
                are swapped in on this rank alone.
        """
        return _Evaluation(self, model)

    def reset_slow_weights(self) -> None:
        """Let every slow weight be its parameter as it is now.

        For weights that were loaded or rolled back without this optimizer's state: the next sync
        would pull half-way back to those of before. After ``load_state_dict``, beside the weights
        it was saved with, there is nothing to reset; nor before the first step with ``lr`` above 0,
        unless ``lr`` is a tensor on an accelerator, which is not read. Slow weights are written in
        place, and their momentum is zeroed; step counts and cycles stay.

        Raises:
            RuntimeError: the slow weights are swapped in, or a slow weight does not fit its
                parameter. Nothing has been changed then.
        """
        self._check_ready("reset_slow_weights()")
        with self._dispatcher.alone(), Deferred():
            self._dispatcher.reset_slow_weights(self.param_groups, self.state)

    def eval(self, model: torch.nn.Module | None = None) -> None:
        """Let every parameter hold its slow weight, until :meth:`train`.

        It is what :meth:`slow_weights` does, for trainers that call ``optimizer.eval()`` before
        evaluation and ``optimizer.train()`` before training, as they do for schedule-free
        optimizers (Defazio et al., arXiv:2405.15682): Hugging Face's Trainer, for one. It does
        nothing unless the optimizer was made with ``eval_with_slow_weights=True``, nor a second
        time. A parameter that has no slow weight yet stays as it is.

        The parameters' own values are in the state meanwhile (``fast_param``, a parameter's bytes
        more). ``state_dict``, ``load_state_dict``, copying and pickling work as ever: a checkpoint
        of now, and a model saved now, resume with the same bits as those of train mode, in an
        optimizer that is in eval mode and has to be taken out of it. (With
        ``torch.distributed.checkpoint``, save in train mode: one of eval mode is refused in train
        mode, unless :func:`load_distributed_checkpoint` loads it.)
        What is written to a parameter in eval mode does not last. Loading a checkpoint of train
        mode ends eval mode, and leaves the parameters to who loads the model.

        Args:
            model: is not needed unless parameters are sharded by FSDP2.

        Raises:
            RuntimeError: inside ``with optimizer.slow_weights()``, or as that says of sharded
                parameters. Nothing has been changed then.
        """
        self._set_eval_mode(True, model)

    def train(self, model: torch.nn.Module | None = None) -> None:
        """Give every parameter back what it was before :meth:`eval`, bit for bit.

        Does nothing in train mode.

        Args:
            model: is not needed unless parameters are sharded by FSDP2.

        Raises:
            RuntimeError: as :meth:`eval` does.
        """
        self._set_eval_mode(False, model)

    def _set_eval_mode(self, on: bool, model: torch.nn.Module | None) -> None:
        groups = self.param_groups
        call = "eval()" if on else "train()"
        if not eval_mode.has_opted_in(self._options):
            return
        self._check_ready(call, in_eval_mode=True)
        if eval_mode.is_on(groups, self._options) == on:
            return
        dispatcher = self._dispatcher
        with dispatcher.alone(), Deferred():
            _reshard(model)
            _check_shards(groups, model, call)
            if on:
                dispatcher.reset_slow_weights(groups, self.state, only_unmoved=True)
                set_aside(dispatcher.slow_pairs(groups, self.state), self.state)
            else:
                put_back([param for param, _, _ in members(groups)], self.state)
            for group in groups:
                group[eval_mode.KEY] = on
            _reshard(model)

    def _check_ready(self, call: str, *, in_eval_mode: bool = False) -> None:
        if self._slow_weights_are_in:
            raise RuntimeError(
                f"{call} inside `with optimizer.slow_weights()`: the parameters hold their slow "
                "weights now; leave the context first"
            )
        if not in_eval_mode and eval_mode.is_on(self.param_groups, self._options):
            raise RuntimeError(
                f"{call} in eval mode: the parameters hold their slow weights now; call "
                "optimizer.train() first"
            )


class _Evaluation(ContextDecorator, AbstractContextManager[None]):
    """Both of its ends run whole, whatever interrupts."""

    def __init__(self, optimizer: SlowWeights, model: torch.nn.Module | None) -> None:
        self._optimizer = optimizer
        self._model = model
        self._lock: Any = None
        self._swap: AbstractContextManager[None] | None = None
        self._has_ended = False

    def _recreate_cm(self) -> _Evaluation:
        # For each call of a function that it decorates.
        return _Evaluation(self._optimizer, self._model)

    def __enter__(self) -> None:
        leave = self._leave()
        self._optimizer._check_ready("slow_weights()")
        try:
            with Deferred():
                self._begin()
        except BaseException:
            leave()
            raise

    def _leave(self) -> Callable[..., None]:
        return insist(self._end, lambda: self._has_ended)

    # Compiled, as no method of Python's can be called without running handlers first. Made when the
    # context is entered: kept, it would keep this and the optimizer alive.
    __exit__ = property(_leave)

    def _begin(self) -> None:
        optimizer = self._optimizer
        lock = optimizer._dispatcher.alone()
        lock.acquire()
        self._lock = lock
        _reshard(self._model)
        _check_shards(optimizer.param_groups, self._model, "slow_weights()")
        swap = optimizer._dispatcher.swapped(optimizer.param_groups, optimizer.state)
        swap.__enter__()
        self._swap = swap
        optimizer._slow_weights_are_in = True

    def _end(self) -> None:
        with Deferred():
            self._has_ended = True
            try:
                if self._swap is not None:
                    self._optimizer._slow_weights_are_in = False
                    self._swap.__exit__(None, None, None)
            finally:
                try:
                    _reshard(self._model)
                finally:
                    if self._lock is not None:
                        self._lock.release()


def _reshard(model: torch.nn.Module | None) -> None:
    """Free what FSDP2 has gathered, which is of the weights before a swap."""
    for module in () if model is None else model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _check_shards(groups: list[dict[str, Any]], model: torch.nn.Module | None, call: str) -> None:
    held = set() if model is None else set(model.parameters())
    is_fsdp2_used = bool(FSDPModule.__subclasses__())  # one for each class of sharded modules
    for param, _, name in members(groups):
        if is_fsdp1_s(param):
            raise RuntimeError(
                f"{call}: {name} is FullyShardedDataParallel's, which may hold weights "
                "that it gathered before; shard with torch.distributed.fsdp.fully_shard to "
                "evaluate on slow weights"
            )
        if is_fsdp2_used and isinstance(param, DTensor) and param not in held:
            raise RuntimeError(
                f"{call}: {name} is a DTensor, and FSDP2 may hold weights that it gathered before; "
                + (
                    f"give it the model: optimizer.{call[:-1]}model)"
                    if model is None
                    else "it is not a parameter of the model that was given: give the whole one"
                )
            )
