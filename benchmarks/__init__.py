"""Measurements: ``python -m benchmarks`` lists them; README.md has the method."""
