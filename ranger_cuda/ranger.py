"""Ranger: RAdam with Lookahead in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends.support import BackendName
from .state.formats import StateDType
from .step import algorithms
from .step.optimizer import FusedOptimizer
from .step.slow_weights import SlowWeights


class Ranger(SlowWeights, FusedOptimizer):
    """RAdam with Lookahead fused into the same step.

    RAdam: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020
    (arXiv:1908.03265), Algorithm 2. Lookahead: Zhang et al., "Lookahead Optimizer: k steps forward,
    1 step back", NeurIPS 2019 (arXiv:1907.08610), Algorithm 1: every ``k`` steps of a parameter its
    slow weight moves the fraction ``alpha`` of the way to it, and it goes on from there. A
    parameter's cycle follows from its own step count, so a resumed run syncs where an
    uninterrupted one does.

    Coming from AdamW, start at 4 times its learning rate, without warmup: both halves of Ranger
    take shorter steps than it does at the same one. Evaluate on the slow weights::

        with optimizer.slow_weights():
            validate(model)

    Args:
        params: parameters, named parameters or parameter groups. float32, float64, bfloat16,
            float16, complex64 and complex128 have kernels on the CPU and on GPUs; on other devices
            the reference backend moves them, one at a time.
        lr: learning rate, at least 0; a number or a 1-element tensor. A tensor on a GPU is read
            there, at every step and every replay of a CUDA graph; it is not checked. In
            the project's experiments the best was 4 to 8 times AdamW's.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the square root of the second moment, before bias correction as in
            ``torch.optim.RAdam``; above 0.
        weight_decay: at least 0.
        k: the Lookahead period, in optimizer steps; at least 1.
        alpha: the Lookahead interpolation factor, in [0, 1]. With 1 the result is RAdam's; with 0
            the parameter returns to its first value at each sync.
        outer_momentum: the momentum of slow weights, in [0, 1); 0: none. Above 0 a sync is
            a step of ``torch.optim.SGD(lr=alpha, momentum=outer_momentum,
            nesterov=outer_nesterov)`` on the slow weight, whose gradient is the slow weight less
            the parameter: SNOO (Kallusky et al., arXiv:2510.15830, Algorithm 1), and on one worker
            DiLoCo (Douillard et al., arXiv:2311.08105).
        outer_nesterov: whether it is Nesterov's momentum.
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
        eval_with_slow_weights: let :meth:`eval` and :meth:`train`, which trainers call, put slow
            weights into the parameters and take them out again. Without it they do nothing.
        slow_device: "cpu": slow weights and their momentum are in the host's memory (pinned), and
            on a GPU, bucket by bucket, in a step that ends a cycle, which returns when they are
            back; between such steps a GPU has what AdamW has there. The bits are the same. The host
            decides whether a cycle ends: no step can be captured in a CUDA graph, and whatever may
            skip one (``amp_scaling``, ``nonfinite_grad_norm="skip"``) is waited for. Not for
            DTensors, nor with released gradients. None: beside their parameters. See
            docs/around_a_step.md.
        foreach: taken so that existing calls go on to work; it changes nothing.
        fused: the same; every step here is fused.
        capturable: the same; every step on a GPU can be captured in a CUDA graph.
        differentiable: not supported; True is an error.

    Every argument from ``lr`` to ``centralize``, ``weight_rounding``, ``max_grad_norm`` and
    ``seed`` may be set for each parameter group, which has ``k`` and ``alpha`` as ``lookahead_k``
    and ``lookahead_alpha``.

    State of a parameter: ``step`` (float32 scalar, on the CPU or where the kernels run),
    ``exp_avg``, ``exp_avg_sq`` and ``slow_param`` (the parameter's shape): 12 bytes a float32
    parameter, where AdamW has 8; with ``outer_momentum`` ``outer_momentum_buffer`` as well
    (float32, 4 bytes more). ``slow_param`` starts as the parameter before its first update.
    Beside a bfloat16 or float16 parameter it is float32, but stored as the parameter is where that
    is rounded stochastically (with ``slow_residual`` under "stochastic24").

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
        TypeError: a hyperparameter is no number, or ``params`` holds what is no tensor.
        RuntimeError: the requested backend cannot run on this machine; the message says why.

    Example:
        >>> import torch
        >>> from ranger_cuda import Ranger
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = Ranger(model.parameters(), lr=4e-3, weight_decay=0.01)
        >>> inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
        >>> for _ in range(12):
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(inputs), targets)
        ...     loss.backward()
        ...     optimizer.step()
        >>> with optimizer.slow_weights():
        ...     validation_loss = torch.nn.functional.mse_loss(model(inputs), targets)
    """

    _algorithm = algorithms.RANGER

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        *,
        k: int = 6,
        alpha: float = 0.5,
        outer_momentum: float = 0.0,
        outer_nesterov: bool = True,
        decoupled_weight_decay: bool = True,
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
        eval_with_slow_weights: bool = False,
        slow_device: str | torch.device | None = None,
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
            "lookahead_k": k,
            "lookahead_alpha": alpha,
            "outer_momentum": outer_momentum,
            "outer_nesterov": outer_nesterov,
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
            eval_with_slow_weights=eval_with_slow_weights,
            slow_device=slow_device,
        )
