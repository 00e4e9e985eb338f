"""Storages moved under parameters and state in every way and order, under AddressSanitizer: no
kernel reads or writes what was freed, and every bit is the reference's."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulation.programs import run, why_not
from helpers import assert_same, give_gradients, resizable_storage, twins
from ranger_cuda import Ranger
from ranger_cuda.backends import support
from targets import ROOT, build_emulation, load, open_target

SANITIZE = ["-fsanitize=address", "-g1"]
EXAMPLES = 60


# --- in the process under the sanitizer ---------------------------------------------------------


def tensor_of(optimizer, params, index, name):
    """A parameter, or a tensor of its state; None if it has none."""
    param = params[index % len(params)]
    return param if name == "param" else optimizer.state.get(param, {}).get(name)


def moved(do):
    """What is done to one tensor, as what is done to an optimizer."""

    @torch.no_grad()
    def change(optimizer, params, index, name):
        tensor = tensor_of(optimizer, params, index, name)
        if tensor is not None:
            do(tensor)

    return change


def resize(tensor):
    storage = resizable_storage(tensor)
    storage.resize_(storage.nbytes() + 64)


def take_and_give_back(tensor):
    storage, kept = resizable_storage(tensor), tensor.clone()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    tensor.copy_(kept)


def assign(tensor):
    tensor.data = tensor.data.clone()


def load_own_state(optimizer, params, index, name):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def replace_state(optimizer, params, index, name):
    tensor = tensor_of(optimizer, params, index, name)
    if name != "param" and tensor is not None:
        optimizer.state[params[index % len(params)]][name] = tensor.clone()


MOVES = {
    "share": moved(lambda tensor: tensor.share_memory_()),
    "resize": moved(resize),
    "take_and_give_back": moved(take_and_give_back),
    "set": moved(lambda tensor: tensor.set_(tensor.clone())),
    "data": moved(assign),
}
CHANGES = {**MOVES, "load": load_own_state, "replace": replace_state}
NAMES = ("param", "exp_avg", "exp_avg_sq", "slow_param", "step")

indices = st.integers(0, 99)
names = st.sampled_from(NAMES)


def some(changes):
    one = st.tuples(st.sampled_from(sorted(changes)), indices, names)
    return st.lists(one, min_size=1, max_size=3)


# Between two steps: some changes, or the slow weights with some moves within.
actions = st.one_of(
    st.tuples(st.just("between"), some(CHANGES)), st.tuples(st.just("within"), some(MOVES))
)
shapes = st.sampled_from([(), (1,), (7,), (5, 3), (70,)])
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.complex64])
models = st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=50)


def apply(kind, changes, optimizer, params):
    def do():
        for change, index, name in changes:
            CHANGES[change](optimizer, params, index, name)

    if kind == "between":
        do()
        return
    with optimizer.slow_weights():
        do()


def try_all(target):
    """What an example is, is printed before it may be the process's last."""

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(models, st.lists(actions, min_size=1, max_size=6), indices)
    def check(model, done, seed):
        print(model, done, flush=True)
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, dtype=dtype, generator=generator) for shape, dtype in model]
        a, b = twins(made, target.move)
        native = Ranger(a, k=2, backend=target.backend)
        reference = Ranger(b, k=2, backend="reference")
        for action in [None, *done]:
            if action is not None:
                apply(*action, native, a)
                apply(*action, reference, b)
            gradients = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in a]
            give_gradients(gradients, a, b, move=target.move)
            native.step()
            reference.step()
            assert_same(native, reference, a, b, action)

    check()


def main(binary, place):
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        target = open_target(place, patch)
        module = load(Path(binary))
        patch.setattr(support, "extension", lambda: module)
        try_all(target)


# --- and in the one that starts it --------------------------------------------------------------


def sanitizer():
    """The libraries, to be loaded before Python is; skips the test where there are none. C++'s own,
    too, as the sanitizer looks there at once for what throws; Triton throws when it is imported."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    found = [run(["g++", f"-print-file-name={name}"]) for name in ("libasan.so", "libstdc++.so")]
    return " ".join(done.stdout.strip() for done in found)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The extension, with CUDA emulated, compiled for the sanitizer."""
    folder = tmp_path_factory.mktemp("sanitized")
    if reason := why_not(folder, SANITIZE):
        pytest.skip(reason)
    flags = f"-DCMAKE_CXX_FLAGS={' '.join(SANITIZE)}"
    return build_emulation(folder / "build", "-DCMAKE_BUILD_TYPE=Debug", flags)


@pytest.mark.parametrize("place", ["cpu-2-threads", "emulated"])
def test_no_step_touches_memory_that_was_moved_away(sanitized, place):
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "RANGER_EMULATED_EXTENSION": str(sanitized),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(sanitized), place],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    examples = done.stdout.strip().splitlines() or ["none"]
    assert done.returncode == 0, f"{examples[-1][-2000:]}\n{done.stderr[-8000:]}"
    assert len(examples) >= EXAMPLES


if __name__ == "__main__":
    main(*sys.argv[1:])
