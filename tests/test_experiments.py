"""`python -m benchmarks.experiments`: it goes on where it stopped, and the committed page says what
the committed results say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import EXPERIMENTS
from benchmarks.experiments.__main__ import main

for needed in ("rich", "matplotlib", "mlxtend"):
    pytest.importorskip(needed)

from rich.console import Console  # noqa: E402

from benchmarks.experiments import (  # noqa: E402
    contestants,
    figures,
    lookahead_plane,
    tasks,
    trials,
)
from benchmarks.experiments.runner import carry_out, module  # noqa: E402
from benchmarks.experiments.store import Store  # noqa: E402
from ranger_cuda.cli.training import reproducible  # noqa: E402

COMMITTED = Path(__file__).parents[1] / "docs" / "experiments"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def quick(name: str, out: Path, *, processes: int = 1, fresh: bool = False) -> list[dict]:
    carry_out(name, out, processes, True, fresh, Console(quiet=True))
    return lines(out / f"{name}.jsonl")


@pytest.mark.parametrize("name", EXPERIMENTS)
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
    alone = quick("gradient_histograms", tmp_path / "1")
    together = quick("gradient_histograms", tmp_path / "2", processes=2)
    assert sorted(map(str, without_times(alone))) == sorted(map(str, without_times(together)))


def test_results_from_elsewhere_are_drawn_but_not_mixed(tmp_path, capsys):
    out = tmp_path
    whole = quick("lookahead_plane", out)
    path = out / "lookahead_plane.jsonl"
    whole[0]["environment"]["torch"] = "1.0"
    path.write_text("".join(json.dumps(line) + "\n" for line in whole))
    flags = ["lookahead_plane", "--quick", "--jobs", "1", "--out", str(out)]
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


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([]) == 2
    assert "pip install rich matplotlib mlxtend" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["lookahead_plane", "--quick", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "choose another --out" in capsys.readouterr().err


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


def test_training_images_are_shifted_held_out_ones_are_not_trained_on():
    task = tasks.load("convnet")
    held_out = {image.numpy().tobytes() for image in task.held_out[0].inputs}
    seen = task.batch(0, 0).inputs
    assert seen.shape == (tasks.IMAGE_BATCH, 28, 28)
    assert not any(image.numpy().tobytes() in held_out for image in seen)


def test_the_plane_goes_through_the_path():
    """Slow weights before at the origin, the last fast weights on the first axis, and accuracies
    along it that are the trace's at both ends."""
    job = lookahead_plane.jobs(True, [])[0]
    with reproducible(threads=1):
        result = lookahead_plane.run(job)
    path = np.array(result["surface"]["path"])
    assert len(path) == lookahead_plane.K + 1
    assert path[0] == pytest.approx([0, 0])
    assert path[-1][1] == pytest.approx(0, abs=1e-5)
    assert path[-1][0] > 0
    first = result["trace"][: lookahead_plane.K + 1]
    along = result["along"][0]
    assert along[0] == first[0]
    assert along[lookahead_plane.ALONG.index(1.0)] == pytest.approx(first[-1], abs=2e-3)
    # The next cycle starts where Lookahead says that this one ends.
    second = result["trace"][lookahead_plane.K + 1 :]
    assert along[lookahead_plane.ALONG.index(0.5)] == pytest.approx(second[0], abs=2e-3)
