"""RAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends.support import BackendName
from .state.formats import StateDType
from .step import algorithms
from .step.optimizer import FusedOptimizer


class RAdam(FusedOptimizer):
    """Rectified Adam as one fused multi-tensor step.

    Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020
    (arXiv:1908.03265), Algorithm 2. In place of ``torch.optim.RAdam``: the same arguments and,
    with ``rho_threshold=5``, the same results up to rounding.

    Args:
        params: parameters, named parameters or parameter groups. float32, float64, bfloat16,
            float16, complex64 and complex128 have kernels on the CPU and on GPUs; on other devices
            the reference backend moves them, one at a time.
        lr: learning rate, at least 0; a number or a 1-element tensor. A tensor on a GPU is read
            there, at every step and every replay of a CUDA graph; it is not checked.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the square root of the second moment, before bias correction as in
            ``torch.optim.RAdam``; above 0.
        weight_decay: at least 0.
        decoupled_weight_decay: True: the parameter is multiplied by ``1 - lr * weight_decay``
            (Loshchilov and Hutter, arXiv:1711.05101). False: ``weight_decay * p`` is added to the
            gradient (L2).
        rho_threshold: rectify when the length of the approximated SMA, rho_t, is above this; at
            least 4, as in the paper; 5 is ``torch.optim.RAdam``'s.
        maximize: ascend instead of descend.
        bounds: the lowest and the highest value of a parameter, either of which may be None, or
            None. A step ends with what ``torch.clamp`` would do, in the same pass; Ranger's slow
            weights keep within them from their first sync on. Of a complex parameter the real and
            the imaginary parts are bounded.
        centralize: gradient centralization (Yong et al., arXiv:2004.01461, equation (1)): from each
            gradient the mean of its slice along the first dimension, that of an output channel or
            neuron, is subtracted before anything else is done with it. The gradient itself is not
            written. "conv": of parameters of more than 3 dimensions, as the weights of 2-d
            convolutions; "all": of more than 1; None: of none. Not of complex parameters, of
            FullyShardedDataParallel's, or of DTensors whose shards cut slices. ``max_grad_norm``
            goes by the gradients as they come.
        backend: "cuda", "triton", "cpu", "reference", or None: the fastest that serves a
            parameter's device and dtype here. All return the same bits.
        weight_rounding: of bfloat16 and float16 parameters. "exact": beside the parameter the state
            keeps what rounding takes (``residual``, 16 bits in a bfloat16 tensor; float16:
            ``master``, float32), so that it learns as float32 does. "stochastic24" (bfloat16 only):
            8 bits of it (``residual``, int8), the rest rounded stochastically. "stochastic":
            nothing. "nearest": nothing, and steps below half a last place are lost, as in plain
            PyTorch.
        state_dtype: of the moments. ``torch.float32``; ``torch.bfloat16``; or "8bit", small floats
            in groups of 32 that share a scale (``exp_avg_scale``, ``exp_avg_sq_scale``), 2.06
            bytes for both, for parameters of 4,096 elements or more. The latter two are rounded
            stochastically. Moments of float64 and complex parameters are numbers of their own type.
        seed: of stochastic rounding, a whole number of 64 bits.
        max_grad_norm: scale gradients down so that the 2-norm of all of the optimizer's gradients
            is at most this; above 0, or None: no clipping. The gradients themselves are not
            written. The norm is over all ranks for DTensors (FSDP2, tensor parallelism) only. Where
            a rank's optimizer has plain tensors that are a part of the model, every rank would clip
            by a norm of its own: it is refused for FullyShardedDataParallel, whose
            ``model.clip_grad_norm_`` clips before the step; inside ZeroRedundancyOptimizer, and
            with an optimizer for each parameter, leave it None and call
            ``torch.nn.utils.clip_grad_norm_(model.parameters(), ...)``.
        nonfinite_grad_norm: what a step does if that norm is infinite or NaN. "propagate": goes on,
            as after ``clip_grad_norm_``. "skip": changes nothing, and does not count; no device is
            waited for. "raise": an error before anything is changed, which waits for the norm. The
            latter two take the norm without ``max_grad_norm``, too. Ranks decide alike for DTensors
            only, as they clip.
        amp_scaling: let ``torch.amp.GradScaler`` leave unscaling and the skipping of overflowed
            steps to the step itself.
        foreach: taken so that existing calls go on to work; it changes nothing.
        fused: the same; every step here is fused.
        capturable: the same; every step on a GPU can be captured in a CUDA graph.
        differentiable: not supported; True is an error.

    Every argument from ``lr`` to ``centralize``, ``weight_rounding``, ``max_grad_norm`` and
    ``seed`` may be set for each parameter group.

    State of a parameter: ``step`` (float32 scalar, on the CPU or where the kernels run),
    ``exp_avg`` and ``exp_avg_sq`` (the parameter's shape): 8 bytes a float32 parameter.

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
        TypeError: a hyperparameter is no number, or ``params`` holds what is no tensor.
        RuntimeError: the requested backend cannot run on this machine; the message says why.

    Example:
        >>> import torch
        >>> from ranger_cuda import RAdam
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = RAdam(model.parameters(), lr=1e-3, weight_decay=0.01)
        >>> inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
        >>> for _ in range(12):
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(inputs), targets)
        ...     loss.backward()
        ...     optimizer.step()
    """

    _algorithm = algorithms.RADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        rho_threshold: float = 4.0,
        maximize: bool = False,
        bounds: tuple[float | None, float | None] | None = None,
        centralize: str | None = None,
        backend: BackendName | None = None,
        weight_rounding: str = "exact",
        state_dtype: StateDType = torch.float32,
        seed: int = 0,
        max_grad_norm: float | None = None,
        nonfinite_grad_norm: str = "propagate",
        amp_scaling: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "rho_threshold": rho_threshold,
            "maximize": maximize,
            "bounds": bounds,
            "centralize": centralize,
            "weight_rounding": weight_rounding,
            "max_grad_norm": max_grad_norm,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            backend=backend,
            state_dtype=state_dtype,
            amp_scaling=amp_scaling,
            differentiable=differentiable,
            nonfinite_grad_norm=nonfinite_grad_norm,
        )
