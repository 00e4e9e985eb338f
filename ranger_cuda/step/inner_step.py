"""The step of an optimizer inside of another."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

# Of the function that torch makes of every class's step(), which runs the hooks.
HOOKED = Optimizer.profile_hook_step(lambda: None).__code__


class InnerStep:
    """An optimizer's step with its own hooks, but without those that are registered for every
    optimizer, which run around the step of the one that wraps it.

    A step that is somebody's own, and not torch's wrapper of a class's, is called as it is.
    """

    def __init__(self, optimizer: Optimizer, arguments: tuple[Any, ...]) -> None:
        self._optimizer = optimizer
        self._call: Any = optimizer.step
        self._arguments = arguments
        self._keywords: dict[str, Any] = {}
        own: Any = getattr(self._call, "__wrapped__", None)  # by a scheduler, which counts calls
        is_scheduler_s = "_wrapped_by_lr_sched" in getattr(self._call, "__dict__", {})
        if is_scheduler_s and getattr(own, "__code__", None) is HOOKED:
            optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            own = getattr(self._call, "__func__", None)
        self._function: Any = None
        if getattr(own, "__code__", None) is HOOKED:
            self._function = own.__wrapped__

    @property
    def has_closure(self) -> bool:
        """Whether the step may make gradients."""
        return any(value is not None for value in (*self._arguments, *self._keywords.values()))

    def run_pre_hooks(self) -> None:
        """Before the step."""
        if self._function is None:
            return
        for hook in self._optimizer._optimizer_step_pre_hooks.values():
            changed = hook(self._optimizer, (self._optimizer, *self._arguments), self._keywords)
            if changed is not None:
                (_, *arguments), self._keywords = changed
                self._arguments = tuple(arguments)

    def run(self) -> Any:
        """The step."""
        if self._function is None:
            return self._call(*self._arguments)
        return self._function(self._optimizer, *self._arguments, **self._keywords)

    def run_post_hooks(self) -> None:
        """After it."""
        if self._function is None:
            return
        for hook in self._optimizer._optimizer_step_post_hooks.values():
            hook(self._optimizer, (self._optimizer, *self._arguments), self._keywords)
