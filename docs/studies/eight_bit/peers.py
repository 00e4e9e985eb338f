"""What stalls or vanishes in optimizers as they are installed.

    TRITON_INTERPRET=1 python docs/studies/eight_bit/peers.py

On the CPU, through their public classes, beside ours; FlashOptim in Triton's interpreter. It needs
torchao, bitsandbytes and flashoptim, takes ten minutes, and adds ``peers`` to
``results.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from report import BETAS2, save
from torch import Tensor
from torch.nn import Parameter

from benchmarks import flashoptim_on_cpu
from ranger_cuda import Ranger
from ranger_cuda.state import formats

PACKAGES = ("torch", "torchao", "bitsandbytes", "flashoptim", "triton")
State = dict[str, Any]


class Peer(NamedTuple):
    """An optimizer of bfloat16 parameters.

    Attributes:
        build: from parameters, learning rate and beta2.
        v: its exp_avg_sq, of a parameter and its state, as float32.
        weights: the weights that those stand for.
        goes_on: whether v may change after a step without gradients that left it as it was.
        count: of elements.
        within: where it runs.
    """

    build: Callable[[list[Parameter], float, float], torch.optim.Optimizer]
    v: Callable[[Parameter, State], Tensor]
    weights: Callable[[Parameter, State], Tensor] = lambda param, state: param.detach().float()
    goes_on: bool = False
    count: int = 4096
    within: Callable[[], AbstractContextManager[None]] = nullcontext


def ours(rounding: str, state_dtype: formats.StateDType) -> Peer:
    """Never rectified and without Lookahead: its updates are AdamW's of a constant gradient."""

    def build(params: list[Parameter], lr: float, beta2: float) -> Ranger:
        kept: dict[str, Any] = {"weight_rounding": rounding, "state_dtype": state_dtype}
        return Ranger(params, lr, (0.9, beta2), k=10**6, rho_threshold=1e9, **kept)

    def read(stream: str, param: Parameter, state: State) -> Tensor:
        codec = getattr(formats.of_param(param, rounding, state_dtype), stream)
        flat = {n: t.flatten() for n, t in state.items() if torch.is_tensor(t)}
        stored = param.detach() if stream == "param" else state[stream]
        return codec.decode(stored.flatten(), flat, torch.float32)

    def v(param: Parameter, state: State) -> Tensor:
        return read("exp_avg_sq", param, state)

    def weights(param: Parameter, state: State) -> Tensor:
        return read("param", param, state)

    return Peer(build, v, weights, goes_on=True)


def plain_v(param: Parameter, state: State) -> Tensor:
    """Where it is a tensor like others."""
    return state["exp_avg_sq"].float()


def torch_adamw(params: list[Parameter], lr: float, beta2: float) -> torch.optim.Optimizer:
    """Without weight decay, as all of them here."""
    return torch.optim.AdamW(params, lr, (0.9, beta2), weight_decay=0.0)


def torchao(stochastic: bool) -> Peer:
    """Its weights are bfloat16, rounded to nearest or stochastically; there is no master."""

    def build(params: list[Parameter], lr: float, beta2: float) -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit

        options: dict[str, Any] = {"bf16_stochastic_round": stochastic, "weight_decay": 0.0}
        return AdamW8bit(params, lr, (0.9, beta2), **options)

    return Peer(build, lambda param, state: state["exp_avg_sq"].dequantize(torch.float32))


def bitsandbytes(params: list[Parameter], lr: float, beta2: float) -> torch.optim.Optimizer:
    """On the CPU by a kernel of its own."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr, (0.9, beta2), weight_decay=0.0)


def bitsandbytes_v(param: Parameter, state: State) -> Tensor:
    """Read by its own function."""
    from bitsandbytes.functional import dequantize_blockwise

    codes, scales = state["state2"], state["absmax2"]
    return dequantize_blockwise(codes, absmax=scales, code=state["qmap2"], blocksize=256)


def flashoptim(fused: bool) -> Peer:
    """In Triton's interpreter."""

    def build(params: list[Parameter], lr: float, beta2: float) -> torch.optim.Optimizer:
        from flashoptim import FlashAdamW

        return FlashAdamW(params, lr, (0.9, beta2), weight_decay=0.0, fused=fused)

    def weights(param: Parameter, state: State) -> Tensor:
        from flashoptim import reconstruct_fp32_param

        if "error_bits" not in state:
            return param.float()
        return reconstruct_fp32_param(param.detach(), state["error_bits"])

    def v(param: Parameter, state: State) -> Tensor:
        return state["exp_avg_sq"].materialize()

    # 1024: its block, and what an interpreted step takes is by the block.
    return Peer(build, v, weights, count=1024, within=flashoptim_on_cpu.allowed)


