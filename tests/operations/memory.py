"""Memory of parameters, gradients and state that moves, is shared, or is given back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from .gradients import give_plain
from .registry import OURS, WITH_SLOW, operation
from .world import LOW_PRECISION, Draw, Side, World, alike, copied


def tensors_of(side: Side) -> list[Tensor]:
    """Every tensor that a step reads."""
    grads = [p.grad for p in side.grouped() if p.grad is not None]
    return [*side.grouped(), *grads, *(value for _, _, value in side.states())]


# --- parameters ---------------------------------------------------------------------------------


@operation(4)
def parameter_data_moves(side: Side, draw: Draw) -> None:
    for param in some(draw, side.grouped()):
        param.data = draw.laid_out(param.data)


@operation()
def parameter_changes_in_place(side: Side, draw: Draw) -> None:
    """As where weights are loaded late."""
    param = draw.choice(side.grouped())
    with torch.no_grad():
        param.copy_(draw.tensor(param.shape, param.dtype))


@operation()
def parameters_are_tied(side: Side, draw: Draw) -> bool:
    """One lies where another does, or in a part of it."""
    pairs = [
        (p, q)
        for p in side.grouped()
        for q in side.grouped()
        if p is not q and p.dtype == q.dtype and 0 < p.numel() <= q.numel() and is_dense(q)
    ]
    if not pairs:
        return False
    p, q = draw.choice(pairs)
    start = draw.randrange(q.numel() - p.numel() + 1)
    p.data = q.data.view(-1)[start : start + p.numel()].view(p.shape)
    return True


@operation()
def parameters_are_untied(side: Side, draw: Draw) -> None:
    for param in side.grouped():
        param.data = param.data.clone()


@operation()
def parameters_in_one_buffer(side: Side, draw: Draw) -> None:
    """One behind the other, and not tied."""
    for dtype in dict.fromkeys(p.dtype for p in side.grouped()):
        params = [p for p in side.grouped() if p.dtype == dtype]
        buffer = torch.cat([p.detach().flatten() for p in params])
        start = 0
        for param in params:
            param.data = buffer[start : start + param.numel()].view(param.shape)
            start += param.numel()


@operation(2, OURS)
def parameter_overlaps_itself(side: Side, draw: Draw) -> bool:
    """Refused or moved as the reference moves it, and then given memory of its own again."""
    # Torch copies a large one in parallel, and each time with another result.
    params = [p for p in side.grouped() if p.dim() == 2 and 1 < p.numel() < 1000]
    if not params:
        return False
    param = draw.choice(params)
    rows, columns = param.shape
    room = draw.tensor([rows + columns], param.dtype)
    param.data = room.as_strided((rows, columns), (1, 1))
    param.grad = draw.tensor(param.shape, param.dtype)
    error = side.refusal(side.optimizer.step)
    side.log.append(str(error).split(":")[0])
    param.data = param.data.clone()
    return True


@operation()
def parameter_is_replaced(side: Side, draw: Draw) -> bool:
    """By another object, as by a module's new layer; the old one's state stays behind."""
    old = draw.choice(side.grouped())
    new = Parameter(draw.laid_out(draw.tensor(old.shape, old.dtype)))
    side.params.append(new)
    for group in side.optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    return True


# --- any tensor ---------------------------------------------------------------------------------


@operation()
def memory_becomes_shared(side: Side, draw: Draw) -> None:
    """``share_memory_()`` moves it in place."""
    for tensor in some(draw, tensors_of(side)):
        if tensor.numel() and not tensor.is_inference():
            tensor.share_memory_()


@operation()
def memory_is_set(side: Side, draw: Draw) -> None:
    for tensor in some(draw, tensors_of(side)):
        if not (tensor.is_neg() or tensor.is_conj() or tensor.is_inference()):
            with torch.no_grad():
                tensor.set_(draw.laid_out(tensor.detach()))


@operation(4)
def state_data_moves(side: Side, draw: Draw) -> bool:
    """One tensor's, or all of it."""
    values = [value for _, _, value in side.states()]
    for value in some(draw, values):
        value.data = draw.laid_out(value.data) if value.dim() else value.data.clone()
    return bool(values)


@operation(4)
def memory_is_given_back_for_a_while(side: Side, draw: Draw) -> None:
    """As FSDP does; it comes back elsewhere, with the values it had."""
    for tensor in some(draw, tensors_of(side)):
        keep = torch.empty(draw.randrange(1, 4000))  # what comes next does not come here
        if has_memory_to_give(tensor):
            give_back(tensor)()
        del keep


