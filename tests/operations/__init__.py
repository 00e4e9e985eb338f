"""Random operations on twins: one optimizer steps natively, the other with the reference, which is
the spec; after every operation all that they hold is compared bit for bit.

``world`` has the twins, ``gradients`` to ``checkpoints`` the operations, each of which draws what
it does from a seed of its own, and ``runner`` plays sequences of them, shrinks those that fail and
plays them again: ``cd tests && python -m operations --help``.
"""
