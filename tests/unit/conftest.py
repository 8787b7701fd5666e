"""How Hypothesis behaves in unit tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("softseg", deadline=None)  # a busy machine is not a defect
settings.load_profile("softseg")
