"""Launches of models that fit no machine here: every chunk once, whatever the model's size."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from random import Random
from typing import NamedTuple

import pytest

from emulation.programs import CSRC, EMULATION, compile_object, link

CHUNK = 8192
# Words of a schedule's arguments by tier: 4 KiB, and almost 32 from CUDA 12.1 on. A row takes one,
# a group eighteen.
WORDS = {1: 500, 4: 4083}
GROUP = 18


class Tensor(NamedTuple):
    """All that the geometry asks of one."""

    numel: int
    group: int = 0
    device: int = 0
    is_float64: int = 0
    strided: int = 0


def llama(layers: int, hidden: int, heads: int, intermediate: int) -> list[int]:
    """Llama 3: 8 heads of keys and values, 128,256 tokens."""
    keys = hidden * hidden // heads * 8
    attention = [hidden * hidden, keys, keys, hidden * hidden]
    layer = [*attention, *[hidden * intermediate] * 3, hidden, hidden]
    return [128_256 * hidden, *layer * layers, hidden, 128_256 * hidden]


def qwen3_30b_a3b() -> list[int]:
    """A mixture of 128 experts in each of 48 layers."""
    hidden, expert, tokens = 2048, 768, 151_936
    attention = [hidden * 4096, hidden * 512, hidden * 512, 4096 * hidden, 128, 128]
    experts = [hidden * 128, *[hidden * expert] * 3 * 128]
    layer = [*attention, *experts, hidden, hidden]
    return [tokens * hidden, *layer * 48, hidden, tokens * hidden]


MODELS = {
    "Llama-3-8B": (llama(32, 4096, 32, 14_336), 8_030_261_248),
    "Llama-3-70B": (llama(80, 8192, 64, 28_672), 70_553_706_496),
    "Qwen3-30B-A3B": (qwen3_30b_a3b(), 30_532_122_624),
    "over-2^31": ([7, 2**31, 0, 2**33 + 1, 5], 10_737_418_253),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Checks a model's launches, and counts them."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("geometry")
    made = [
        compile_object(source, folder / f"{source.stem}.o", ["-O2"])
        for source in (EMULATION / "check_geometry.cpp", CSRC / "cuda/geometry.cpp")
    ]
    program = link(made, folder / "check_geometry", [])

    def count(tensors: list[Tensor], tier: int, device: int = 0) -> dict[str, int]:
        lines = [f"{device} {tier}", *(" ".join(map(str, tensor)) for tensor in tensors)]
        done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return count


@pytest.mark.parametrize("tier", WORDS)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_s_main_launch_is_one_and_takes_each_chunk_once(launches, model, tier):
    numels, parameters = MODELS[model]
    assert sum(numels) == parameters
    counts = launches([Tensor(numel) for numel in numels], tier)
    assert counts == {
        "rows": len(numels),
        "chunks": sum(math.ceil(numel / CHUNK) for numel in numels),
        "schedules": math.ceil(len(numels) / (WORDS[tier] - GROUP)),
        "launches": 1,
    }


def test_as_many_groups_as_parameters_take_more_schedules(launches):
    numels, _ = MODELS["Qwen3-30B-A3B"]
    assert len(numels) > 10_000
    counts = launches([Tensor(numel, group) for group, numel in enumerate(numels)], 4)
    assert counts["schedules"] == math.ceil(len(numels) / (WORDS[4] // (GROUP + 1)))
    assert counts["launches"] == 1


@pytest.mark.parametrize("tier", WORDS)
def test_devices_and_kinds_have_launches_of_their_own(launches, tier):
    random = Random(0)
    tensors = [
        Tensor(
            numel=random.choice((0, 1, 8191, 8192, 8193, random.randrange(10**6))),
            group=random.randrange(100),
            device=random.randrange(-1, 3),
            is_float64=random.randrange(2),
            strided=random.randrange(2),
        )
        for _ in range(30_000)
    ]
    for device in range(3):
        own = [tensor for tensor in tensors if tensor.device == device]
        kinds = {(tensor.is_float64, tensor.strided) for tensor in own}
        counts = launches(tensors, tier, device)
        assert counts["rows"] == len(own)
        assert counts["chunks"] == sum(math.ceil(tensor.numel / CHUNK) for tensor in own)
        assert len(kinds) == 4 == counts["launches"]


def test_an_empty_plan_has_no_launches(launches):
    for tensors in ([], [Tensor(0)], [Tensor(5, device=-1)]):
        counts = launches(tensors, 1)
        assert (counts["chunks"], counts["launches"]) == (0, 0)
