"""The private binding, misused: an error before anything is touched, never a crash."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from ranger_cuda.backends import support
from ranger_cuda.state.hyperparameters import Hyperparameters, packed
from ranger_cuda.state.tensors import DTensor, plain, plain_grad, shard_of
from ranger_cuda.step.algorithms import RANGER

HYPER = packed(
    [
        Hyperparameters(
            0.1, 0.9, 0.99, 1e-8, 0.0, 4.0, 0.5, 0.0, -1.0, 1.0, 6, float("inf"), False, False
        )
    ]
)
EXCHANGE_API = torch.Tensor.__dlpack_c_exchange_api__


class Made:
    """A roster of two parameters and the CPU's launcher, with nothing collected yet."""

    def __init__(self, rule="RADAM", plain_grad=plain_grad):
        self.extension = support.extension()
        if isinstance(self.extension, support.Obstacle):
            pytest.skip(self.extension.cause)
        self.params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
        for param in self.params:
            param.grad = torch.ones_like(param)
        self.state = {param: self.state_of(param) for param in self.params}
        self.groups = [{"params": self.params}]
        self.roster = self.extension.Roster(
            EXCHANGE_API, RANGER.streams, "step", DTensor, plain, plain_grad, shard_of
        )
        self.roster.serve(torch.ones(1), "", 0, "float32")
        self.launcher = self.extension.CpuLauncher(getattr(self.extension.Rule, rule), 0)

    @staticmethod
    def state_of(param):
        names = ("exp_avg", "exp_avg_sq", "slow_param")
        return {"step": torch.tensor(0.0), **{name: torch.zeros_like(param) for name in names}}

    def collect(self, moved=None):
        return self.roster.collect(self.groups, self.state, moved)

    def launch(self, hypers=HYPER, threads=1):
        self.launcher.launch(self.roster, hypers, 1.0, 1.0, threads)

    def step(self, **kwargs):
        arguments = {"moved": None, "hypers": HYPER, "unscale": 1.0, "norm": 1.0, "num_threads": 1}
        return self.launcher.step(self.roster, self.groups, self.state, **{**arguments, **kwargs})


def ready():
    made = Made()
    assert made.collect() == []
    made.launcher.prepare(made.roster)
    return made


def freed():
    made = ready()
    made.roster.release()
    made.params.clear()
    made.state.clear()
    made.launch()


def without_gradients():
    made = Made()
    made.collect([True, True])
    made.launcher.prepare(made.roster)
    made.launch()


def swap_of_a_step():
    made = ready()
    made.launcher.swap(made.roster, 1)


def on_another_device():
    made = ready()
    launcher = made.extension.CudaLauncher(made.extension.Rule.RADAM, 0, 0)
    launcher.prepare(made.roster)


def without_moments():
    made = Made()
    made.roster = made.extension.Roster(
        EXCHANGE_API, (None, None, "slow_param"), "step", DTensor, plain, plain_grad, shard_of
    )
    made.roster.serve(torch.ones(1), "", 0, "float32")
    made.collect()
    made.launcher.prepare(made.roster)
    made.launch()


def collected_again_after_prepare():
    made = ready()
    made.params[0].data = torch.ones(3)
    made.collect()
    made.launch()


