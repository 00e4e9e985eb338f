"""Our optimizers described as torch describes its own, and what the tests over them share."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_error_inputs_func_adamw,
    optim_error_inputs_func_radam,
    optim_inputs_func_adamw,
    optim_inputs_func_radam,
)

from ranger_cuda import Lookahead, RAdam, Ranger

K = 2  # every second step of a test syncs


def ranger(params: Any, **kwargs: Any) -> Ranger:
    return Ranger(params, **{"k": K, **kwargs})


def lookahead_adamw(params: Any, k: int = K, alpha: float = 0.5, **kwargs: Any) -> Lookahead:
    return Lookahead(torch.optim.AdamW(params, **kwargs), k=k, alpha=alpha)


def lookahead_radam(params: Any, k: int = K, alpha: float = 0.5, **kwargs: Any) -> Lookahead:
    return Lookahead(RAdam(params, **kwargs), k=k, alpha=alpha)


def radam_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    more = {
        "tensor lr": {"lr": torch.tensor(1e-3)},
        "capturable": {"capturable": True, "weight_decay": 0.1},
        "rho_threshold": {"rho_threshold": 5, "betas": (0.8, 0.9)},
        "reference backend": {"backend": "reference", "decoupled_weight_decay": True},
        "max_grad_norm": {"max_grad_norm": 0.5},
    }
    return [
        *optim_inputs_func_radam(device),
        *(OptimizerInput(None, kwargs, desc) for desc, kwargs in more.items()),
    ]


def with_lookahead(inputs: Any) -> Any:
    def inputs_func(device: Any, dtype: Any = None) -> list[OptimizerInput]:
        more = {"k = 1": {"k": 1}, "alpha = 1": {"alpha": 1.0}, "alpha": {"alpha": 0.8, "k": 3}}
        return [
            *inputs(device),
            *(OptimizerInput(None, kwargs, desc) for desc, kwargs in more.items()),
        ]

    return inputs_func


def with_lookahead_errors(errors: Any) -> Any:
    def error_inputs_func(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
        wrong = {"k": (0, -1, 2.5, True, "2", None), "alpha": (-0.1, 1.1, float("nan"))}
        return errors(device, dtype) + [
            ErrorOptimizerInput(
                OptimizerInput([Parameter(torch.ones(1))], {name: value}, f"{name} = {value!r}"),
                error_type=ValueError,
                error_regex=f"Invalid {name} value: {value!r}",
            )
            for name, values in wrong.items()
            for value in values
        ]

    return error_inputs_func


SCHEDULERS = (
    [lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10)],
    [lambda o: lr_scheduler.ReduceLROnPlateau(o)],
    [lambda o: lr_scheduler.ExponentialLR(o, gamma=0.99), lambda o: lr_scheduler.LinearLR(o)],
)


def info(optim_cls: Any, inputs: Any, errors: Any, impls: tuple[str, ...] = ()) -> OptimizerInfo:
    # Ours take the implementation flags and ignore them, which has a test of its own.
    return OptimizerInfo(
        optim_cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=SCHEDULERS,
        supported_impls=impls,
        supports_fused_on=("cpu",),
        not_og_supported_flags=("foreach", "differentiable", "maximize", "capturable", "fused"),
        has_capturable_arg=True,
    )


INFOS = [
    info(RAdam, radam_inputs, optim_error_inputs_func_radam),
    info(
        ranger, with_lookahead(radam_inputs), with_lookahead_errors(optim_error_inputs_func_radam)
    ),
    info(
        lookahead_radam,
        with_lookahead(radam_inputs),
        with_lookahead_errors(optim_error_inputs_func_radam),
    ),
    info(
        lookahead_adamw,
        with_lookahead(optim_inputs_func_adamw),
        with_lookahead_errors(optim_error_inputs_func_adamw),
        ("foreach", "fused"),
    ),
]


class Config:
    """One way to build one optimizer."""

    def __init__(self, info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
        self.info = info
        self.kwargs = kwargs

    def build(self, params: Any, **overrides: Any) -> torch.optim.Optimizer:
        # Copied: a scheduler changes a tensor learning rate in place.
        return self.info.optim_cls(params, **{**copy.deepcopy(self.kwargs), **overrides})

    @property
    def is_ours(self) -> bool:
        """Whether all of the arithmetic is, so that its bits are promised."""
        return self.info.optim_cls is not lookahead_adamw


CONFIGS = [
    pytest.param(Config(info, config.kwargs), id=f"{info.name}-{config.desc}")
    for info in INFOS
    for config in _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
]
each_config = pytest.mark.parametrize("config", CONFIGS)


def each_config_without(*options: str, ours: bool = False) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "config",
        [
            param
            for param in CONFIGS
            for config in param.values
            if not any(config.kwargs.get(option) for option in options)
            and (config.is_ours or not ours)
        ],
    )


each_info = pytest.mark.parametrize(
    "config", [pytest.param(Config(info, {}), id=info.name) for info in INFOS]
)


def random_params(*shapes: tuple[int, ...], seed: int = 0, dtype: Any = None) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Parameter(torch.randn(shape, generator=generator).to(dtype or torch.float32))
        for shape in shapes
    ]


def set_grads(params: Iterable[Tensor], step: int) -> None:
    """The same random gradients for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        real = torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
        grad = torch.randn(tuple(real.shape), generator=generator, dtype=torch.float32)
        grad = grad.to(real.dtype)
        param.grad = torch.view_as_complex(grad) if param.is_complex() else grad


def train(
    optimizer: torch.optim.Optimizer, params: Iterable[Tensor], steps: Iterable[int]
) -> torch.optim.Optimizer:
    params = list(params)
    for step in steps:
        set_grads(params, step)
        optimizer.step()
    return optimizer


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """A copy of everything a step may change: parameters, state, groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(
        {
            "params": [p.detach() for p in params],
            "state": [dict(optimizer.state.get(p, {})) for p in params],
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
            ],
        }
    )


def same(a: Any, b: Any) -> bool:
    """Equal down to the bits of every tensor, dtypes and keys included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def bytes_of(tensor: Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return dense.view(torch.uint8).numpy().tobytes()


def assert_refuses(optimizer, error, message):
    """The step fails and changes nothing."""
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same(snapshot(optimizer), before)


OWN = {"RAdam": RAdam, "Ranger": ranger, "Lookahead": lookahead_radam}
each_fused = pytest.mark.parametrize("cls", [RAdam, ranger], ids=["RAdam", "Ranger"])
each_own = pytest.mark.parametrize("cls", OWN.values(), ids=OWN)
