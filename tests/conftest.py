"""Shared by all tests: the network is refused, and runs/ci is found or the test that needs it is skipped outside `make test`."""
import os
import socket
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Any connection beyond this machine fails the test that makes it."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def ci_run() -> Path:
    """The run that `make test` builds before the tests."""
    path = Path(__file__).parent.parent / "runs" / "ci"
    if not (path / "align.json").exists():
        if os.environ.get("CI"):
            pytest.fail("runs/ci is missing: `make test` builds it")
        pytest.skip("runs/ci is not built: run `make test`, or `python -m minillama demo --scale ci`")
    return path
