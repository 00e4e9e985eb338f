"""DiLoCo: workers that train apart and meet every so many steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .backends import support
from .lookahead import Lookahead
from .state.formats import Format
from .state.new_state import value_of
from .state.tensors import local, plain
from .step import cycle
from .step.algorithms import LOOKAHEAD, Member, members
from .step.cycle import Cycle

STEP = "diloco_step"  # of a group: steps since its last sync


class Averaged(NamedTuple):
    """A parameter, and what is stored beside it."""

    format: Format
    param: Tensor
    beside: dict[str, Tensor]


class DiLoCo(Lookahead):
    """Lookahead whose workers train apart, and go on from the average of where they got to.

    Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models"
    (arXiv:2311.08105), Algorithm 1. Every worker takes ``k`` steps of its own optimizer on its own
    data. Then parameters are averaged over all workers by one ``all_reduce`` (for each of float32
    and float64, on each device), and every worker takes the same outer step: SGD with Nesterov
    momentum on the slow weight, whose gradient is the slow weight less the average. All workers
    have the same bits then. With one worker it is SNOO (arXiv:2510.15830). MuLoCo
    (arXiv:2505.23725) is it around ``torch.optim.Muon``.

    ``torch.distributed`` does the communication, over any process group: one rank for each worker,
    or, where workers are sharded (FSDP2), the ranks that have the same shard of each::

        mesh = init_device_mesh("cuda", (workers, shards), mesh_dim_names=("worker", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        inner = ranger_cuda.RAdam(model.parameters(), lr=1e-3)
        optimizer = ranger_cuda.DiLoCo(inner, k=100, process_group=mesh.get_group("worker"))

    A worker that dies goes on from its own checkpoint, or from another worker's: slow weights and
    their momentum are the same everywhere. Where workers cannot meet, ``step()`` raises after the
    inner step, and the next one tries again.

    Args:
        optimizer: the inner optimizer, whose parameters the constructor makes those of the group's
            first rank, as DistributedDataParallel does.
        k: steps between syncs, at least 1.
        alpha: the outer learning rate, in [0, 1].
        outer_momentum: in [0, 1); 0: none.
        outer_nesterov: whether it is Nesterov's.
        process_group: of the workers; None: all ranks. Without ``torch.distributed`` there is one
            worker.
        backend: of the outer step, as for :class:`Lookahead`.
        eval_with_slow_weights: as for :class:`Lookahead`.

    Low-precision parameters are averaged as the numbers that the next step starts from, in float32,
    and rounded to nearest. A group counts steps since its last sync in ``diloco_step``.

    State of a parameter: as of :class:`Lookahead`; ``lookahead_step`` counts outer steps.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`Lookahead`. ``step()`` raises RuntimeError
            for a parameter without a gradient in its first step: workers would wait for each other.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: int = 500,
        alpha: float = 0.7,
        *,
        outer_momentum: float = 0.9,
        outer_nesterov: bool = True,
        process_group: dist.ProcessGroup | None = None,
        backend: support.BackendName | None = None,
        eval_with_slow_weights: bool = False,
    ) -> None:
        super().__init__(
            optimizer,
            k,
            alpha,
            outer_momentum=outer_momentum,
            outer_nesterov=outer_nesterov,
            backend=backend,
            eval_with_slow_weights=eval_with_slow_weights,
        )
        self._group = process_group
        if self._workers() > 1:
            for param, _, _ in members(self.param_groups):
                its = plain(local(param.detach()))
                first = its.contiguous()  # as collectives want it
                dist.broadcast(first, group=process_group, group_src=0)
                its.copy_(first)

    def _workers(self) -> int:
        is_there = dist.is_available() and dist.is_initialized()
        return dist.get_world_size(self._group) if is_there else 1

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None:
            raise TypeError("a process group cannot be copied or pickled; save state_dict()")
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._group = None
        super().__setstate__(state)

    def _complete_groups(self) -> None:
        super()._complete_groups()
        for group in self.param_groups:
            group.setdefault(STEP, 0)

    @torch.compiler.disable
    def _begin(self, any_may_move: bool) -> Cycle:
        if not any_may_move:
            self._check_all_move()
        return super()._begin(any_may_move)

    @torch.compiler.disable
    def _pull(self, begun: Cycle) -> None:
        cycle.commit(self._dispatcher, self.state, begun)
        groups = self.param_groups
        meet = [group[STEP] + 1 >= group["lookahead_k"] for group in groups]
        if any(meet):
            self._check_all_move()
            moved = [meet[m.group] and "slow_param" in self.state[m.param] for m in members(groups)]
            self._average([m for m, moves in zip(members(groups), moved, strict=True) if moves])
            hypers = [cycle.interpolation(group)._replace(k=1) for group in groups]
            self._dispatcher.step(groups, self.state, cycle.new_count, hypers, moved=moved)
        for group, met in zip(groups, meet, strict=True):
            group[STEP] = 0 if met else group[STEP] + 1

    def _check_all_move(self) -> None:
        for param, _, name in members(self.param_groups):
            moves = param.grad is not None or "slow_param" in self.state.get(param, ())
            if param.requires_grad and not moves:
                raise RuntimeError(
                    f"{name} has no gradient in its first step; every worker has to move the same "
                    "parameters: give it a gradient of zeros, or freeze it by requires_grad_(False)"
                )

    @torch.no_grad()
    def _average(self, found: list[Member]) -> None:
        """Let parameters be the average over all workers."""
        workers = self._workers()
        if workers == 1:
            return
        alike: dict[tuple[torch.dtype, torch.device], list[Averaged]] = {}
        for param, group, _ in found:
            state = self.state[param]
            format = LOOKAHEAD.format_for(param, self.param_groups[group], state)
            beside = {part.name: plain(state[part.name]) for part in format.param.rest}
            one = Averaged(format, plain(param), beside)
            alike.setdefault((format.value, one.param.device), []).append(one)
        for chosen in alike.values():
            values = [value_of(*one).reshape(-1) for one in chosen]
            flat = torch.cat(values)
            dist.all_reduce(flat, group=self._group)
            flat /= workers
            for one, value in zip(chosen, flat.split([v.numel() for v in values]), strict=True):
                half = torch.full_like(one.param, 0x8000, dtype=torch.int32)  # rounds to nearest
                value = value.view(one.param.shape)
                one.format.param.encode(value, one.param, one.beside, half)
