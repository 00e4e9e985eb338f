"""Ranger inside trainers: each example stops in the middle of a cycle, resumes from the trainer's
own checkpoint, and ends with the bits of a run that did not stop."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.optimizer import register_optimizer_step_post_hook

from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.integrations import unwrap

EXAMPLES = Path(__file__).parent.parent / "examples"
STOP, STEPS = 10, 20  # k = 6
TORCHRUN = "fsdp2_torchrun"
RUNS = {
    "plain_loop": ("torch", {}),
    "accelerate_loop": ("accelerate", {}),
    "hf_trainer": ("transformers", {}),
    "hf_trainer, the class": ("transformers", {"by_class": True}),
    "lightning_fit": ("lightning", {}),
    "timm_factory": ("timm", {}),
    "torchtitan_container": ("torchtitan", {}),
    "peft_trl_sft": ("trl", {}),
    "skorch_net": ("skorch", {}),
    "ignite_engine": ("ignite", {}),
    "fastai_learner": ("fastai", {}),
    "deepspeed_zero": ("deepspeed", {}),
}


def example(name):
    package, options = RUNS[name]
    pytest.importorskip(package)
    name = name.partition(",")[0]
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return functools.partial(module.train, **options)


@pytest.fixture
def taken():
    """The steps that are taken; with lr = 0 torch.distributed.checkpoint makes state to load into.
    What DeepSpeed sets up is taken down."""
    steps = []

    def note(optimizer, *_):
        if isinstance(optimizer, Ranger) and optimizer.param_groups[0]["lr"] > 0:
            steps.append(optimizer)

    hook = register_optimizer_step_post_hook(note)
    with mock.patch.dict(os.environ):
        yield steps
    hook.remove()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_resumes_with_the_bits_of_one_that_was_not(name, tmp_path, taken):
    train = example(name)
    whole = train(tmp_path / "whole", STEPS)
    first = train(tmp_path / "resumed", STOP)
    early = {key: value.clone() for key, value in first.state_dict().items()}
    assert len(taken) == STEPS + STOP
    resumed = train(tmp_path / "resumed", STEPS, resume=True)
    assert len(taken) == STEPS + STEPS, "from the start it would have the same bits as well"
    expected = whole.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert any(not torch.equal(early[key], value) for key, value in expected.items())


def test_examples_are_all_tested():
    here = {name.partition(",")[0] for name in RUNS} | {TORCHRUN}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == here


def shards(folder):
    """What torch.distributed.checkpoint saved, by name, whole."""
    target = folder / "whole.pt"
    dcp_to_torch_save(folder, target)
    return flatten(torch.load(target, weights_only=False))


def flatten(value, path=""):
    if isinstance(value, dict):
        return {
            k: v for key, each in value.items() for k, v in flatten(each, f"{path}/{key}").items()
        }
    if isinstance(value, list):
        return flatten(dict(enumerate(value)), path)
    return {path: value}


def test_a_run_under_torchrun_resumes_with_the_bits_of_one_that_was_not(tmp_path):
    def torchrun(folder, steps, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            "--nproc-per-node",
            "2",
            EXAMPLES / f"{TORCHRUN}.py",
            folder,
            str(steps),
            *flags,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment["PYTHONPATH"] = str(EXAMPLES.parent)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return shards(folder)

    whole = torchrun(tmp_path / "whole", STEPS)
    early = torchrun(tmp_path / "resumed", STOP)
    resumed = torchrun(tmp_path / "resumed", STEPS, "--resume")
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        same = torch.equal(resumed[key], value) if torch.is_tensor(value) else resumed[key] == value
        assert same, key
    weights = [key for key in whole if key.startswith("/model/")]
    assert weights
    assert any(not torch.equal(early[key], whole[key]) for key in weights)


def test_hugging_face_s_trainer_evaluates_on_the_slow_weights(tmp_path, monkeypatch):
    train = example("hf_trainer")
    called = []
    for name in ("eval", "train"):
        original = getattr(Ranger, name)
        monkeypatch.setattr(
            Ranger,
            name,
            lambda self, *args, name=name, original=original: (
                called.append(name),
                original(self, *args),
            ),
        )
    train(tmp_path, STOP)
    assert called.count("eval") >= 2, "every five steps"
    assert "train" in called


# --- what is inside of a wrapper -----------------------------------------------------------------


def optimizers():
    params = [torch.nn.Parameter(torch.ones(2))]
    return Ranger(params), RAdam(params), Lookahead(torch.optim.SGD(params, lr=0.1))


class Wrapper:
    def __init__(self, name, inside):
        setattr(self, name, inside)


def test_an_optimizer_is_found_inside_of_wrappers():
    for inside in optimizers():
        assert unwrap(inside) is inside
        assert unwrap(Wrapper("optim", Wrapper("optimizer", inside))) is inside
        assert unwrap(Wrapper("optimizers", [inside])) is inside


def test_what_has_none_inside_or_several_is_refused():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="Wrapper, inside of it SGD"):
        unwrap(Wrapper("optimizer", sgd))
    with pytest.raises(ValueError, match="has 3 optimizers"):
        unwrap(Wrapper("optimizers", list(optimizers())))


def test_accelerate_s_wrapper_has_one_inside():
    accelerate = pytest.importorskip("accelerate")
    ranger, *_ = optimizers()
    assert unwrap(accelerate.Accelerator().prepare(ranger)) is ranger


# --- trainers' own names -------------------------------------------------------------------------


def test_timm_s_registry_has_both_and_keeps_another_s_name(monkeypatch):
    pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2

    from ranger_cuda.integrations import timm

    assert timm.register_timm() == timm.register_timm() == ("rangercuda", "radamcuda")
    model = torch.nn.Linear(2, 2)
    made = create_optimizer_v2(model, opt="radamcuda", lr=0.1, weight_decay=0.05)
    assert type(made) is RAdam
    assert sorted(group["weight_decay"] for group in made.param_groups) == [0.0, 0.05]
    assert all(group["decoupled_weight_decay"] for group in made.param_groups)
    monkeypatch.setattr(timm, "NAMES", {"sgd": Ranger})
    with pytest.raises(ValueError, match="another optimizer called 'sgd'"):
        timm.register_timm()


def test_lightning_scores_and_saves_the_same_slow_weights(tmp_path):
    train = example("lightning_fit")
    train(tmp_path, STEPS)
    module = sys.modules["example_lightning_fit"]
    (best,) = (path for path in tmp_path.glob("*.ckpt") if path.name != "last.ckpt")
    saved = torch.load(best, weights_only=False)
    score = float(saved["callbacks"][next(iter(saved["callbacks"]))]["best_model_score"])
    model = module.Regression()
    model.load_state_dict(saved["state_dict"])
    states = saved["optimizer_states"][0]["state"]
    for i, param in enumerate(model.parameters()):
        assert torch.equal(param, states[i]["slow_param"])
        assert "fast_param" in states[i]
    torch.manual_seed(0)
    inputs = torch.randn(80, 8)
    with torch.no_grad():
        losses = [
            torch.nn.functional.mse_loss(model.net(x), x.sum(1, keepdim=True))
            for x in inputs.split(8)
        ]
    assert score == pytest.approx(float(sum(losses) / len(losses)), rel=1e-6)


def test_lightning_s_callback_wants_an_optimizer_that_opted_in(tmp_path, monkeypatch):
    train = example("lightning_fit")
    module = sys.modules["example_lightning_fit"]
    monkeypatch.setattr(
        module.Regression, "configure_optimizers", lambda self: Ranger(self.parameters())
    )
    with pytest.raises(ValueError, match="eval_with_slow_weights=True"):
        train(tmp_path, STOP)


@pytest.mark.parametrize(
    ("module", "call", "package"),
    [
        ("timm", lambda m: m.register_timm(), "timm"),
        ("lightning", lambda m: m.SlowWeightsCallback(), "lightning"),
        ("torchtitan", lambda m: m.RangerOptimizersContainer.Config(), "torchtitan"),
    ],
)
def test_without_the_trainer_imports_work_and_calls_say_what_to_install(
    module, call, package, monkeypatch
):
    for name in [n for n in sys.modules if n.partition(".")[0] in (package, "pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    name = f"ranger_cuda.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    found = importlib.import_module(name)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        call(found)
    monkeypatch.delitem(sys.modules, name)
