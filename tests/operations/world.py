"""Twins, the native one and the reference; what an operation draws from; and their comparison."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from helpers import INTEGER, bits
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.step.offload import PARTS

LOW_PRECISION = (torch.bfloat16, torch.float16)
NATIVE = [*[torch.float32] * 6, torch.float64, torch.complex64, torch.complex128]
SMALL = [(), (1,), (7,), (5, 3), (4, 4), (2, 3, 4, 2), (0, 3)]
LARGE = torch.Size((130, 140))  # more than a chunk; two of them are moved in parallel


class Draw(random.Random):
    """What an operation decides by; the same decisions on both sides."""

    def tensor(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(48))
        return torch.randn(tuple(shape), generator=generator, dtype=dtype)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The values of ``tensor`` in memory of their own, laid out anyhow."""
        kind = self.choice(["dense", "dense", "transposed", "sliced", "channels_last", "odd"])
        if kind == "transposed" and tensor.dim() > 1:
            return tensor.mT.clone(memory_format=torch.contiguous_format).mT
        if kind == "sliced" and tensor.dim():
            room = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
            return room[..., self.randrange(2) :: 2].copy_(tensor)
        if kind == "channels_last" and tensor.dim() == 4:
            return tensor.clone(memory_format=torch.channels_last)
        if kind == "odd":
            start = self.randrange(1, 4)
            room = tensor.new_zeros(tensor.numel() + start)
            return room[start:].view(tensor.shape).copy_(tensor)
        return tensor.clone(memory_format=torch.contiguous_format)


class Variant(NamedTuple):
    """An optimizer that has a reference to compare with."""

    build: Callable[..., Optimizer]  # of parameters, backend
    step_name: str  # what our rule counts by, and all that a state may lack
    has_slow: bool = True
    is_fused: bool = True  # one rule, not one around another's
    is_ours: bool = True  # inside, too: nothing is changed by a step that is refused
    slow_is_apart: bool = False  # in memory that no step uses, but copies

    def is_apart(self, name: str) -> bool:
        """Whether nothing else can lie where this state does."""
        return self.slow_is_apart and name in PARTS

    @property
    def state_names(self) -> tuple[str, ...]:
        """The state that the optimizer completes by itself, one entry at a time."""
        names = ("step", "exp_avg", "exp_avg_sq", "residual", "master") if self.is_ours else ()
        slow = ("slow_param",) if self.has_slow else ()
        return tuple(dict.fromkeys((*names, *slow, self.step_name)))


VARIANTS = {
    "Ranger": Variant(lambda ps, backend: Ranger(ps, lr=0.05, k=3, backend=backend), "step"),
    "RAdam": Variant(lambda ps, backend: RAdam(ps, lr=0.05, backend=backend), "step", False),
    "Lookahead(RAdam)": Variant(
        lambda ps, backend: Lookahead(
            RAdam(ps, lr=0.05, backend=backend), k=3, alpha=0.4, backend=backend
        ),
        "lookahead_step",
        is_fused=False,
    ),
    "Ranger, slow weights on the host": Variant(
        lambda ps, backend: Ranger(
            ps, lr=0.05, k=3, backend=backend, slow_device=None if backend == "reference" else "cpu"
        ),
        "step",
        slow_is_apart=True,
    ),
    "Lookahead(RAdam), slow weights on the host": Variant(
        lambda ps, backend: Lookahead(
            RAdam(ps, lr=0.05, backend=backend),
            k=3,
            backend=backend,
            slow_device=None if backend == "reference" else "cpu",
        ),
        "lookahead_step",
        is_fused=False,
        slow_is_apart=True,
    ),
    "Lookahead(AdamW)": Variant(
        lambda ps, backend: Lookahead(torch.optim.AdamW(ps, lr=0.05), k=3, backend=backend),
        "lookahead_step",
        is_fused=False,
        is_ours=False,
    ),
}


