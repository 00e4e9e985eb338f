"""What is said of results: tables, promises, and where one is worse than an older one."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks import promises, result_file
from benchmarks.__main__ import main
from benchmarks.contestants import ADAMW

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_committed_result_can_be_shown_and_compared(path, capsys):
    assert main(["show", str(path), "--compare", str(path)]) == 0
    shown = capsys.readouterr().out
    for found in result_file.load(path)["workloads"].values():
        for who, row in found["rows"].items():
            assert (f"| {who} | {row['ms']:.4f} |" if "ms" in row else who) in shown
    assert "  nothing" in shown


def test_the_readme_s_numbers_are_those_of_the_result_that_it_names():
    readme = (ROOT / "README.md").read_text()
    found = result_file.load(ROOT / re.search(r"raw result\]\((.*?)\)", readme)[1])["workloads"]
    kept = {
        "64 x 1024^2": ["kept"],
        "1000 x 64^2": ["fresh", "kept"],
        "1000 x 1": ["fresh", "kept"],
    }
    table = readme[readme.index("how much faster `Ranger.step()`") :].split("\n\n")[0]
    checked = 0
    for line in table.splitlines()[2:]:
        who, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for (name, kinds), cell in zip(kept.items(), cells, strict=True):
            row = found[name]["rows"].get(who, {})
            if "×" in cell and row:
                rows = [row if kind == "kept" else row["fresh"] for kind in kinds]
                assert cell == ", ".join(f"{1 / r['ratio']:.2f}" for r in rows) + " ×"
                checked += 1
    assert checked == 15


def test_what_is_said_of_dtensors_is_in_the_result():
    text = (ROOT / "docs/design/host.md").read_text()
    (path,) = re.findall(r"\(\.\./\.\./(benchmarks/results/sharded/.*?\.json)\)", text)
    result = json.loads((ROOT / path).read_text())
    (line,) = (each for each in text.split("\n- ") if each.startswith("**DTensors**"))
    for placed in ("sharded", "whole"):
        for name in (ADAMW, "torch AdamW foreach"):
            kept, fresh = (result["rows"][f"{placed}, {kind}"][name] for kind in ("kept", "fresh"))
            assert f"{kept['over_ours']:.1f}, {fresh['over_ours']:.1f} ×" in line
    assert result["environment"]["processor"] in line


def made_up(**ratios):
    """A result with these ratios, whose quartiles are 2 % from the median."""
    rows = {}
    for who, ratio in {"ranger": 1.0, **ratios}.items():
        row = {"ms": 1.0, "ms_quartiles": [0.98, 1.02], "bytes_allocated": 0}
        for key in ("ratio", "of_adamw"):
            row |= {key: ratio, f"{key}_quartiles": [ratio * 0.98, ratio * 1.02]}
        rows[who.replace("_", " ")] = row
    where = {"device": "some CPU", "threads": 2, "torch": "2.13"}
    return {"environment": where, "workloads": {"1000 x 1": {"rows": rows}}}


def compared(tmp_path, capsys, old, new):
    """What `--compare` prints of two results, and the exit status."""
    paths = []
    for name, result in (("old", old), ("new", new)):
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_text(json.dumps(result))
    status = main(["show", paths[1], "--compare", paths[0]])
    return capsys.readouterr().out.split("worse than the old result")[1].splitlines()[1:], status


@pytest.mark.parametrize("key", ["ratio", "fresh"])
@pytest.mark.parametrize(("ratio", "worse"), [(0.3, 0), (0.5, 0), (0.519, 0), (0.55, 1)])
def test_a_ratio_is_worse_beyond_the_noise_of_both(tmp_path, capsys, ratio, worse, key):
    old, new = made_up(optimi_Ranger=0.5), made_up(optimi_Ranger=0.5)
    changed = made_up(optimi_Ranger=ratio)["workloads"]["1000 x 1"]["rows"]["optimi Ranger"]
    rows = new["workloads"]["1000 x 1"]["rows"]
    if key == "fresh":
        before = old["workloads"]["1000 x 1"]["rows"]["optimi Ranger"]
        before["fresh"] = copy.deepcopy(before)
        rows["optimi Ranger"]["fresh"] = changed
    else:
        rows["optimi Ranger"] = changed
    lines, status = compared(tmp_path, capsys, old, new)
    assert status == worse
    said = ", new gradients" if key == "fresh" else ""
    assert lines[0].startswith(f"  1000 x 1, optimi Ranger{said}: " if worse else "  nothing")


def test_a_noisy_run_hides_what_a_quiet_one_would_show(tmp_path, capsys):
    old, new = made_up(optimi_Ranger=0.5), made_up(optimi_Ranger=0.6)
    new["workloads"]["1000 x 1"]["rows"]["optimi Ranger"]["ratio_quartiles"] = [0.45, 0.7]
    assert compared(tmp_path, capsys, old, new) == (["  nothing"], 0)


def test_of_our_own_rows_the_time_is_compared_over_torch_s(tmp_path, capsys):
    old, new = made_up(radam=1.0), made_up(radam=1.0)
    row = new["workloads"]["1000 x 1"]["rows"]["radam"]
    row |= {"ratio": 0.5, "of_adamw": 2.0}  # it takes twice as long as it did
    row |= {"ratio_quartiles": [0.49, 0.51], "of_adamw_quartiles": [1.96, 2.04]}
    lines, status = compared(tmp_path, capsys, old, new)
    assert status == 1
    assert f"radam: its time over {ADAMW}'s: 1.000 [0.980, 1.020] -> 2.000" in lines[0]
    assert compared(tmp_path, capsys, new, old) == (["  nothing"], 0)


@pytest.mark.parametrize(("ratio", "worse"), [(0.6, 0), (0.9, 1)])
def test_of_the_oldest_results_the_widest_range_that_times_allow_is_noise(
    tmp_path, capsys, ratio, worse
):
    times = {"ranger": (1.0, [0.9, 1.2]), "optimi Ranger": (2.0, [1.8, 2.4])}
    rows = {who: {"ms": ms, "ms_quartiles": ends} for who, (ms, ends) in times.items()}
    rows["optimi Ranger"]["ratio"] = 0.5  # somewhere from 0.9 / 2.4 to 1.2 / 1.8
    old = made_up() | {"workloads": {"1000 x 1": rows}}
    assert compared(tmp_path, capsys, old, made_up(optimi_Ranger=ratio))[1] == worse


def test_a_row_that_vanished_is_told_with_its_reason(tmp_path, capsys):
    old, new = made_up(optimi_Ranger=0.5, radam=0.5), made_up()
    new["workloads"]["1000 x 1"]["rows"]["radam"] = {"missing": "a reason"}
    lines, status = compared(tmp_path, capsys, old, new)
    assert status == 1
    assert lines == [
        "  1000 x 1, optimi Ranger: vanished: not in the new result",
        "  1000 x 1, radam: vanished: a reason",
    ]
    new["arguments"] = {"workloads": ["1000 x 1"], "skip": ["optimi Ranger", "radam"]}
    assert compared(tmp_path, capsys, old, new) == (["  nothing"], 0)
    new["arguments"] = {"workloads": ["gpt2"], "skip": []}
    assert compared(tmp_path, capsys, old, new) == (["  nothing"], 0)


def test_another_torch_is_told_beside_the_comparison(tmp_path, capsys):
    old, new = made_up(), made_up()
    new["environment"]["torch"] = "2.14"
    lines, status = compared(tmp_path, capsys, old, new)
    assert (lines, status) == (["  nothing", "  note: another torch: 2.13 -> 2.14"], 0)


def test_a_promise_is_of_what_was_measured_and_is_broken_by_what_was_not(tmp_path):
    result = made_up(torch_AdamW_fused=0.1)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    assert main(["show", str(path), "--check"]) == 0
    rows = result["workloads"]["1000 x 1"]["rows"]
    rows[ADAMW]["ratio"] = 0.3
    path.write_text(json.dumps(result))
    assert main(["show", str(path)]) == 0
    assert main(["show", str(path), "--check"]) == 1
    rows[ADAMW] = {"missing": "a reason"}
    assert [kept for kept, _ in promises.judged(result)] == [False, True]
    result["arguments"] = {"device": "cuda"}  # where 1000 x 1 promises nothing of AdamW
    assert [kept for kept, _ in promises.judged(result)] == [True]
