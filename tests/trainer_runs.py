"""Examples in processes of their own, one of which is killed, and what is left of each.

``python -m tests.trainer_runs`` runs all whose packages are installed, and writes what ran to
docs/trainers.json."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
EXAMPLES, RESULT = ROOT / "examples", ROOT / "docs/trainers.json"
STEPS, KILLED_IN, K = 20, 15, 6


class Row(NamedTuple):
    """What an example needs: a module, the packages whose versions count, arguments of its train(),
    and on how many processes it runs."""

    module: str
    packages: tuple[str, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})
    processes: int = 1


ROWS = {
    "plain_loop": Row("torch"),
    "hf_trainer": Row("transformers", ("transformers",)),
    "hf_trainer, the class": Row("transformers", ("transformers",), {"by_class": True}),
    "accelerate_loop": Row("accelerate", ("accelerate",)),
    "lightning_fit": Row("lightning", ("lightning",)),
    "timm_factory": Row("timm", ("timm",)),
    "fsdp2_torchrun": Row("torch", processes=2),
    "torchtitan_container": Row("torchtitan", ("torchtitan",)),
    "deepspeed_zero": Row("deepspeed", ("deepspeed",)),
    "deepspeed_zero, stage 2": Row("deepspeed", ("deepspeed",), {"stage": 2}, 2),
    "deepspeed_zero, stage 3": Row("deepspeed", ("deepspeed",), {"stage": 3}, 2),
    "peft_trl_sft": Row("trl", ("peft", "trl")),
    "skorch_net": Row("skorch", ("skorch",)),
    "ignite_engine": Row("ignite", ("pytorch-ignite",)),
    "fastai_learner": Row("fastai", ("fastai",)),
}


def file_of(name: str) -> Path:
    """The example of a row."""
    return EXAMPLES / f"{name.partition(',')[0]}.py"


def load_example(name: str) -> Any:
    """The module of a row, as ``example_`` and its name."""
    file = file_of(name)
    spec = importlib.util.spec_from_file_location(f"example_{file.stem}", file)
    assert spec is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def run(name: str, out: Path, steps: int, *flags: str) -> dict[str, Any]:
    """Train a row's example until step ``steps`` in a process of its own, or in those of torchrun.

    Returns what is left: the weights, how many steps it took and whether they moved; nothing of
    one that is killed.
    """
    command = [sys.executable]
    if (processes := ROWS[name].processes) > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    command += [__file__, name, str(out), str(steps), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "--kill" in flags:
        # torchrun says it of its process, and ends by itself.
        was_killed = done.returncode == -signal.SIGKILL or "exitcode  : -9 " in done.stderr
        assert was_killed, f"{done.returncode}, and not killed: {done.stderr[-3000:]}"
        return {}
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "left.pt", weights_only=True)


def check(name: str, folder: Path) -> dict[str, Any]:
    """Kill a row's example in a step, let it go on in a new process, and compare every bit of the
    weights with those of a run that was not killed; what ran."""
    start = time.monotonic()
    whole = run(name, folder / "whole", STEPS)
    run(name, folder / "killed", STEPS, "--kill")
    resumed = run(name, folder / "killed", STEPS, "--resume")
    begin = STEPS - resumed["steps"]
    assert whole["steps"] == STEPS
    assert 0 < begin < KILLED_IN, "from the start it would have the same bits as well"
    assert begin % K, "in the middle of a cycle"
    assert whole["weights"]
    assert whole["weights"].keys() == resumed["weights"].keys()
    for key, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][key]), key
    assert whole["have_moved"]
    return {
        "processes": ROWS[name].processes,
        "steps": STEPS,
        "killed_in_step": KILLED_IN,
        "resumed_after_step": begin,
        "tensors_with_the_same_bits": len(whole["weights"]),
        "seconds": round(time.monotonic() - start, 1),
    }


# --- in the process that trains ------------------------------------------------------------------


def train(name: str, out: Path, steps: int, resume: bool, kill: bool) -> None:
    """Train, and leave what :func:`run` returns, or die in step ``KILLED_IN``."""
    from torch.distributed.tensor import DTensor
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from ranger_cuda import Ranger
    from ranger_cuda.state.tensors import local

    taken = 0
    first: list[torch.Tensor] = []
    params: list[torch.Tensor] = []

    def after_step(optimizer: Any, *_: Any) -> None:
        nonlocal taken
        # With lr = 0 torch.distributed.checkpoint makes state to load into.
        if not isinstance(optimizer, Ranger) or optimizer.param_groups[0]["lr"] == 0:
            return
        taken += 1
        params[:] = [local(p.detach()) for group in optimizer.param_groups for p in group["params"]]
        first.extend(p.clone() for p in params if taken == 1)
        if kill and taken == KILLED_IN and os.environ.get("RANK", "0") == last:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(after_step)
    last = str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    is_first = os.environ.get("RANK", "0") == "0"
    module = load_example(name)
    if name == "fsdp2_torchrun":  # which leaves it to the script around it
        torch.distributed.init_process_group("gloo")
    model = module.train(out, steps, resume, **ROWS[name].options)
    gathered: Any = contextlib.nullcontext()
    if ROWS[name].options.get("stage") == 3:
        gathered = module.deepspeed.zero.GatheredParameters([*model.parameters()])
    with gathered:
        weights = {
            key: value.full_tensor() if isinstance(value, DTensor) else value.clone()
            for key, value in model.state_dict().items()
        }
    moved = any(not torch.equal(p, q) for p, q in zip(params, first, strict=True))
    if is_first:
        torch.save({"weights": weights, "steps": taken, "have_moved": moved}, out / "left.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def digest(name: str) -> str:
    """Of a row's example: one that has changed has to run again."""
    return hashlib.sha256(file_of(name).read_bytes()).hexdigest()[:16]


def write_down(names: Iterable[str] = ROWS) -> None:
    """Run rows whose package is installed, and write what ran into the result, each when it has
    passed."""
    from benchmarks.machine import processor

    for name in names:
        module, packages, *_ = ROWS[name]
        if importlib.util.find_spec(module) is None:
            print(f"{name}: {module} is not installed here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            ran = check(name, Path(folder))
        row = {
            **{
                each: version(each).partition("+")[0]
                for each in dict.fromkeys((*packages, "torch"))
            },
            **ran,
            "python": platform.python_version(),
            "processor": processor(),
            "date": time.strftime("%Y-%m-%d"),
            "digest": digest(name),
        }
        print(f"{name}: {row}", flush=True)
        result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        result = {each: row if each == name else result.get(each) for each in ROWS}
        result = {each: found for each, found in result.items() if found}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write_down()
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("name")
        parser.add_argument("out", type=Path)
        parser.add_argument("steps", type=int)
        parser.add_argument("--resume", action="store_true")
        parser.add_argument("--kill", action="store_true")
        train(**vars(parser.parse_args()))
