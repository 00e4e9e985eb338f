"""Parameters and their slow weights change places, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from ..backends import reference
from ..state import eval_mode, formats
from ..state.new_state import SLOW_PARTS
from ..state.tensors import check_param, check_state, plain
from .algorithms import Algorithm, members
from .native import Groups, Native, State

ALIKE = "stochastic"  # formats whose slow weights are stored as their parameters are
Pairs = dict[Tensor, tuple[Tensor, Tensor]]  # by parameter: its memory, and its slow weight's


def pairs_of(algorithm: Algorithm, param_groups: Groups, state: State) -> Pairs:
    """Of all parameters that have a slow weight.

    Raises:
        RuntimeError, ValueError: one of them cannot be used.
    """
    pairs = {}
    for param, group, name in members(param_groups):
        its = state.get(param, {})
        if "slow_param" in its:
            check_param(param, name)
            format = algorithm.format_of(param, param_groups[group])
            check_state(param, its, format.of("slow_param"), name, SLOW_PARTS)
            pairs[param] = plain(param), plain(its["slow_param"])
    return pairs


@contextmanager
def swapped(native: Native | None, pairs: Pairs) -> Iterator[None]:
    """Within the context they have changed places. Whatever becomes of parameters and state within,
    the memory that is swapped back is alive."""
    alike = [pair for pair in pairs.values() if pair[0].dtype == pair[1].dtype]
    others = [pair for pair in pairs.values() if pair[0].dtype != pair[1].dtype]
    if native is not None:
        for param, (p, slow) in pairs.items():
            if p.dtype == slow.dtype:
                native.serve(param, "a parameter with slow weights", formats.of(p.dtype, ALIKE))
    with ExitStack() as undo:  # all of it is undone, whatever fails on the way
        undo.callback(_copy_back, pairs)
        with ExitStack() as done:
            for swap in _swaps(native, alike):
                swap()
                done.callback(swap)
            done.pop_all()
        undo.callback(_swap_back, native, alike)
        undo.enter_context(reference.swapped(others))
        yield


@torch.no_grad()
def set_aside(pairs: Pairs, state: State) -> None:
    """Each parameter becomes its slow weight, and its own value a part of its state: all of them,
    or none."""
    with torch.inference_mode(False):  # state made in it could not be written outside
        fast = {param: param.detach().clone() for param in pairs}
    for param, value in fast.items():
        state[param][eval_mode.FAST] = value
    try:
        for p, slow in pairs.values():
            p.copy_(slow)
    except BaseException:
        put_back(pairs, state)
        raise


@torch.no_grad()
def put_back(params: Iterable[Tensor], state: State) -> None:
    """What :func:`set_aside` took, in whatever memory and dtype the parameter has by now."""
    for param in params:
        if eval_mode.FAST in state.get(param, {}):
            plain(param).copy_(plain(state[param][eval_mode.FAST]))
    for param in params:  # only now: a second call then finds all of it
        state.get(param, {}).pop(eval_mode.FAST, None)


def _swaps(native: Native | None, pairs: list[tuple[Tensor, Tensor]]) -> list[Callable[[], None]]:
    """Calls that let tensors of the same dtype change places, wherever they lie by now."""
    rest = pairs
    swaps: list[Callable[[], None]] = []
    if native is not None:
        left = native.roster.pair([p for p, _ in pairs], [slow for _, slow in pairs])
        rest = [pairs[i] for i in sorted(left)]
        native.prepare()
        swaps = [partial(native.swap, launcher) for launcher in native.launchers]
    return swaps + [partial(reference.exchange, p, slow) for p, slow in rest]


def _swap_back(native: Native | None, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """The last first, for they may share memory; all is tried, whatever fails."""
    with ExitStack() as swaps:
        for swap in _swaps(native, pairs):
            swaps.callback(swap)


def _copy_back(pairs: Pairs) -> None:
    """What was given other memory, or converted, gets the values of its old memory."""
    for param, (before, _) in pairs.items():
        now = plain(param)
        if now.data_ptr() != before.data_ptr() or now.dtype != before.dtype:
            with torch.no_grad():
                now.copy_(before)