@operation(on_both=True)
def step_while_memory_is_given_back(world: World, draw: Draw) -> bool:
    """Refused where the step would touch it, and not where its parameter rests."""
    native = world.native
    seed = draw.getrandbits(32)
    for side in world.sides:
        give_plain(side, Draw(seed))
        side.step()
    i = draw.randrange(len(native.grouped()))
    rests = draw.random() < 0.3
    if rests:
        for side in world.sides:
            side.grouped()[i].grad = None
    found = [n for n, t in touched(native, i).items() if has_memory_to_give(t)]
    if not found or len(in_memory_of(native, native.grouped()[i])) > 1:
        return False
    name = draw.choice(found)
    for side in world.sides:
        tensor = touched(side, i)[name]
        # The reference shows exp_avg_sq to NumPy, and from then on it has none to give.
        restore = give_back(tensor) if has_memory_to_give(tensor) else None
        try:
            if rests:
                side.step()
            elif restore:
                assert "not allocated" in str(side.refusal(side.optimizer.step)), "not refused"
        finally:
            if restore:
                restore()
        side.step()
    return True


def touched(side: Side, i: int) -> dict[str, Tensor]:
    """What a step touches of a parameter."""
    param = side.grouped()[i]
    found = {name: side.state_of(param).get(name) for name in side.variant.state_names}
    if param.dtype not in LOW_PRECISION:
        found = {name: t for name, t in found.items() if name not in ("residual", "master")}
    if side.variant.is_ours or param.grad is None:  # torch's own do not look before they read
        found |= {"parameter": param, "gradient": param.grad}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def in_memory_of(side: Side, param: Tensor) -> list[Tensor]:
    """The parameters that lie in the memory of ``param`` or its state."""
    own = {
        t.untyped_storage().data_ptr()
        for t in (param, *side.state_of(param).values())
        if isinstance(t, Tensor)
    }
    return [p for p in side.grouped() if p.untyped_storage().data_ptr() in own]


def has_memory_to_give(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()  # torch crashes where that is shared with processes
    return bool(tensor.numel()) and storage.resizable() and not storage.is_shared()


def give_back(tensor: Tensor) -> Callable[[], None]:
    """Resize its storage to 0; what is returned restores it."""
    storage = tensor.untyped_storage()
    size, kept = storage.nbytes(), storage.clone()
    storage.resize_(0)

    def restore() -> None:
        storage.resize_(size)
        storage.copy_(kept)

    return restore


def some(draw: Draw, tensors: list[Tensor]) -> list[Tensor]:
    """One, a few or all of them."""
    if not tensors:
        return []
    number = draw.choice([1, 1, 2, len(tensors)])
    return draw.sample(tensors, min(number, len(tensors)))


def is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj()


# --- slow weights -------------------------------------------------------------------------------


@operation(5, WITH_SLOW)
def evaluate_on_slow_weights(side: Side, draw: Draw) -> None:
    """Whatever happens within, each parameter has its own bits afterwards."""
    lasting = {n: v for n, v in side.contents().items() if n.startswith(("param", "grad", "slow"))}
    before = {name: copied(value) for name, value in lasting.items()}
    slow = {p: copied(side.state_of(p).get("slow_param")) for p in side.grouped()}
    untied = len(owners_of_all(side)) == len(side.grouped())
    # What was tied and no longer is has two values to get back, and one memory to get them from.
    parted = [move, convert] if untied else []
    within = draw.choice([read, fail, interrupt, refuse, share, share_state, *parted])
    try:
        with side.optimizer.slow_weights():
            for param, value in slow.items():
                if value is not None and untied:
                    assert alike(param, value.to(param.dtype)), "not the slow weight"
            within(side, draw)
    except (ZeroDivisionError, KeyboardInterrupt):
        assert within in (fail, interrupt)
    now = side.contents()
    changed = [name for name, value in before.items() if not alike(value, now[name])]
    assert not changed, f"changed by an evaluation ({within.__name__}): {changed}"


def owners_of_all(side: Side) -> set[int]:
    return {p.untyped_storage().data_ptr() if p.numel() else id(p) for p in side.grouped()}


def read(side: Side, draw: Draw) -> None:
    pass


def fail(side: Side, draw: Draw) -> None:
    raise ZeroDivisionError


def interrupt(side: Side, draw: Draw) -> None:
    raise KeyboardInterrupt


def refuse(side: Side, draw: Draw) -> None:
    optimizer = side.optimizer
    calls = [optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({})]
    for call in [*calls, lambda: optimizer.slow_weights().__enter__()]:
        side.is_refused("inside `with", call)


def share(side: Side, draw: Draw) -> None:
    for param in some(draw, side.grouped()):
        param.share_memory_()


def share_state(side: Side, draw: Draw) -> None:
    for param in some(draw, side.grouped()):
        if "slow_param" in side.state_of(param):
            side.state_of(param)["slow_param"].share_memory_()


def move(side: Side, draw: Draw) -> None:
    for param in some(draw, side.grouped()):
        param.data = draw.laid_out(param.data)


def convert(side: Side, draw: Draw) -> None:
    """There and back; what is rounded away does not last, where a slow weight was swapped in."""
    for param in some(draw, [p for p in side.grouped() if "slow_param" in side.state_of(p)]):
        dtype = param.dtype
        low = torch.complex64 if dtype.is_complex else torch.bfloat16
        gradient, param.grad = param.grad, None
        param.data = param.data.to(low).to(dtype)
        param.grad = gradient
