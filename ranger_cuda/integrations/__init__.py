"""Ranger inside the trainers people use; see docs/trainers.md.

Each trainer has a module here, and none of them is imported before it is asked for. Most trainers
need no module: they take an optimizer as it is.
"""

from .unwrapping import unwrap

__all__ = ["unwrap"]
