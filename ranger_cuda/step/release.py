"""Gradients released in backward: a parameter moves when it has its gradient, and frees it."""

from __future__ import annotations

import gc
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..backends.scaling import NO_SCALING
from ..state.hyperparameters import Hyperparameters
from ..state.tensors import is_fsdp1_s
from .algorithms import Member, alone, members
from .dispatch import Dispatcher

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

CALL = "backward() with released gradients"


class GradientRelease:
    """What ``optimizer.release_gradients()`` returns; see there.

    Parameters have a weak reference to it, and it has one to the optimizer: none is kept alive.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._lock = threading.Lock()  # a backward pass has a thread for each device
        self._pauses = 0
        self._handles: list[RemovableHandle] = []
        self._graph_task = -1  # the backward pass for which all was checked
        self._ids: list[list[int]] = []  # of the parameters in each group, to compare with
        self._dispatcher: Dispatcher | None = None  # of all parameters; a load makes a new one
        self._movers: dict[Tensor, _Mover] = {}
        self._hypers: list[Hyperparameters] = []
        _check(optimizer)
        weakref.finalize(self, _remove, self._handles).atexit = False

    def remove(self) -> None:
        """Let gradients be, from now on: ``step()`` moves parameters again. Twice is once."""
        _remove(self._handles)
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._release is self:
            optimizer._release = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context gradients accumulate, and nothing moves; for all micro-batches but
        the last, whose backward pass moves parameters by the sum."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def watch(self, params: Iterable[Tensor]) -> None:
        """Have these parameters released, too.

        Raises:
            RuntimeError: one of them is by another optimizer, which would free its gradient.
        """
        params = list(params)
        for param in params:
            for known in (param._post_accumulate_grad_hooks or {}).values():
                other = getattr(known, "release", lambda: None)()
                if other not in (None, self):
                    raise RuntimeError(
                        f"a parameter of shape {tuple(param.shape)} is released by another "
                        "optimizer, after which there is no gradient left for this one"
                    )
        hook = _hook(weakref.ref(self))
        for param in params:
            trains = param.requires_grad
            if not (trains or param.is_floating_point() or param.is_complex()):
                continue  # it never has a gradient
            param.requires_grad_(True)  # a frozen one takes no hook, and may be trained later
            try:
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
            finally:
                param.requires_grad_(trains)

    def move(self, param: Tensor) -> None:
        """Move a parameter by the gradient that it has by now, and free that."""
        optimizer = self._optimizer()
        if optimizer is None or self._pauses or param.grad is None:
            return
        with self._lock:
            self._begin(optimizer)
            mover = self._movers.get(param)
            if mover is None:
                return  # it has left the groups
            with optimizer._dispatcher.alone():
                try:
                    mover.move(optimizer, self._hypers[mover.member.group])
                except Exception:
                    raise  # of a gradient that cannot be used, and is there to be looked at
                except BaseException:
                    param.grad = None  # an interrupt, which may come when it has moved already
                    raise
                param.grad = None

    def _begin(self, optimizer: FusedOptimizer) -> None:
        """Check all that can be wrong before the first parameter moves in a backward pass."""
        task = torch._C._current_graph_task_id()
        if task == self._graph_task != -1:
            return
        optimizer._check_ready(CALL)
        groups = optimizer.param_groups
        ids = [[*map(id, group["params"])] for group in groups]
        if ids != self._ids or optimizer._dispatcher is not self._dispatcher:
            _check(optimizer)
            self._dispatcher = optimizer._dispatcher
            self._movers = {}
            for place, member in enumerate(members(groups)):
                self._movers.setdefault(member.param, _Mover(member, place))
            self._ids = ids
        self._hypers = [optimizer._check_group(group) for group in groups]
        _check_clipping(self._hypers)
        self._graph_task = task


class _Mover:
    """One parameter, with a roster and launchers of its own: no step looks at all the others."""

    def __init__(self, member: Member, place: int) -> None:
        self.member = member
        self._place = place
        self._one: Dispatcher | None = None

    def move(self, optimizer: FusedOptimizer, hyper: Hyperparameters) -> None:
        param, whole = self.member.param, optimizer._dispatcher
        if self._one is None:
            self._one = whole.at(self._place)
        one = self._one
        one.unmoved = {param} & whole.unmoved if whole.unmoved else set()
        group = alone(self.member, optimizer.param_groups[self.member.group])
        state = optimizer.state.setdefault(param, {})
        try:
            one.step([group], {param: state}, optimizer._new_state, [hyper], NO_SCALING)
        finally:
            if not state:
                del optimizer.state[param]
        if one.unmoved:
            whole.unmoved.add(param)
        elif whole.unmoved:
            whole.unmoved.discard(param)


def _hook(release: weakref.ref[GradientRelease]) -> Callable[[Tensor], None]:
    # Compiled autograd would trace it.
    @torch.compiler.disable
    def hook(param: Tensor) -> None:
        its = release()
        if its is not None:
            its.move(param)

    hook.release = release
    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _check(optimizer: FusedOptimizer) -> None:
    """Raise if a gradient is not what the optimizer should move by when backward has made it."""
    if optimizer._options["amp_scaling"]:
        raise RuntimeError(
            f"{CALL} and amp_scaling=True: gradients would be those of a scaled loss, which nobody "
            "has looked through for overflow. Train in bfloat16, which needs no GradScaler, or "
            "step() after backward"
        )
    if optimizer._options.get("slow_device") is not None:
        raise RuntimeError(
            f"{CALL} and slow_device: slow weights would travel for one parameter after the other. "
            "Leave slow_device None, or step() after backward"
        )
    nonfinite = optimizer._options["nonfinite_grad_norm"]
    if nonfinite != "propagate":
        raise RuntimeError(
            f"{CALL} and nonfinite_grad_norm={nonfinite!r}: the norm of all gradients is known "
            "when backward has made the last, and the others would be gone. Leave it "
            '"propagate", or step() after backward'
        )
    _check_clipping([optimizer._check_group(group) for group in optimizer.param_groups])
    replicated = _parameters_of_ddp()
    for param, _, name in members(optimizer.param_groups):
        if is_fsdp1_s(param):
            wrapper = "FullyShardedDataParallel"
        elif id(param) in replicated:
            wrapper = "DistributedDataParallel"
        else:
            continue
        raise RuntimeError(
            f"{CALL}: {name} is {wrapper}'s, which averages gradients over ranks only after they "
            "would be gone. Use torch.distributed.fsdp.fully_shard, or step() after backward"
        )


def _check_clipping(hypers: Iterable[Hyperparameters]) -> None:
    for i, hyper in enumerate(hypers):
        if hyper.max_grad_norm < math.inf:
            raise RuntimeError(
                f"{CALL} and max_grad_norm={hyper.max_grad_norm} of group {i}: the norm of all "
                "gradients is known when backward has made the last, and the others would be gone. "
                "Leave max_grad_norm None, or step() after backward"
            )


def _parameters_of_ddp() -> set[int]:
    """The ids of all parameters that DistributedDataParallel has in this process."""
    module: Any = sys.modules.get("torch.nn.parallel.distributed")
    distributed: Any = torch.distributed
    if module is None or not distributed.is_available() or not distributed.is_initialized():
        return set()
    kind = module.DistributedDataParallel  # parameters do not know that they are one's
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), kind)]
    return {id(param) for wrapper in wrappers for param in wrapper.parameters()}
