"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from s3_server import s3_server


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what imports make to no garbage collector: it stays until the end, and looking through it takes seconds per process."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts a server: it is no unit test."""
    for item in items:
        if "s3" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")


@pytest.fixture(scope="session", autouse=True)
def _own_configuration(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own list of code that was run stays as it is."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("configuration"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real images; without it the tests that need them are skipped and say so."""
    root = os.environ.get("SOFTSEG_TEST_DATA", "")
    if not root or not Path(root).is_dir():
        pytest.skip("SOFTSEG_TEST_DATA does not name a folder: the real images are not at hand")
    return Path(root)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of a real S3 server with the bucket `lab`; set in this process."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment
