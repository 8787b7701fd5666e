"""A real S3 server on a free port of this machine, for tests; it is empty at first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

BUCKET = "lab"


@contextmanager
def s3_server(wrapped: Callable[[Any], Any] | None = None) -> Iterator[dict[str, str]]:
    """Yields the environment in which `s3://lab` is a bucket of the server, whose application may be `wrapped` in another."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else one line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = HTTPConnection(host, port, timeout=30)
    for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{BUCKET}")):  # a former server's content stays in the process
        connection.request(method, path)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
    if wrapped is not None:
        server._server.app = wrapped(server._server.app)
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # else the client looks for credentials on the network first
        }
    finally:
        server.stop()


def stored() -> dict[str, tuple[int, bytes]]:
    """What the bucket of a server of this process holds: when it was written, and its content, by name."""
    from moto.s3.models import s3_backends

    keys = s3_backends["123456789012"]["aws"].buckets[BUCKET].keys
    files = [(name, key) for name, key in list(keys.items()) if not name.endswith("/")]  # what stands for a folder
    return {name: (int(1e9 * key.last_modified.timestamp()), key.value) for name, key in files}
