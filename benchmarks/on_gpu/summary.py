"""What a person wants to know first of a run on a GPU."""

from __future__ import annotations

from .commands import Result


def headline(name: str, result: Result) -> str:
    """A stage in a line."""
    seconds = f"{result['seconds']:6.1f} s" if "seconds" in result else " " * 8
    return f"{name:<24} {result['state']:<8} {seconds}  {result.get('why', '')}"


def summary(results: dict[str, Result]) -> list[str]:
    """What a person wants to know first."""
    lines = ["\n== summary"]
    where = results.get("environment")
    if where:
        lines += [f"commit {where.get('commit')}, {where.get('versions')}", f"{where.get('gpu')}"]
    if "tests" in results:
        lines.append(f"tests: {dict(results['tests'].get('counts', {}))}")
        lines += [f"  FAILED {name}" for name in results["tests"].get("failed", [])[:40]]
    for name, result in results.items():
        if result.get("summary"):
            lines.append(f"{name}: {'; '.join(result['summary'])}")
        lines += [f"  {part}" for part in result.get("parts", []) if part.startswith("FAILED")]
    lines += results.get("benchmark", {}).get("lines", [])
    return lines + [headline(name, result) for name, result in results.items()]