# For v, and for weights; None: v is that of the row above.
PEERS: dict[str, tuple[Peer | None, Peer]] = {
    'Ranger, "8bit", "stochastic24"': (ours("stochastic24", "8bit"),) * 2,
    'Ranger, bfloat16, "stochastic"': (
        ours("stochastic", torch.bfloat16),
        # A bfloat16's step of 2^-7 is a rare coin: it needs many for an average.
        ours("stochastic", torch.bfloat16)._replace(count=1 << 16),
    ),
    "torch AdamW": (Peer(torch_adamw, plain_v),) * 2,
    "torchao AdamW8bit": (torchao(False),) * 2,
    "torchao AdamW8bit, bf16_stochastic_round": (None, torchao(True)._replace(count=1 << 16)),
    "bitsandbytes AdamW8bit": (Peer(bitsandbytes, bitsandbytes_v),) * 2,
    # Fused for v, of which it computes the same but for a rounding of float32, and faster.
    "FlashOptim FlashAdamW, 24-bit master": (flashoptim(True), flashoptim(False)),
}


class Run:
    """One parameter under an optimizer."""

    def __init__(self, peer: Peer, start: Tensor, lr: float, beta2: float) -> None:
        self.peer, self.param = peer, Parameter(start.bfloat16().clone())
        self.optimizer = peer.build([self.param], lr, beta2)

    def step(self, grad: Tensor) -> None:
        """One step of this gradient."""
        self.param.grad = grad.to(self.param.dtype)
        self.optimizer.step()

    def v(self) -> Tensor:
        """As it is kept."""
        return self.peer.v(self.param, self.optimizer.state[self.param]).clone()

    def weights(self) -> Tensor:
        """As they are kept."""
        return self.peer.weights(self.param, self.optimizer.state[self.param]).clone()


def decay(peer: Peer, beta2: float) -> float:
    """v after 3 time constants without gradients, over what is due.

    One gradient makes v what normal ones leave after long, near enough: a gamma distribution of the
    same mean and variance.
    """
    torch.manual_seed(0)
    shape = (1 + beta2) / (2 * (1 - beta2))
    v = torch.distributions.Gamma(shape, shape).sample((peer.count,))
    run = Run(peer, torch.ones(peer.count), 0.0, beta2)
    run.step((v / (1 - beta2)).sqrt())
    start, nothing = run.v(), torch.zeros(peer.count)
    before, steps = start, round(3 / (1 - beta2))
    for _ in range(steps):
        run.step(nothing)
        after = run.v()
        if not peer.goes_on and torch.equal(after, before):
            break  # it depends on nothing else: so it stays
        before = after
    return float(after.mean() / start.mean()) / beta2**steps


def tiny(peer: Peer, beta2: float = 0.999) -> float:
    """v after 300 steps of gradients of 1e-8, over float32's."""
    generator = torch.Generator().manual_seed(0)
    run, exact = Run(peer, torch.ones(peer.count), 0.0, beta2), torch.zeros(peer.count)
    for _ in range(300):
        g = (1e-8 * torch.randn(peer.count, generator=generator)).bfloat16()
        run.step(g)
        exact = beta2 * exact + (1 - beta2) * g.float().square()
    return float(run.v().mean() / exact.mean())


def way(peer: Peer) -> float:
    """How far 200 updates of 1e-5 move weights in [1, 2), over 200 * 1e-5."""
    start = torch.linspace(1.01, 1.99, peer.count).bfloat16()
    run = Run(peer, start, 1e-5, 0.999)
    for _ in range(200):
        run.step(torch.ones(peer.count))
    return float((start.float() - run.weights()).double().mean()) / (200 * 1e-5)


def main() -> None:
    """Measure all of them."""
    rows: dict[str, dict[str, Any]] = {}
    of_v: dict[str, Any] = {}
    for name, (for_v, for_weights) in PEERS.items():
        begin = time.perf_counter()
        with for_weights.within():
            if for_v:
                decays = {str(beta2): decay(for_v, beta2) for beta2 in BETAS2}
                of_v = {"decay": decays, "tiny": tiny(for_v)}
            rows[name] = {**of_v, "way": way(for_weights)}
        print(f"{name}: {time.perf_counter() - begin:.0f} s, {rows[name]}", flush=True)
    save(peers={"versions": {p: version(p) for p in PACKAGES}, "rows": rows})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
