"""Training on several processes that torchrun started, with the bits of one.

A batch is cut into a fixed number of slices, and their gradients are added in pairs, pairs of pairs
and so on, whichever ranks they are on: no sum depends on the number of ranks. Nor do the steps of
this package; torch's fused AdamW rounds by where in its memory an element lies, and so by shards.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..state import formats
from ..state.codecs import GROUP
from ..state.new_state import new_state
from .corpus import Batch
from .errors import CommandError

if dist.is_available():  # a torch built without it trains on one process
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    # Whatever a rank raised, its own or, in what is no Exception, any rank's.
    FAILURES = (Exception, CheckpointException)

Parts = Mapping[str, tuple[nn.Module, Optimizer]]  # of a checkpoint, by the run's name
SHARDS = "shards-"  # and the step, of the folders that torch.distributed.checkpoint writes


def started_ranks() -> int | None:
    """How many processes torchrun started; None: this one was started without it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def is_first() -> bool:
    """Whether this process is the one that prints and draws."""
    return os.environ.get("RANK", "0") == "0"


def say(*lines: str) -> None:
    """Print on the first rank."""
    if is_first():
        print(*lines, flush=True)


class Ranks:
    """The processes that train a model together.

    Args:
        parallel: "none", "ddp" or "fsdp".
        slices: of a batch; a power of two that the number of ranks divides.
    """

    def __init__(self, parallel: str = "none", slices: int = 1) -> None:
        self.parallel, self.slices = parallel, slices
        self.is_alone = parallel == "none"
        self.rank = 0 if self.is_alone else int(os.environ["RANK"])
        self.size = 1 if self.is_alone else int(os.environ["WORLD_SIZE"])

    @contextlib.contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Within it the ranks can talk to each other: over NCCL between GPUs, else over gloo."""
        if self.is_alone:
            yield
            return
        is_cuda = torch.device(device).type == "cuda"
        if is_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if is_cuda else "gloo")
        dist.barrier()  # all have looked at the output folder before the first one writes to it
        try:
            yield
        except BaseException as error:
            if isinstance(error, CommandError) and not is_first():
                print(f"[rank {self.rank}] {error}", file=sys.stderr)  # it may be this one's own
            raise
        else:
            dist.barrier()
            dist.destroy_process_group()

    def spread(
        self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device
    ) -> nn.Module:
        """What to call in place of the model, which is sharded in place under "fsdp".

        Gradients are summed over the ranks, and not divided.
        """
        if self.parallel == "ddp":
            wrapped = DistributedDataParallel(model)
            # torch takes annotations that are strings, as they are here, for wrong ones.
            wrapped.register_comm_hook(None, lambda _, bucket: _summed(bucket.buffer()))
            return wrapped
        if self.parallel == "fsdp":
            pairs: Any = _InPairs()
            mesh = dist.init_device_mesh(device.type, (self.size,))
            for module in (*blocks, model):
                sharded = fully_shard(module, mesh=mesh)
                sharded.set_gradient_divide_factor(1.0)
                sharded.set_force_sum_reduction_for_comms(True)
                sharded.set_custom_reduce_scatter(pairs)
        return model

    def check_shards(self, params: Sequence[Tensor], storage: Mapping[str, Any]) -> None:
        """Raise, on every rank, where a shard on any of them cannot have the state of ``storage``.

        Raises:
            CommandError: shards cut groups of elements that share a scale.
        """
        refused = 0  # the position of a parameter, from 1
        for position, param in enumerate(params, 1):
            try:
                new_state(formats.of_param(param, **storage), param, {}, formats.MOMENTS)
            except ValueError:
                refused = position
        if refused := self.largest(refused):
            raise CommandError(
                f"--state-dtype {storage['state_dtype']} keeps a scale for {GROUP} elements side "
                f"by side, and shards of a parameter of shape {tuple(params[refused - 1].shape)} "
                f"cut them apart; give a --width that is a multiple of {GROUP}, --parallel ddp, or "
                "--state-dtype bfloat16"
            )

    def cut(self, batch: Batch) -> list[Batch]:
        """This rank's slices of a batch: of each so many neighbours as there are ranks, one."""
        pieces = zip(*(part.chunk(self.slices) for part in batch), strict=True)
        return [Batch(*piece) for piece in pieces][self.rank :: self.size]

    def gathered(self, values: list[float]) -> list[float]:
        """A number of each slice of the batch, from those of this rank's slices."""
        if self.is_alone:
            return values
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        of_ranks = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(of_ranks, own)
        return torch.stack(of_ranks, 1).flatten().tolist()

    def largest(self, value: int) -> int:
        """Of a number of each rank."""
        if self.is_alone:
            return value
        number = torch.tensor(value, device=self._device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend() == "nccl" else "cpu"


def sum_in_pairs(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of neighbours, and so on: of a power of two of them it is the same as the sum of what
    any other power of two of ranks has summed before."""
    while len(tensors) > 1:
        tensors = [a + b for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
    return tensors[0]


class PartialSums:
    """Gradients of one backward pass after the other, summed as :func:`sum_in_pairs` does."""

    def __init__(self) -> None:
        self._sums: list[list[Tensor | None]] = []
        self._count = 0

    def add(self, gradients: list[Tensor | None]) -> None:
        """Take the next ones."""
        self._sums.append(gradients)
        self._count += 1
        count = self._count
        while count % 2 == 0:
            right, left = self._sums.pop(), self._sums.pop()
            pairs = zip(left, right, strict=True)
            self._sums.append([b if a is None else a if b is None else a + b for a, b in pairs])
            count //= 2

    def total(self) -> list[Tensor | None]:
        """The sum of a power of two of them."""
        (total,) = self._sums
        return total


def _summed(buffer: Tensor) -> torch.futures.Future[Tensor]:
    """A bucket of DistributedDataParallel, summed over the ranks."""
    of_ranks = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, buffer)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(sum_in_pairs(of_ranks))
    return done


class _InPairs:
    """FSDP2's reduce-scatter, summed by :func:`sum_in_pairs`."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        output_tensor.copy_(sum_in_pairs(parts.chunk(group.size())))


# --- checkpoints through torch.distributed.checkpoint, in a folder for each step ----------------


def save(parts: Parts, out: Path, step: int) -> str:
    """Write models and optimizers, by name, beside older ones; returns the folder's name.

    Raises:
        CommandError: it cannot be written.
    """
    name = f"{SHARDS}{step}"
    try:
        dcp.save(_state(parts), checkpoint_id=out / name)
    except FAILURES as error:
        raise CommandError(f"cannot write {out / name}: {_reason(error)}") from error
    return name


def load(parts: Parts, folder: Path) -> None:
    """Read what :func:`save` wrote, on any number of ranks.

    Raises:
        CommandError: it cannot be read.
    """
    state = _state(parts)
    try:
        dcp.load(state, checkpoint_id=folder)
    except FAILURES as error:
        raise CommandError(
            f"cannot read {folder}: {_reason(error)}; start over with --overwrite, or choose "
            "another --out"
        ) from error
    for name, (model, optimizer) in parts.items():
        set_model_state_dict(model, state[name]["model"])
        set_optimizer_state_dict(model, optimizer, state[name]["optimizer"])


def remove_all(out: Path, but: str | None) -> None:
    """Delete every folder that :func:`save` wrote but one."""
    for folder in out.glob(f"{SHARDS}*"):
        if folder.name != but:
            shutil.rmtree(folder, ignore_errors=True)


def _state(parts: Parts) -> dict[str, Any]:
    return {
        name: {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        for name, (model, optimizer) in parts.items()
    }


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
