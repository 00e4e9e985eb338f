"""Steps: in every way that there is to take one, interrupted ones, and those that are refused."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .gradients import give_all, give_plain
from .registry import FUSED, OURS, WITH_SLOW, operation
from .world import Draw, Side, World, threads

MODES = [
    contextlib.nullcontext,
    torch.no_grad,
    torch.enable_grad,
    torch.inference_mode,
    lambda: torch.device("meta"),
    lambda: threads(1),
    lambda: threads(3),
]


@operation(12)
def step(side: Side, draw: Draw) -> None:
    side.step()


@operation(20)
def give_gradients_and_step(side: Side, draw: Draw) -> None:
    give_all(side, draw)
    side.step()


@operation(4)
def several_steps(side: Side, draw: Draw) -> None:
    for _ in range(draw.randrange(2, 8)):
        if draw.random() < 0.7:
            give_all(side, draw)
        side.step()


@operation()
def step_in_a_mode(side: Side, draw: Draw) -> None:
    mode = draw.choice(MODES if side.variant.is_ours else MODES[:3])
    give_all(side, draw)
    with mode():
        side.step()


@operation(1)
def set_num_threads(side: Side, draw: Draw) -> None:
    torch.set_num_threads(draw.randrange(1, 4))


@operation()
def step_with_a_closure(side: Side, draw: Draw) -> None:
    def closure() -> float:
        assert torch.is_grad_enabled()
        give_all(side, draw)
        return 0.5

    def how() -> None:
        assert side.optimizer.step(closure) == 0.5

    # What it changes before a refusal is the closure's, so none may be refused.
    side.step(how)


@operation()
def step_with_a_hook_that_changes_gradients(side: Side, draw: Draw) -> None:
    give_all(side, draw)
    handle = side.optimizer.register_step_pre_hook(lambda *_: give_all(side, draw))
    try:
        side.step()
    finally:
        handle.remove()


@operation()
def step_in_another_thread(side: Side, draw: Draw) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            side.step()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@operation(2, OURS, on_both=True)
def two_threads_step(world: World, draw: Draw) -> None:
    """Some of their steps may be refused; those that are not are whole ones."""
    start = threading.Barrier(2)
    went_well: list[int] = []
    strange: list[BaseException] = []

    def run() -> None:
        start.wait()
        for _ in range(3):
            try:
                world.native.optimizer.step()
            except RuntimeError as error:
                if "let one at a time" not in str(error):
                    strange.append(error)
            except BaseException as error:
                strange.append(error)
            else:
                went_well.append(1)

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not strange, f"a step beside another: {strange[0]!r}"
    for _ in went_well:
        world.reference.optimizer.step()


@operation(variants=FUSED)
def step_as_of_a_scaler(side: Side, draw: Draw) -> None:
    """A step that takes what ``GradScaler`` found, and skips itself after an overflow."""
    give_all(side, draw)
    side.optimizer.grad_scale = torch.full((), 2.0 ** draw.randrange(-3, 10))
    side.optimizer.found_inf = torch.full((), float(draw.random() < 0.3))
    side.step()
    del side.optimizer.grad_scale, side.optimizer.found_inf


# --- interrupted --------------------------------------------------------------------------------


Interrupted = Callable[[Draw, Callable[[], Any]], None]


def alarmed(arm: Callable[[], Any], call: Callable[[], Any], disarm: Callable[[], Any]) -> None:
    """Call it while SIGALRM is, once, as Ctrl-C is."""
    is_armed = True

    def interrupt(number: int, frame: Any) -> None:
        nonlocal is_armed
        if is_armed:
            is_armed = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        arm()
        call()
        is_armed = False
    except KeyboardInterrupt:
        pass
    finally:
        disarm()
        signal.signal(signal.SIGALRM, before)


def in_python(draw: Draw, call: Callable[[], Any]) -> None:
    """The signal comes where Python looks for one: as a function begins, or one of C returns."""
    # A step has about 150 such places, and its first one hundreds for each parameter.
    countdown = draw.randrange(1, draw.choice([160, 800, 1600]))

    def trace(frame: Any, event: str, arg: Any) -> None:
        nonlocal countdown
        if event in ("call", "c_return"):
            countdown -= 1
            if countdown == 0:
                signal.raise_signal(signal.SIGALRM)

    alarmed(lambda: sys.setprofile(trace), call, lambda: sys.setprofile(None))


def by_a_timer(draw: Draw, call: Callable[[], Any]) -> None:
    """The signal comes at any time, and at another if this is played again."""
    delay = draw.uniform(1e-6, 3e-4)
    timer = signal.ITIMER_REAL
    alarmed(lambda: signal.setitimer(timer, delay), call, lambda: signal.setitimer(timer, 0))


@operation(2, OURS, on_both=True)
def interrupted_step(world: World, draw: Draw) -> None:
    step_whole_or_not(world, draw, in_python)


@operation(1, OURS, on_both=True)
def step_interrupted_by_a_timer(world: World, draw: Draw) -> None:
    step_whole_or_not(world, draw, by_a_timer)


def step_whole_or_not(world: World, draw: Draw, interrupted: Interrupted) -> None:
    """After an interrupt the step has been taken whole or not at all, and the next one can be."""
    native = world.native
    seed = draw.getrandbits(32)
    for side in world.sides:
        give_plain(side, Draw(seed))
        if seed % 3 == 0:  # a first step of one of them
            side.optimizer.state.pop(side.grouped()[seed % len(side.grouped())], None)
    before = native.snapshot()
    interrupted(draw, native.optimizer.step)
    changed = native.changed_since(before)
    if changed:
        world.reference.optimizer.step()
        try:
            world.compare()
        except AssertionError as error:
            raise AssertionError(f"half a step: changed is {changed}, but {error}") from error
    native.step()
    world.reference.step()


@operation(2, WITH_SLOW)
def interrupted_evaluation(side: Side, draw: Draw) -> None:
    """Wherever it comes, parameters and slow weights are in their places afterwards."""

    def evaluate() -> None:
        with side.optimizer.slow_weights():
            pass

    before = side.snapshot()
    (in_python if draw.random() < 0.7 else by_a_timer)(draw, evaluate)
    changed = side.changed_since(before)
    assert not changed, f"changed by an evaluation that was interrupted: {changed}"


# --- refused ------------------------------------------------------------------------------------


@operation()
def refused_for_its_gradient(side: Side, draw: Draw) -> bool:
    give_plain(side, draw)
    param = draw.choice(side.grouped())
    kind = draw.choice(["sparse", "shape", "complex"])
    good, data = param.grad, param.data
    if kind == "sparse" and param.dim():
        param.grad = param.grad.to_sparse()
    elif not side.variant.is_ours:
        return False  # torch's own would take the others
    elif kind == "complex" and not param.is_complex():
        param.grad_dtype = None
        param.grad = torch.ones(param.shape, dtype=torch.complex64)
    else:
        param.data = param.data.new_ones((3, *param.shape))
    side.is_refused()
    param.data = data
    param.grad = good
    side.step()
    return True


WRONG = {
    "lr": [-1.0, math.nan, torch.tensor(math.inf), None],
    "betas": [(math.nan, 0.9), (0.9, 1.0), (0.9,)],
    "eps": [0.0, math.nan],
    "weight_decay": [-0.1, math.inf],
    "max_grad_norm": [0.0, math.nan],
    "k": [0, 2.5, True],
    "alpha": [-0.1, math.nan],
}


@operation()
def refused_for_a_hyperparameter(side: Side, draw: Draw) -> None:
    give_all(side, draw)
    group = draw.choice(side.optimizer.param_groups)
    lookahead = ["lookahead_k", "lookahead_alpha"]
    known = list(WRONG)[:5] if side.variant.is_ours else []
    name = draw.choice(known + (lookahead if side.variant.has_slow else []))
    good = group[name]
    group[name] = draw.choice(WRONG[name.removeprefix("lookahead_")])
    side.is_refused("nvalid" if name != "lr" else "")
    group[name] = good
    side.step()


@operation()
def refused_for_its_state(side: Side, draw: Draw) -> bool:
    """A state tensor that no step may use: of another shape or dtype, expanded, or no count."""
    give_plain(side, draw)
    side.step()
    names = [n for n in ("exp_avg", "exp_avg_sq", "slow_param") if n in side.variant.state_names]
    name = draw.choice([*names, side.variant.step_name])
    params = [p for p in side.grouped() if p.numel()]
    if not params:
        return False
    state = side.state_of(draw.choice(params))
    good = state[name]
    if name.endswith("step"):
        state[name] = torch.full((), draw.choice([0.5, -1.0, math.nan, 2.0**25]))
    else:
        shapes = [(*good.shape, 3)] + [good.shape] * bool(good.dim() and good.shape[-1] > 1)
        shape = draw.choice(shapes)
        state[name] = good[..., :1].expand(shape) if shape == good.shape else good.new_ones(shape)
    side.is_refused()
    state[name] = good
    side.step()
    return True


@operation()
def refused_for_its_parameter(side: Side, draw: Draw) -> bool:
    """A parameter beside the others that no backend can move."""
    give_plain(side, draw)
    kinds: list[Callable[[], Tensor]] = [
        lambda: torch.tensor([1, 2, 3]),
        lambda: Parameter(torch.ones(1).expand(4)),
        lambda: Parameter(torch.ones(3, device="meta")),
    ]
    param = draw.choice(kinds if side.variant.is_ours else kinds[1:2])()
    param.grad = torch.ones_like(param, memory_format=torch.contiguous_format)
    params = side.optimizer.param_groups[0]["params"]
    if not isinstance(params, list):
        return False
    params.insert(draw.randrange(len(params) + 1), param)
    side.is_refused()
    side.optimizer.param_groups[0]["params"] = [p for p in params if p is not param]
    side.optimizer.state.pop(param, None)
    side.step()
    return True
