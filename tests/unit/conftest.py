"""How Hypothesis behaves in unit tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is not a defect, and a test fails only if something has changed; --hypothesis-profile=default draws other examples.
settings.register_profile("softseg", deadline=None, derandomize=True)
settings.load_profile("softseg")
