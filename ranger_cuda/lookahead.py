"""Lookahead around any optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from .backends import support
from .state import checkpoint, eval_mode, hyperparameters
from .step import cycle, offload
from .step.algorithms import LOOKAHEAD, members
from .step.cycle import Cycle
from .step.dispatch import Dispatcher
from .step.inner_step import InnerStep
from .step.interrupts import Deferred
from .step.offload import OffloadedPull
from .step.optimizer import FusedOptimizer, Loss
from .step.slow_weights import SlowWeights


class Lookahead(SlowWeights, Optimizer):
    """Lookahead around any ``torch.optim.Optimizer``.

    Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019
    (arXiv:1907.08610), Algorithm 1: every ``k`` steps of a parameter its slow weight moves the
    fraction ``alpha`` of the way to it, and it goes on from there. ``Lookahead(RAdam(...))`` and
    :class:`Ranger` return the same bits (but for ``weight_rounding="nearest"``, which then rounds
    twice); Ranger does it in one pass.

    Groups, state, defaults and schedulers are the inner optimizer's: ``param_groups`` and
    ``state`` are the same objects, and a checkpoint holds both.

    Args:
        optimizer: the inner optimizer.
        k: the Lookahead period, in optimizer steps; at least 1.
        alpha: the interpolation factor, in [0, 1]; with ``outer_momentum`` the outer learning rate.
        outer_momentum: the momentum of slow weights, in [0, 1); 0: none. See :class:`Ranger`.
        outer_nesterov: whether it is Nesterov's.
        backend: of the interpolation: "cuda", "triton", "cpu", "reference", or None: the fastest
            that serves a parameter's device and dtype here.
        eval_with_slow_weights: let :meth:`eval` and :meth:`train`, which trainers call, put slow
            weights into the parameters and take them out again. Without it they do nothing.
        slow_device: "cpu": slow weights and their momentum are in the host's memory, and on a GPU
            only in steps that end a cycle, as for :class:`Ranger`. None: beside their parameters.

    A parameter group may set ``lookahead_k``, ``lookahead_alpha`` (``alpha`` alone is a
    hyperparameter of other optimizers), ``outer_momentum`` and ``outer_nesterov`` for itself.

    State of a parameter: the inner optimizer's, ``slow_param`` (the parameter's shape; float32 for
    low-precision parameters) and ``lookahead_step`` (float32 scalar), and with ``outer_momentum``
    ``outer_momentum_buffer`` (the parameter's shape; float32 likewise). ``slow_param`` starts as
    the parameter before its first update.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``.
        ValueError: an argument is out of range, or ``optimizer`` has slow weights already, or
            saves none of the state that is kept with it (ZeroRedundancyOptimizer).
        RuntimeError: the requested backend cannot run on this machine; the message says why. Or
            ``optimizer`` releases gradients, and so moves before its ``step()``.

    Example:
        >>> import torch
        >>> from ranger_cuda import Lookahead
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = Lookahead(torch.optim.AdamW(model.parameters(), lr=2e-3), k=6, alpha=0.5)
        >>> model(torch.randn(32, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> with optimizer.slow_weights():
        ...     validation_loss = model(torch.randn(32, 4)).square().mean()
    """

    optimizer: Optimizer
    _options: dict[str, Any]

    def __init__(
        self,
        optimizer: Optimizer,
        k: int = 6,
        alpha: float = 0.5,
        *,
        outer_momentum: float = 0.0,
        outer_nesterov: bool = True,
        backend: support.BackendName | None = None,
        eval_with_slow_weights: bool = False,
        slow_device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Lookahead wraps a torch.optim.Optimizer, but got {type(optimizer).__name__}; "
                "give it an optimizer, not parameters"
            )
        if isinstance(optimizer, _zero_redundancy_optimizer()):
            raise ValueError(
                "Lookahead around ZeroRedundancyOptimizer would lose its slow weights in every "
                "checkpoint; use ZeroRedundancyOptimizer(..., optimizer_class=Ranger)"
            )
        if isinstance(optimizer, SlowWeights):
            raise ValueError(
                f"{type(optimizer).__name__} has Lookahead already; wrap RAdam or another optimizer"
            )
        _check_can_follow(optimizer)
        support.check_backend(backend)
        hyperparameters.check_lookahead(k, alpha, outer_momentum, outer_nesterov)
        hyperparameters.check_choice(
            "eval_with_slow_weights", eval_with_slow_weights, (True, False)
        )
        offload.check_device(slow_device)
        # Not Optimizer.__init__: it would make groups and state of its own.
        self.__setstate__(
            {
                "optimizer": optimizer,
                "_options": {
                    "k": k,
                    "alpha": alpha,
                    "outer_momentum": outer_momentum,
                    "outer_nesterov": outer_nesterov,
                    "backend": backend,
                    "eval_with_slow_weights": eval_with_slow_weights,
                    "slow_device": slow_device,
                },
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        self._check_ready("copying or pickling", in_eval_mode=True)
        unmoved = self._dispatcher.unmoved
        return {"optimizer": self.optimizer, "_options": self._options, "_unmoved": unmoved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = dict(state["optimizer"].defaults)
        super().__setstate__(state)  # the hooks, and the patch of step()
        state["optimizer"].defaults = known  # torch adds "differentiable" to any
        self._dispatcher = Dispatcher(LOOKAHEAD, self._options["backend"])
        self._dispatcher.unmoved = self.__dict__.pop("_unmoved", set())
        self._offloaded = None
        if self._options.get("slow_device") is not None:  # an older pickle has none
            self._offloaded = OffloadedPull(self._options["backend"], self._dispatcher)
            for param, _, _ in members(self.param_groups):
                offload.settle(param, self.state.get(param, {}))
        self._complete_groups()

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for name, option in hyperparameters.LOOKAHEAD.items():
                group.setdefault(name, self._options[option])
            self._check_group(group)
        eval_mode.mark(self.param_groups, self._options)

    # --- the inner optimizer's, under this one's name -------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the inner optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the inner optimizer's; the group may set ``lookahead_k`` and ``lookahead_alpha``."""
        if isinstance(param_group, dict):
            self._check_group(param_group)
        self.optimizer.add_param_group(param_group)
        self._complete_groups()

    def _check_group(self, group: dict[str, Any]) -> None:
        hyperparameters.check_lookahead(
            *(
                group.get(n, self._options[option])
                for n, option in hyperparameters.LOOKAHEAD.items()
            )
        )

    def __repr__(self) -> str:
        k, alpha = self._options["k"], self._options["alpha"]
        return f"Lookahead (k: {k}, alpha: {alpha})\n{self.optimizer!r}"

    # --- the step ---------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step of the inner optimizer, and every ``k`` of them a pull to slow weights.

        Hooks that are registered for every optimizer run once, around the whole of it; the inner
        optimizer's own run around its step.

        Args:
            closure: re-evaluates the model and returns the loss; optional.

        Returns:
            What the inner optimizer's ``step`` returned.

        Raises:
            RuntimeError: another step is under way, or a parameter, its state or its slow weight
                cannot be used. Nothing has been changed then.
        """
        self._check_ready("step()")
        with self._dispatcher.alone():
            return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        with Deferred() as deferred:  # an interrupt in between would lose a step of the cycle
            if closure is not None:
                closure = deferred.interruptible(closure)
            its = InnerStep(self.optimizer, () if closure is None else (closure,))
            its.run_pre_hooks()  # which may make gradients, or drop them
            begun = self._begin(its.has_closure)
            result = its.run()
            try:
                its.run_post_hooks()
            finally:  # whatever they raise, the step was one of the cycle
                self._pull(begun)
        return result

    # As for FusedOptimizer._step, torch.compile breaks its graph before and after the inner step.
    @torch.compiler.disable
    def _begin(self, any_may_move: bool) -> Cycle:
        _check_can_follow(self.optimizer)
        self._complete_groups()
        return cycle.begin(
            self._dispatcher,
            self._options["backend"],
            self.param_groups,
            self.state,
            any_may_move,
            self._offloaded if offload.is_away(self.param_groups) else None,
        )

    @torch.compiler.disable
    def _pull(self, begun: Cycle) -> None:
        cycle.pull(self._dispatcher, self.state, begun)

    # --- checkpoints ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's ``state_dict()``, with the slow weights among the state."""
        self._check_ready("state_dict()", in_eval_mode=True)
        self._dispatcher.reset_slow_weights(self.param_groups, self.state, only_unmoved=True)
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        result = self.optimizer.state_dict()
        self._check_saved(result)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        """Raise if the inner optimizer saves its state from elsewhere."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                kept = "slow_param" in self.state.get(param, ())
                if kept and "slow_param" not in state_dict["state"].get(key, ()):
                    raise RuntimeError(
                        f"{type(self.optimizer).__name__}.state_dict() leaves out the slow weights "
                        "that Lookahead keeps in its state; wrap the optimizer that it wraps"
                    )

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load what :meth:`state_dict` returned, or a checkpoint of Ranger or the inner optimizer.

        State is copied. Slow weights keep the precision they were saved in; where there are none
        they start from the parameters as they are at the next step. Options of a group that the
        checkpoint does not have stay as they are. Everything else is the inner optimizer's to load,
        and to check.

        Args:
            state_dict: what to load; it is left as it is, and shares no memory with the optimizer.
            strict: whether state of other Lookaheads (``slow_buffer``, say) is an error, and for an
                inner RAdam also what that does not know. False: it is left out, with a warning.

        Raises:
            ValueError: the checkpoint does not fit.
            RuntimeError: the memory of a state was given back, or a step is under way. Whatever is
                raised, by the inner optimizer too, nothing has been changed.
        """
        self._check_ready("load_state_dict()", in_eval_mode=True)
        checkpoint.check_kind(state_dict, dict, "it")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed

        # In the middle of a step, its pull would count to what is loaded.
        with self._dispatcher.alone(), Deferred():
            self._load(state_dict, strict)
        for done_hook in self._optimizer_load_state_dict_post_hooks.values():
            done_hook(self)

    def _load(self, state_dict: dict[str, Any], strict: bool) -> None:
        params = checkpoint.parameters(state_dict, self.param_groups)
        groups = []
        saved_groups = zip(self.param_groups, state_dict["param_groups"], strict=True)
        for i, (group, saved) in enumerate(saved_groups):
            stale = ("param_names", eval_mode.KEY)
            known = {key: value for key, value in group.items() if key not in stale}
            with checkpoint.naming(i):
                groups.append({**known, **hyperparameters.with_whole_period(saved)})
                self._check_group(groups[-1])
        eval_mode.check_saved(state_dict, self._options)
        modes = [group.pop(eval_mode.KEY, False) for group in groups]  # not the inner optimizer's
        inner, ours = checkpoint.split_state(state_dict["state"], params, strict)
        restored = {}
        for i, group in enumerate(groups):
            for key in filter(ours.get, group["params"]):
                with checkpoint.naming(i):
                    format = LOOKAHEAD.format_of(params[key], group)
                its = restored[params[key]] = checkpoint.restore_state(
                    params[key], ours[key], format
                )
                if self._offloaded is not None:
                    offload.settle(params[key], its)  # one after the other, for their memory
        options = (
            {} if strict or not isinstance(self.optimizer, FusedOptimizer) else {"strict": False}
        )
        before = self.optimizer.__dict__.copy()
        try:
            loaded = {**state_dict, "param_groups": groups, "state": inner}
            self.optimizer.load_state_dict(loaded, **options)
            self._own(inner)
            for param, values in restored.items():
                self.state.setdefault(param, {}).update(values)
            self._complete_groups()
            if eval_mode.has_opted_in(self._options):
                for group, mode in zip(self.param_groups, modes, strict=True):
                    group[eval_mode.KEY] = mode
        except BaseException:
            # Optimizers of torch notice some of what is wrong when half of it is theirs already.
            self.optimizer.__dict__ = before
            raise
        self._dispatcher.reset()
        self._dispatcher.unmoved = set()

    def _own(self, loaded: Any) -> None:
        """Copy the state that the inner optimizer took over from ``loaded`` as it was."""
        given = {id(leaf) for leaf in tree_leaves(loaded)}

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if id(tensor) in given else tensor

        with torch.inference_mode(False):  # what is made in it could not be written outside
            for key, value in self.state.items():
                self.state[key] = tree_map_only(Tensor, own, value)


def _check_can_follow(optimizer: Optimizer) -> None:
    if getattr(optimizer, "_release", None) is not None:
        raise RuntimeError(
            "the inner optimizer moves parameters in backward (release_gradients()), where "
            "Lookahead does not see it; use Ranger, or remove() what release_gradients() returned"
        )
    if getattr(optimizer, "_options", {}).get("nonfinite_grad_norm") == "skip":
        raise ValueError(
            "Lookahead would count a step that the inner optimizer skips "
            '(nonfinite_grad_norm="skip"); use Ranger, or "raise"'
        )


def _zero_redundancy_optimizer() -> Any:
    """The class, or () where nobody can have an instance of it."""
    module = sys.modules.get("torch.distributed.optim")
    return getattr(module, "ZeroRedundancyOptimizer", ())
