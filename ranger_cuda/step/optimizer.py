"""What RAdam and Ranger share: the conventions of ``torch.optim`` around one fused step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..backends import support
from ..backends.scaling import Scaling
from ..state import eval_mode, formats, hyperparameters
from ..state.checkpoint import (
    Shielded,
    check_kind,
    is_step_tensor,
    restore_state,
    shield_state,
    step_tensor,
)
from ..state.hyperparameters import Hyperparameters
from ..state.new_state import decoded, new_state
from ..state.tensors import check_state, on_accelerator
from . import clipping, offload
from .algorithms import Algorithm, members
from .dispatch import Dispatcher
from .interrupts import Deferred
from .release import GradientRelease

Loss = TypeVar("Loss")  # what a closure returns


class FusedOptimizer(Optimizer):
    """Base of :class:`RAdam` and :class:`Ranger`; not for use on its own.

    Args:
        params: as for every ``torch.optim.Optimizer``.
        defaults: the hyperparameters, by name.
        backend: a backend's name, or None.
        state_dtype: of the moments. No group has it: it is how state is kept, not a
            hyperparameter, and a checkpoint's groups hold plain values only.
        nonfinite_grad_norm: one of ``clipping.NONFINITE``.
        amp_scaling: let ``torch.amp.GradScaler`` hand its scale and its overflow flag to the step.
        differentiable: refused if true.
        eval_with_slow_weights: whether ``eval()`` and ``train()`` do anything.
        slow_device: where slow weights are; None: beside their parameters.
    """

    _algorithm: Algorithm
    # Set by GradScaler for the length of a step, if amp_scaling is on. They have no value on the
    # class: GradScaler multiplies its scale by a grad_scale that is there.
    grad_scale: Tensor | None
    found_inf: Tensor | None
    grad_norm: Tensor | None
    _release: GradientRelease | None = None  # a copy has none
    _offload: offload.Offload | None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        backend: support.BackendName | None,
        state_dtype: formats.StateDType,
        amp_scaling: bool,
        differentiable: bool,
        nonfinite_grad_norm: str,
        eval_with_slow_weights: bool = False,
        slow_device: str | torch.device | None = None,
    ) -> None:
        support.check_backend(backend)
        hyperparameters.check_choice("state_dtype", state_dtype, formats.STATE_DTYPES)
        hyperparameters.check_choice("nonfinite_grad_norm", nonfinite_grad_norm, clipping.NONFINITE)
        hyperparameters.check_choice(
            "eval_with_slow_weights", eval_with_slow_weights, (True, False)
        )
        offload.check_device(slow_device)
        if differentiable:
            raise ValueError(
                "differentiable=True is not supported: the fused step writes in place, outside "
                "autograd. Use torch.optim.RAdam(differentiable=True)"
            )
        self._options: dict[str, Any] = {
            "backend": backend,
            "amp_scaling": amp_scaling,
            "state_dtype": state_dtype,
            "nonfinite_grad_norm": nonfinite_grad_norm,
            "eval_with_slow_weights": eval_with_slow_weights,
            "slow_device": slow_device,
        }
        self._check_group(defaults)  # a group may override a value that is wrong
        self._prepare()
        super().__init__(params, defaults)

    def _prepare(self) -> None:
        # Made anew rather than copied or pickled.
        self._algorithm = type(self)._algorithm._replace(state_dtype=self._options["state_dtype"])
        self._dispatcher = Dispatcher(self._algorithm, self._options["backend"])
        self._dispatcher.unmoved = self.__dict__.pop("_unmoved", set())  # of what it is a copy of
        self.grad_norm = None
        self._offload = None
        if self._options.get("slow_device") is not None:  # an older pickle has none
            self._offload = offload.Offload(
                self._algorithm, self._options["backend"], self._dispatcher
            )
        if self._options["amp_scaling"]:
            # On the instance: on the class, frameworks would change their ways for everyone.
            self._step_supports_amp_scaling = True

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; optional.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse or does not fit its parameter, or the state does
                not.
            ValueError: a hyperparameter is out of range, or no backend serves a parameter.
                In either case no parameter and no state has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    # torch.compile breaks its graph here: nothing to trace in a call of compiled code, and no
    # recompilation as steps and learning rates change.
    @torch.compiler.disable
    def _step(self) -> None:
        self._check_ready("step()")
        dispatcher = self._dispatcher  # a load in another thread makes a new one
        with dispatcher.alone():
            self._step_with(dispatcher)

    def _step_with(self, dispatcher: Dispatcher) -> None:
        self.grad_norm = None
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not on_accelerator(found_inf):
            if found_inf != 0.0:
                return
            found_inf = None  # GradScaler's is an int where there is no gradient
        try:
            hypers = [self._check_group(group) for group in self.param_groups]
            scaling = Scaling(getattr(self, "grad_scale", None), found_inf, None)
            nonfinite = self._options["nonfinite_grad_norm"]
            clips = any(hyper.max_grad_norm < math.inf for hyper in hypers)
            measure = self._measured if clips or nonfinite != "propagate" else None
            found = self.param_groups, self.state, self._new_state
            moved_apart = self._offload
            if moved_apart is not None and offload.is_away(self.param_groups):
                new_state = partial(self._new_state, algorithm=moved_apart.moving)
                moved_apart.step(*found[:2], new_state, hypers, scaling, measure)
            elif measure is not None:
                dispatcher.collect(*found)
                dispatcher.launch(hypers, scaling, measure)
            else:
                dispatcher.step(*found, hypers, scaling)
        except BaseException:
            # GradScaler takes them back from a step that returns; left here, they would scale
            # the next step as well.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        finally:
            dispatcher.release()

    def _measured(self, found: Dispatcher, scaling: Scaling) -> Scaling:
        norm, scale = clipping.total_norm(found), scaling.grad_scale
        self.grad_norm = norm if scale is None else norm / scale
        return clipping.with_norm(norm, scaling, self._options["nonfinite_grad_norm"])

    def _check_group(self, group: dict[str, Any]) -> Hyperparameters:
        return hyperparameters.check(group, lookahead=self._has_lookahead)

    @property
    def _has_lookahead(self) -> bool:
        return "slow_param" in self._algorithm.streams

    def _rename(self, group: dict[str, Any]) -> None:
        if self._has_lookahead:
            hyperparameters.rename_lookahead(group)

    def _check_ready(self, call: str, *, in_eval_mode: bool = False) -> None:
        """Raise if ``call`` may not be made now.

        Args:
            in_eval_mode: whether it may be made between ``eval()`` and ``train()``.
        """

    def _new_state(
        self,
        param: Tensor,
        group: dict[str, Any],
        state: dict[str, Any],
        step_device: torch.device,
        algorithm: Algorithm | None = None,
    ) -> dict[str, Any]:
        """What ``state`` lacks for a first step, or for a step after a change of dtype."""
        algorithm = algorithm or self._algorithm
        new: dict[str, Any] = {}
        if not is_step_tensor(state.get("step"), step_device):
            new["step"] = step_tensor(state.get("step", 0.0), step_device)
        format = algorithm.format_of(param, group)
        return new | new_state(format, param, state, algorithm.streams_of(group))

    def release_gradients(self) -> GradientRelease:
        """Move each parameter in ``backward()``, as soon as it has its gradient, and free that::

            release = optimizer.release_gradients()
            for inputs, targets in batches:
                loss(model(inputs), targets).backward()  # moves all parameters
                optimizer.step()  # which finds nothing left to move; schedulers expect it
                scheduler.step()

        The gradients of a whole model are never there at once. The bits are those of ``step()``
        after ``backward()``. Every backward pass is a step; to accumulate the gradients of several,
        pause it for all but the last::

            with release.paused():
                for batch in batches[:-1]:
                    loss_of(batch).backward()
            loss_of(batches[-1]).backward()

        Parameters of groups that are added later are released, too. Copies of the optimizer, and
        what is unpickled, release nothing until they are told to. Hooks of ``step()`` run in
        ``step()``, not for each parameter. See docs/around_a_step.md for what it costs, for
        ``fully_shard``, and for what cannot be seen from here.

        Returns:
            A handle: ``remove()`` ends it, and ``paused()`` is a context in which gradients
            accumulate.

        Raises:
            RuntimeError: gradients are released already, a parameter's by another optimizer, a
                group has ``max_grad_norm``, the optimizer has ``slow_device``, ``amp_scaling`` or a
                ``nonfinite_grad_norm`` that skips or raises, or parameters are
                DistributedDataParallel's or FullyShardedDataParallel's. If it comes to that later,
                ``backward()`` raises it before anything moves, and whatever ``step()`` would raise
                of a hyperparameter. What ``step()`` would raise of a gradient leaves that parameter
                as it is.
        """
        if self._release is not None:
            raise RuntimeError(
                "gradients are released already; remove() what the first call returned"
            )
        self._check_ready("release_gradients()")
        release = GradientRelease(self)
        release.watch(param for param, _, _ in members(self.param_groups))
        self._release = release
        return release

    def decoded_state(self, param: Tensor) -> dict[str, Tensor]:
        """The numbers behind what is stored of a parameter, whatever the formats.

        Args:
            param: one of the optimizer's, which has been stepped.

        Returns:
            Copies of ``param`` (of its float32 master, where there is one), ``exp_avg``,
            ``exp_avg_sq`` and, if there are any, ``slow_param`` and
            ``outer_momentum_buffer``: float32 (float64 of a float64
            parameter), of the parameter's shape, for a DTensor of this rank's shard; a complex
            parameter's as pairs.

        Raises:
            ValueError: it is no parameter of this optimizer, or has no state yet.
            RuntimeError: its state does not fit it, or the slow weights are in its place.
        """
        self._check_ready("decoded_state()")
        for member, group, name in members(self.param_groups):
            if member is not param:
                continue
            state = self.state.get(param, {})
            if "step" not in state:
                raise ValueError(f"{name} has no state yet: take a step")
            format = self._algorithm.format_of(param, self.param_groups[group])
            parts = format.parts(self._algorithm.streams)
            check_state(
                param, state, [part for part in parts if part.name in state], name, offload.PARTS
            )
            return decoded(format, param, state)
        raise ValueError("decoded_state() is of a parameter of this optimizer")

    # --- groups, checkpoints, copies ----------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it may set every hyperparameter for itself.

        Raises:
            ValueError, TypeError: a hyperparameter or a parameter cannot be used.
        """
        if isinstance(param_group, dict):
            self._rename(param_group)
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._release is not None:
            try:
                self._release.watch(self.param_groups[-1]["params"])
            except BaseException:
                self.param_groups.pop()
                raise
        eval_mode.mark(self.param_groups, self._options)

    def state_dict(self) -> dict[str, Any]:
        """The state as a dict, in ``torch.optim``'s format."""
        self._check_ready("state_dict()", in_eval_mode=True)
        self._dispatcher.reset_slow_weights(self.param_groups, self.state, only_unmoved=True)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load what :meth:`state_dict` returned, here or in RAdam, Adam or AdamW of torch.

        State is copied, and keeps the precision it was saved in. A hyperparameter that the
        checkpoint does not have keeps its value; a Lookahead without slow weights starts from the
        parameters as they are at the next step. RAdam leaves slow weights out, with a warning.
        Group keys and state values that others added are kept, as long as the values are no
        tensors.

        Args:
            state_dict: what to load; it is left as it is, and shares no memory with the optimizer.
            strict: whether tensors and group keys that change what a step is, and that this
                optimizer does not know (``max_exp_avg_sq`` and ``amsgrad``, say), are an error.
                False: they are left out, with a warning.

        Raises:
            ValueError: the checkpoint does not fit.
            RuntimeError: the memory of a state was given back. Nothing has been changed in either
                case.
        """
        self._check_ready("load_state_dict()", in_eval_mode=True)
        check_kind(state_dict, dict, "it")
        names = tuple(filter(None, self._algorithm.streams))
        # Registered last, so that it sees what the user's hooks made of the checkpoint.
        shield = self.register_load_state_dict_pre_hook(
            partial(shield_state, names=names, strict=strict)
        )
        before = self.__dict__.copy()
        try:
            with Deferred():
                super().load_state_dict(state_dict)
        except BaseException:  # of a hook, for instance
            self.__dict__ = before
            raise
        finally:
            shield.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._check_ready("copying or pickling", in_eval_mode=True)
        kept = {"_options": self._options, "_unmoved": self._dispatcher.unmoved}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called to unpickle and copy, and by load_state_dict with new groups and states.
        before = self.__dict__.get("param_groups", [])
        options = state.get("_options") or self._options
        is_apart = options.get("slow_device") is not None  # an older pickle has none
        for group in state.get("param_groups", ()):
            for param in group["params"]:
                saved = state["state"].get(param)
                if isinstance(saved, Shielded):
                    format = self._algorithm.format_of(param, {**self.defaults, **group})
                    saved = state["state"][param] = restore_state(param, saved.state, format)
                if is_apart and saved is not None:
                    offload.settle(param, saved)  # one after the other, for their memory
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; no group of ours has it
        self._prepare()
        for group in (self.defaults, *self.param_groups):
            self._rename(group)
        for i, group in enumerate(self.param_groups):
            known = {**self.defaults, **(before[i] if i < len(before) else {})}
            for name in self.defaults:
                group.setdefault(name, known[name])
        eval_mode.mark(self.param_groups, self._options)