class Side:
    """One of the twins: its optimizer and every parameter that it ever had."""

    def __init__(self, variant: Variant, backend: str | None, seed: int) -> None:
        draw = Draw(seed)
        self.variant = variant
        self.backend = backend
        self.params: list[Parameter] = []
        self.log: list[str] = []  # how its steps went: what else the twins have in common
        self.saved: dict[str, Any] | None = None
        self.dtypes = draw.choice([NATIVE, [*NATIVE, *LOW_PRECISION]])
        self.centralizes = variant.is_ours and draw.random() < 0.4
        if self.centralizes:  # which complex gradients are not
            self.dtypes = [dtype for dtype in self.dtypes if not dtype.is_complex]
        if draw.random() < 0.15:
            self.params += [Parameter(draw.tensor(LARGE)) for _ in range(2)]
        for _ in range(draw.randrange(2, 7)):
            self.new_param(draw)
        cut = draw.randrange(1, len(self.params) + 1)
        groups = [{"params": part} for part in (self.params[:cut], self.params[cut:]) if part]
        self.optimizer = variant.build(groups, backend)

    def new_param(self, draw: Draw) -> Parameter:
        shape = LARGE if draw.random() < 0.02 else draw.choice(SMALL)
        tensor = draw.tensor(shape, draw.choice(self.dtypes))
        self.params.append(Parameter(draw.laid_out(tensor)))
        return self.params[-1]

    def grouped(self) -> list[Parameter]:
        """The parameters that the groups name, each once."""
        groups = self.optimizer.param_groups
        return list(dict.fromkeys(p for group in groups for p in group["params"]))

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """Its state, without making one."""
        return self.optimizer.state.get(param, {})

    def states(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Every state tensor, and where it is."""
        for param in self.params:
            for name, value in list(self.state_of(param).items()):
                if isinstance(value, Tensor):
                    yield self.state_of(param), name, value

    def contents(self) -> dict[str, Any]:
        """All that a step may change, and the gradients, which it may not."""
        found: dict[str, Any] = {}
        for i, param in enumerate(self.params):
            found[f"parameter {i}"] = param
            found[f"gradient of parameter {i}"] = param.grad
            for name, value in self.state_of(param).items():
                found[f"{name} of parameter {i}"] = value
        for i, group in enumerate(self.optimizer.param_groups):
            for name, value in group.items():
                if name != "params":
                    found[f"{name} of group {i}"] = value
        return found

    def snapshot(self) -> dict[str, Any]:
        """A copy of :meth:`contents`; of a tensor without memory, that it has none."""
        return {name: copied(value) for name, value in self.contents().items()}

    def changed_since(self, before: dict[str, Any]) -> str:
        """What differs now; nothing is the empty string."""
        now = self.contents()
        if now.keys() != before.keys():
            return f"what there is: {sorted(now.keys() ^ before.keys())}"
        return ", ".join(name for name in now if not alike(before[name], now[name]))

    def refusal(self, call: Callable[[], Any]) -> str | None:
        """The error of a call, after which nothing may have changed; None if there was none."""
        before = self.snapshot()
        said = None
        try:
            call()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            said = f"{type(error).__name__}: {error}"
        changed = self.changed_since(before) if said and self.variant.is_ours else ""
        assert not changed, f"changed by a step that was refused: {changed} ({said})"
        return said

    def step(self, how: Callable[[], Any] | None = None) -> None:
        """A step that there is nothing against."""
        error = self.refusal(how or self.optimizer.step)
        assert error is None, f"a step that should have gone well was refused: {error}"

    def is_refused(self, message: str = "", call: Callable[[], Any] | None = None) -> None:
        """A step that must not be taken, nor change anything."""
        error = self.refusal(call or self.optimizer.step)
        assert error is not None, "a step that should have been refused was not"
        assert message in error, f"not {message!r} but {error!r}"
        self.log.append(error.split(":")[0])


class World:
    """The twins; ``backend`` is the first one's."""

    def __init__(self, variant: str, seed: int, backend: str | None = None) -> None:
        self.variant = VARIANTS[variant]
        torch.set_num_threads(2)
        self.native = Side(self.variant, backend, seed)
        self.reference = Side(self.variant, "reference", seed)

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.native, self.reference

    def compare(self) -> None:
        """Every parameter, gradient, state and group, bit for bit."""
        a, b = self.native.contents(), self.reference.contents()
        assert a.keys() == b.keys(), f"only one side has {sorted(a.keys() ^ b.keys())}"
        for name, value in a.items():
            assert alike(value, b[name]), f"{name}: {value!r} != {b[name]!r}"
        for side in self.sides:
            strange = set(side.optimizer.state) - set(side.params)
            assert not strange, f"state of what is no parameter: {strange}"
        assert self.native.log == self.reference.log, (
            f"{self.native.log[-1:]}, but the reference {self.reference.log[-1:]}"
        )


def is_freed(tensor: Tensor) -> bool:
    """Whether its memory was given back for a while; to read it is a crash."""
    return bool(tensor.numel()) and not tensor.untyped_storage().nbytes()


def copied(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return value
    return "freed" if is_freed(value) else value.detach().clone()


def alike(a: Any, b: Any) -> bool:
    """Equal down to the bits."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return a == "freed" and is_freed(b)
        return a is b or a == b or (a != a and b != b)
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or is_freed(a) or is_freed(b):
        return False
    a, b = a.detach().resolve_conj().resolve_neg(), b.detach().resolve_conj().resolve_neg()
    return torch.equal(words(a), words(b)) or torch.equal(bits(a), bits(b))


def words(tensor: Tensor) -> Tensor:
    """As :func:`helpers.bits`, in a fraction of the time, but for the payload of a NaN."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().view(INTEGER[tensor.element_size()])


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
