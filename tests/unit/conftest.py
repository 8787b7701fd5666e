"""A real S3 server for the unit tests of one module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from s3_server import s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of a server with the bucket `lab`; set in this process."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment
