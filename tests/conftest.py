"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("softseg", deadline=None)  # a busy machine is not a defect
settings.load_profile("softseg")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real images; without it the tests that need them are skipped and say so."""
    root = os.environ.get("SOFTSEG_TEST_DATA", "")
    if not root or not Path(root).is_dir():
        pytest.skip("SOFTSEG_TEST_DATA does not name a folder: the real images are not at hand")
    return Path(root)