MISUSES = {
    "launch before collect": lambda: Made().launch(),
    "launch before prepare": lambda: (made := Made()).collect() or made.launch(),
    "launch of other rows than prepared": collected_again_after_prepare,
    "launch after the parameters were freed": freed,
    "launch without gradients": without_gradients,
    "launch without moments": without_moments,
    "too few hyperparameters": lambda: ready().launch(hypers=[]),
    "too many hyperparameters": lambda: ready().launch(hypers=HYPER + HYPER),
    "a short group": lambda: ready().launch(hypers=HYPER[:40]),
    "a group of strings": lambda: ready().launch(hypers=[("a",) * 11]),
    "a group that is none": lambda: ready().launch(hypers=[None]),
    "2**31 - 1 threads": lambda: ready().launch(threads=2**31 - 1),
    "no threads": lambda: ready().launch(threads=0),
    "2**40 threads": lambda: ready().launch(threads=2**40),
    "moved of another length": lambda: Made().collect([True]),
    "moved of another type": lambda: Made().collect(3),
    "groups of another type": lambda: Made().roster.collect([3], {}, None),
    "groups without params": lambda: Made().roster.collect([{}], {}, None),
    "params of another type": lambda: Made().roster.collect([{"params": 3}], {}, None),
    "params that are no tensors": lambda: Made().roster.collect([{"params": [1, "x"]}], {}, None),
    "state of another type": lambda: Made().roster.collect([], [], None),
    "pairs that do not pair": lambda: Made().roster.pair([torch.ones(1)], []),
    "a swap of a step's rows": swap_of_a_step,
    "a launcher of another device": on_another_device,
    "a launcher below 0": lambda: Made().extension.CpuLauncher(Made().extension.Rule.RADAM, -1),
    "serving what is no tensor": lambda: Made().roster.serve("x", "", 0, "float32"),
    "serving integers": lambda: Made().roster.serve(
        torch.ones(1, dtype=torch.int32), "", 0, "float32"
    ),
    "serving in no format": lambda: Made().roster.serve(torch.ones(1), "", 0, "float8"),
    "serving in another format": lambda: Made().roster.serve(torch.ones(1), "", 0, "float64"),
    "serving with no launcher": lambda: Made().roster.serve(torch.ones(1), "", -1, "float32"),
    "two names of states": lambda: Made().extension.Roster(
        EXCHANGE_API, ("a", "b"), "step", DTensor, plain, plain_grad, shard_of
    ),
    "names that are no strings": lambda: Made().extension.Roster(
        EXCHANGE_API, (1, 2, 3, 4), "step", DTensor, plain, plain_grad, shard_of
    ),
    "a place below 0": lambda: Made().extension.Roster(
        EXCHANGE_API, RANGER.streams, "step", DTensor, plain, plain_grad, shard_of, -1
    ),
    "another capsule": lambda: Made().extension.Roster(
        torch.ones(1).__dlpack__(), RANGER.streams, "step", DTensor, plain, plain_grad, shard_of
    ),
    "a step with too few hyperparameters": lambda: Made().step(hypers=[]),
    "a step with too many threads": lambda: Made().step(num_threads=2**31 - 1),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_raises_and_does_not_crash(misuse):
    with pytest.raises((RuntimeError, ValueError, TypeError, KeyError, AttributeError)):
        MISUSES[misuse]()


ODD_VALUES = [None, "x", 0, 1.5, [], {}, object(), torch.ones(3, dtype=torch.int64)]


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq", "slow_param"])
@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: type(value).__name__)
def test_state_that_is_no_tensor_of_its_kind_makes_no_row(name, value):
    made = Made()
    made.state[made.params[0]][name] = value
    assert made.collect() == [(0, False)]
    made.state[made.params[0]] = value
    assert made.collect() == [(0, False)]


def test_a_roster_or_a_launcher_that_is_in_use_refuses(monkeypatch):
    """From the code of Python's that a roster calls, and from another thread."""
    refusals = []

    def meddling(param):
        for call in (made.collect, made.roster.release, made.step, lambda: made.launch()):
            with pytest.raises(RuntimeError, match=r"in use|comes after"):
                call()
            refusals.append(call)
        thread = threading.Thread(target=meddle_from_a_thread)
        thread.start()
        thread.join()
        return plain_grad(param)

    def meddle_from_a_thread():
        with pytest.raises(RuntimeError, match="in use"):
            made.collect()
        refusals.append(threading.current_thread())

    made = Made(plain_grad=meddling)
    made.params[0].grad = torch.complex(torch.ones(3), torch.ones(3)).conj().imag  # resolved
    assert made.step() == []
    assert len(refusals) == 5
    assert [made.state[param]["step"].item() for param in made.params] == [1.0, 1.0]


@pytest.mark.slow
def test_the_interpreter_ends_well_with_a_roster_that_holds_a_step():
    program = (
        "import torch\n"
        "from test_binding import ready\n"
        "made = ready()\n"
        "made.roster.collect(made.groups, made.state, None, True)\n"
        "keep = made.roster\n"
        "del made\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent)
