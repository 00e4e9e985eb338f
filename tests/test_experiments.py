"""`python -m benchmarks.experiments`: it goes on where it stopped, and the committed page says what
the committed results say."""

from __future__ import annotations

import importlib.util
import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import EXPERIMENTS, tuning_seeds
from benchmarks.experiments.__main__ import main

for needed in ("rich", "matplotlib", "mlxtend", "scipy"):
    pytest.importorskip(needed)

from rich.console import Console  # noqa: E402
from torch.nn.utils import parameters_to_vector, vector_to_parameters  # noqa: E402

from benchmarks.experiments import (  # noqa: E402
    contestants,
    figures,
    gradient_histograms,
    lookahead_plane,
    outer_momentum,
    tasks,
    trials,
)
from benchmarks.experiments.runner import carry_out, module  # noqa: E402
from benchmarks.experiments.store import Store  # noqa: E402
from ranger_cuda.cli.training import reproducible  # noqa: E402

COMMITTED = Path(__file__).parents[1] / "docs" / "experiments"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What they would show of the harness, others show in less time.
LONG = {"comparison", "gradient_histograms", "learning_rates", "lookahead_sweep", "outer_momentum"}


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def quick(name: str, out: Path, *, processes: int = 1, fresh: bool = False) -> list[dict]:
    carry_out(name, out, processes, True, fresh, Console(quiet=True))
    return lines(out / f"{name}.jsonl")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.ptx if name in LONG else ()) for name in EXPERIMENTS],
)
def test_an_interrupted_experiment_goes_on_and_ends_with_the_same_bits(name, tmp_path, monkeypatch):
    whole = quick(name, tmp_path)
    path = tmp_path / f"{name}.jsonl"
    picture = path.with_suffix(".png")
    assert picture.stat().st_size > 10_000

    text = path.read_text()
    path.write_text(text[: -len(text.splitlines()[-1]) // 2])  # killed while it wrote a line
    picture.unlink()
    experiment = module(name)
    original = experiment.run
    ran = []
    monkeypatch.setattr(experiment, "run", lambda job: ran.append(job) or original(job))
    again = quick(name, tmp_path)
    assert ran == [whole[-1]["job"]]
    assert without_times(again) == without_times(whole)
    assert picture.exists()

    quick(name, tmp_path)
    assert len(ran) == 1, "all was finished"


def test_processes_change_no_result(tmp_path):
    alone = quick("lookahead_plane", tmp_path / "1")
    together = quick("lookahead_plane", tmp_path / "2", processes=2)
    assert sorted(map(str, without_times(alone))) == sorted(map(str, without_times(together)))


def test_results_from_elsewhere_are_drawn_but_not_mixed(tmp_path, capsys):
    out = tmp_path / "quick"
    whole = quick("lookahead_plane", out)
    path = out / "lookahead_plane.jsonl"
    whole[0]["environment"]["torch"] = "1.0"
    path.write_text("".join(json.dumps(line) + "\n" for line in whole))
    flags = ["lookahead_plane", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    assert main(flags) == 0  # nothing to run
    path.write_text("".join(json.dumps(line) + "\n" for line in whole[:-1]))
    before = path.read_text()
    capsys.readouterr()
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "torch was 1.0 and is" in error
    assert "--fresh" in error
    assert path.read_text() == before
    assert main([*flags, "--fresh"]) == 0
    assert len(lines(path)) == len(whole)


@pytest.mark.parametrize(
    "line", ["{", '{"a": 1}', "\x80", '{"job": 1, "result": 2}', '{"job": {}}', ""]
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, capsys, line, number):
    path = tmp_path / "quick" / "lookahead_plane.jsonl"
    store = Store(path)
    store.prepare()
    store.add({"seed": 1}, {"loss": 2})
    content = path.read_bytes().splitlines(keepends=True)
    content[number - 1] = line.encode("latin-1") + b"\n"
    path.write_bytes(b"".join(content))
    assert main(["lookahead_plane", "--quick", "--out", str(tmp_path)]) == 2
    assert f"line {number} of {path}" in capsys.readouterr().err
    assert path.read_bytes() == b"".join(content)


def test_a_killed_process_is_said_and_what_is_finished_is_kept(tmp_path, monkeypatch, capsys):
    def die(name, jobs, processes):
        yield jobs[0], {}
        raise BrokenProcessPool

    monkeypatch.setattr("benchmarks.experiments.runner._finished", die)
    assert main(["lookahead_plane", "--quick", "--out", str(tmp_path)]) == 2
    assert "goes on from there" in capsys.readouterr().err
    assert len(lines(tmp_path / "quick" / "lookahead_plane.jsonl")) == 2


def test_ctrl_c_ends_with_130(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.experiments.runner._run", interrupt)
    flags = ["lookahead_plane", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    assert main(flags) == 130
    assert "goes on from the finished jobs" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([]) == 2
    assert "pip install rich matplotlib mlxtend scipy" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["lookahead_plane", "--quick", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "try another --out" in capsys.readouterr().err


def test_a_wrong_name_or_number_of_processes_is_refused(capsys):
    for flags, word in ((["learning_rate"], "learning_rates"), (["--jobs", "0"], "--jobs 0")):
        with pytest.raises(SystemExit):
            main(flags)
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_says_what_the_committed_results_say(name):
    """All jobs are there, the page has their table, and the figure can be drawn."""
    experiment = module(name)
    store = Store(COMMITTED / f"{name}.jsonl")
    planned = experiment.jobs(False, store.results(experiment.jobs(False, [])))
    assert store.missing(planned) == []
    results = store.results(planned)
    page = (COMMITTED / "README.md").read_text()
    assert experiment.table(results) in page
    assert f"({name}.png)" in page
    assert (COMMITTED / f"{name}.png").exists()
    assert experiment.draw(results).axes


def test_a_table_with_a_diverged_run_says_so():
    assert figures.spread([1.0, float("nan"), 2.0]) == "diverged (1 of 3)"
    assert figures.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"


def test_a_run_that_diverges_stops_and_is_null(tmp_path):
    diverging = {"name": "SGD", "lr": 1e30}
    job = {"task": "gpt", "seed": 0, "steps": 6, "evaluate_every": 2, "contestants": [diverging]}
    with reproducible(threads=1):
        result = trials.run(job)
    assert np.isnan(result["curves"][0]["validation_loss"]).all()
    store = Store(tmp_path / "x.jsonl")
    store.prepare()
    store.add(job, result)
    assert Store(tmp_path / "x.jsonl").results([job]) == store.results([job])
    assert store.results([job])[0][1]["curves"][0]["accuracy"] == [None] * 3


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"cosine": True}, [0.5 * (1 + np.cos(np.pi * i / 8)) for i in range(8)]),
        ({"warmup": 2, "cosine": True}, [0.5, 1, 1, 0.933, 0.75, 0.5, 0.25, 0.067]),
    ],
)
def test_schedules(schedule, expected):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer, scheduler = contestants.build({"name": "Adam", "lr": 2.0, **schedule}, [param], 8)
    found = []
    for _ in range(8):
        found.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["convnet", *tasks.GPTS])
def test_a_task_is_a_function_of_its_seeds(name):
    task = tasks.load(name)
    for a, b in zip(task.model(3).parameters(), task.model(3).parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(task.batch(3, 7), task.batch(3, 7), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(task.batch(3, 7).inputs, task.batch(3, 8).inputs)
    assert not torch.equal(task.batch(3, 7).inputs, task.batch(4, 7).inputs)


def test_no_training_image_is_a_held_out_one_wherever_it_is_shifted():
    task = tasks.load("convnet")
    shift = tasks.SHIFT
    padded = torch.nn.functional.pad(task.held_out[0].inputs, [shift] * 4)
    crops = {
        padded[:, y : y + 28, x : x + 28][i].numpy().tobytes()
        for y in range(2 * shift + 1)
        for x in range(2 * shift + 1)
        for i in range(len(padded))
    }
    seen = [image for step in range(10) for image in task.batch(0, step).inputs]
    assert not any(image.numpy().tobytes() in crops for image in seen)
    assert len(task.held_out[0].inputs) == tasks.HELD_OUT_IMAGES


def test_norms_are_where_the_names_say():
    x = torch.randn(2, 5, 64) * 7 + 3
    for name, behind in (("post-norm gpt", True), ("deep gpt", False)):
        model = tasks.load(name).model(0)
        assert len(model.blocks) == 6
        y = model.blocks(x)
        assert torch.allclose(y.mean(-1), torch.zeros(2, 5), atol=1e-5) == behind
        assert torch.allclose(y.std(-1, unbiased=False), torch.ones(2, 5), atol=1e-3) == behind


def test_a_trial_follows_its_schedule():
    task = tasks.load("convnet")
    contestant = {"name": "Adam", "lr": 0.5, "warmup": 4, "cosine": True}
    trial = trials.Trial(task, contestant, seed=0, steps=8)
    rates = []
    trial.optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    for step in range(8):
        trial.step(task.batch(0, step))
    falling = [0.25 * (1 + np.cos(np.pi * i / 4)) for i in range(4)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, *falling])


def test_learning_rates_are_tuned_on_the_means_of_the_sweep():
    def job(rate, *losses):
        names = ("Ranger", "SGD")
        contestants = [{"name": n, "lr": rate * (i + 1)} for i, n in enumerate(names)]
        curves = [{"validation_loss": [0.0, loss]} for loss in losses]
        return {"contestants": contestants}, {"curves": curves}

    sweep = [job(1.0, 3.0, 2.0), job(1.0, 1.0, 2.0), job(2.0, 1.9, 9.0), job(2.0, 1.9, None)]
    jobs = [job for job, _ in sweep]
    assert [c["lr"] for c in contestants.tuned(jobs, sweep)] == [2.0, 2.0]
    assert contestants.tuned(jobs, sweep[1:]) is None


def test_all_that_a_sweep_varies_is_tuned_together():
    settings = [{"lr": lr, "outer_momentum": m} for lr in (1.0, 2.0) for m in (0.4, 0.9)]
    sweep = [
        ({"contestants": [setting]}, {"curves": [{"validation_loss": [loss]}]})
        for setting, loss in zip(settings, [4.0, 3.0, 1.0, 5.0], strict=True)
    ]
    assert contestants.tuned([job for job, _ in sweep], sweep) == [settings[2]]


def test_every_contestant_has_the_same_tuning_budget():
    for task in outer_momentum.RATES:
        sweep = [job for job in outer_momentum.jobs(False, []) if job["task"] == task]
        for tried in zip(*(job["contestants"] for job in sweep), strict=True):
            different = {json.dumps(contestant) for contestant in tried}
            assert len(different) == outer_momentum.SETTINGS
            assert len(tried) == outer_momentum.SETTINGS * outer_momentum.TUNING_SEEDS[task]


def test_p_values_are_of_pairs_and_corrected_for_their_number():
    a = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    t = 0.2 / np.sqrt(0.005 / 5)  # of differences with a variance of 0.005
    s = t / np.sqrt(4 + t**2)
    expected = 1 - (3 * s - s**3) / 2  # in closed form for 4 degrees of freedom
    found = outer_momentum._p_value(a, a + np.array([0.1, 0.2, 0.3, 0.2, 0.2]))
    assert found == pytest.approx(expected, rel=1e-9)
    assert outer_momentum._holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert outer_momentum._holm([0.6, 0.9]) == pytest.approx([1, 1])


@pytest.mark.parametrize("name", ["comparison", "lookahead_sweep", "outer_momentum"])
def test_no_seed_that_is_reported_has_a_say_in_a_learning_rate(name):
    experiment = module(name)
    for quickly in (False, True):
        sweep = experiment.jobs(quickly, [])
        assert {job["seed"] for job in sweep} <= set(tuning_seeds(quick=False))
        curve = {"validation_loss": [1.0]}
        results = [(job, {"curves": [curve] * len(job["contestants"])}) for job in sweep]
        final = [job for job in experiment.jobs(quickly, results) if job not in sweep]
        assert final
        assert not {job["seed"] for job in final} & set(tuning_seeds(quick=False))
        for job in sweep + final:
            cycles = {c.get("k", 6) for c in job["contestants"]}
            assert all(job["evaluate_every"] % k == 0 for k in cycles), "where cycles end"


def test_histograms_and_medians_are_of_the_gradients_that_a_step_reads():
    job = gradient_histograms.jobs(True, [])[0]
    with reproducible(threads=1):
        curve = gradient_histograms.run({**job, "steps": 1})["curves"][0]
        task = tasks.load(job["task"])
        model = task.model(job["seed"])
        task.loss(model, task.batch(job["seed"], 0)).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    logarithms = gradients[gradients != 0].abs().log10()
    assert curve["median"] == [logarithms.median().item()]
    low, high, bins = (getattr(gradient_histograms, n) for n in ("LOWEST", "HIGHEST", "BINS"))
    expected, _ = np.histogram(logarithms.numpy(), bins, (low, high))
    assert np.abs(np.array(curve["histograms"][0]) - expected).sum() <= 4  # on an edge of bins


def test_the_plane_is_that_of_a_cycle_of_sgd(monkeypatch):
    """The weights that are looked at, against SGD and an interpolation written out here."""
    seen = []

    class Recorder:
        def __init__(self, task, seed):
            pass

        def __call__(self, weights):
            seen.append(weights.clone())
            return 0.0

    monkeypatch.setattr(lookahead_plane, "_Accuracy", Recorder)
    job = lookahead_plane.jobs(True, [])[0]
    k, alpha, along = lookahead_plane.K, lookahead_plane.ALPHA, lookahead_plane.ALONG
    with reproducible(threads=1):
        surface = lookahead_plane.run(job)["surface"]

        task = tasks.load(job["task"])
        model = task.model(job["seed"])
        sgd = torch.optim.SGD(model.parameters(), lr=job["contestant"]["lr"], momentum=0.9)
        vector = parameters_to_vector(model.parameters()).detach()
        for step in range(job["warm"] + k):
            if step % k == 0:
                fast = [vector]
            sgd.zero_grad()
            task.loss(model, task.batch(job["seed"], step)).backward()
            sgd.step()
            fast.append(parameters_to_vector(model.parameters()).detach())
            if step % k == k - 1:
                vector = fast[0] + alpha * (fast[-1] - fast[0])
                vector_to_parameters(vector.clone(), model.parameters())

    def assert_close(found, expected):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5), (found - expected).abs().max()

    for found, a in zip(seen, along, strict=False):
        assert_close(found, fast[0] + a * (fast[-1] - fast[0]))
    for found, expected in zip(seen[len(along) :], fast, strict=False):
        assert_close(found, expected)
    # The grid is spanned by the first, middle and last: each of them is where the path says.
    corner, x_end, y_end = (seen[len(along) + k + 1 :][i] for i in (0, 4, 20))
    x, y = surface["x"], surface["y"]
    x_axis = (x_end - corner) / (x[-1] - x[0])
    y_axis = (y_end - corner) / (y[-1] - y[0])
    assert abs(x_axis @ y_axis) < 1e-4
    origin = corner - x[0] * x_axis - y[0] * y_axis
    for i in (0, k // 2, k):
        across, along_path = surface["path"][i]
        assert_close(origin + across * x_axis + along_path * y_axis, fast[i])
