"""Ranger inside trainers: each example is killed in the middle of a cycle, resumes in a new process
from the trainer's own checkpoint, and ends with the bits of a run that was not."""

from __future__ import annotations

import functools
import importlib
import json
import sys

import pytest
import torch

from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.integrations import unwrap
from trainer_runs import (
    EXAMPLES,
    KILLED_IN,
    RESULT,
    ROWS,
    STEPS,
    check,
    digest,
    file_of,
    load_example,
)


def example(name):
    """The train() of a row, if its package is installed."""
    pytest.importorskip(ROWS[name].module)
    return functools.partial(load_example(name).train, **ROWS[name].options)


@pytest.mark.parametrize("name", ROWS)
def test_a_killed_run_resumes_with_the_bits_of_one_that_was_not(name, tmp_path):
    pytest.importorskip(ROWS[name].module)
    check(name, tmp_path)


def test_examples_are_all_tested():
    assert {*EXAMPLES.glob("*.py")} == {file_of(name) for name in ROWS}


def test_the_documentation_says_of_each_row_what_ran():
    """Every row of the table, in its order, is one that ran, with these versions, and its example
    is the one that did. (`make trainers` runs them.)"""
    ran = json.loads(RESULT.read_text())
    assert [*ran] == [*ROWS]
    text = (RESULT.parent / "trainers.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    for name, line in zip(ROWS, lines, strict=True):
        row = ran[name]
        assert f"(../examples/{file_of(name).name})" in line or "| the same |" in line
        said = line.rsplit("|", 2)[1]
        for package in ROWS[name].packages or ("torch",):
            assert f"{package} {row[package]}" in said
        assert ("two processes" in said) == (row["processes"] == 2)
        assert row["digest"] == digest(name), f"{name} has changed since: make trainers"
        assert (row["steps"], row["killed_in_step"]) == (STEPS, KILLED_IN)
        assert f"torch {row['torch']}" in text
        assert row["processor"] in text
        assert row["date"] in text


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
    train(tmp_path, 10)
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
        train(tmp_path, 10)


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
