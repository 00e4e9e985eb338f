"""Everything that a machine with a GPU can say of this clone: ``python -m benchmarks gpu``."""
