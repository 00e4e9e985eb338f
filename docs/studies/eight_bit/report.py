"""The tables and plots of ``README.md``, from ``results.json``: ``python docs/.../report.py``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BETAS2 = (0.95, 0.99, 0.999, 0.9999)


def table(head: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(x: float | None) -> str:
    """Three digits, or that it is large."""
    if x is None or not math.isfinite(x) or abs(x) >= 100:
        return "over 100"
    return f"{x:.2f}" if abs(x) < 10 else f"{x:.0f}"


def signed(x: float | None) -> str:
    """The same with its sign."""
    shown = number(x)
    return shown if shown.startswith(("-", "over")) else "+" + shown


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the README, by name."""
    codes = results["codes"]
    v_rows, u_rows, special_rows = [], [], []
    for name, r in codes.items():
        by = [r["beta2"][str(beta2)] for beta2 in BETAS2]
        steady = max((x["steady"] for x in by), key=lambda x: abs(x - 1))
        decays = [f"{number(x['decay'])}, {number(x['decay beside'])}" for x in by]
        v_rows.append(
            [name, f"{r['bytes']:.2f}", number(steady), *decays, number(r["tiny"]["mean"])]
        )
        u_rows.append(
            [name, *(f"{signed(x['bias'])}, {number(x['spread'])}" for x in r["u"].values())]
        )
        if "(ours)" in name or not name.startswith("m E"):  # variations would do as ours
            special_rows.append([name, *("yes" if x else "no" for x in r["special"].values())])
    first = next(iter(codes.values()))
    heads = {
        "v": ["code", "bytes", "steady v", *(f"β₂ = {b}" for b in BETAS2), "1e-8"],
        "u": ["code", *(case.replace("sigma", "σ =") for case in first["u"])],
        "special": ["code", "∞ stays", "NaN stays", "v beside them > 0", "v = 1e-40 stays > 0"],
    }
    kinds = {"v": v_rows, "u": u_rows, "special": special_rows}
    found = {key: table(heads[key], kinds[key]) for key in heads}
    if "real" in results:
        layers = results["real"]
        head = ["code", *(f"{name.removesuffix('.weight')}" for name in layers)]
        rows = [["σ within a group", *(number(x["sigma"]) for x in layers.values())]]
        for name in next(iter(layers.values()))["u"]:
            us = [x["u"][name] for x in layers.values()]
            rows.append([name, *(f"{signed(u['bias'])}, {number(u['spread'])}" for u in us)])
        found["real"] = table(head, rows)
    if "peers" in results:
        head = ["optimizer", *(f"β₂ = {b}" for b in BETAS2), "1e-8", "200 × 1e-5"]
        peers = []
        for who, r in results["peers"]["rows"].items():
            decays = [number(r["decay"][str(beta2)]) for beta2 in BETAS2]
            peers.append([who, *decays, number(r["tiny"]), f"{100 * r['way']:.0f} %"])
        found["peers"] = table(head, peers)
    return found


def draw(codes: dict[str, Any]) -> None:
    """The plots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = {name: r for name, r in codes.items() if r["in plots"]}
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axis, beta2 in zip(axes, BETAS2[-2:], strict=True):
        axis.axhline(1, color="black", linestyle=":")
        for name, r in shown.items():
            curve = [(i / 20, x) for i, x in enumerate(r["beta2"][str(beta2)]["curve"])]
            axis.plot([t for t, _ in curve], [x * math.exp(t) for t, x in curve], label=name)
        axis.set(title=f"β₂ = {beta2}", xlabel="steps without gradients × (1 − β₂)", yscale="log")
    axes[0].set(ylabel="mean v, over float32's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(HERE / "decay.png", dpi=90)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for name, r in shown.items():
        for axis, key in zip(axes, ("bias", "spread"), strict=True):
            values = [x[key] for x in r["u"].values()]
            axis.plot([*r["u"]], [math.nan if x is None else x for x in values], "o-", label=name)
    axes[0].set(title="bias of u", ylim=(-1.1, 1.1))
    axes[1].set(title="spread of u", yscale="log", ylim=(0.01, 10))
    for axis in axes:
        axis.tick_params(axis="x", labelrotation=20, labelsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(HERE / "update.png", dpi=90)
    plt.close("all")


def finite(value: Any) -> Any:
    """Plain JSON: five digits, and None for what is no finite number."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def load() -> dict[str, Any]:
    """What has been measured so far."""
    path = HERE / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def save(**parts: Any) -> None:
    """Write parts of the results anew, draw the plots and print the tables."""
    results = load() | finite(parts)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), text)  # lists in a line
    (HERE / "results.json").write_text(text + "\n")
    for name, text in tables(results).items():
        print(f"\n{name}\n\n{text}")
    draw(results["codes"])


if __name__ == "__main__":
    save()
