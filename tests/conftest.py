"""Property-based tests: no deadlines, for busy machines; the same examples every time in CI."""

import os

from hypothesis import settings

settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")
