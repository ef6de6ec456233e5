"""Runs a program of demo/apps by itself, as a machine would, and connects to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

APPS = Path(__file__).resolve().parents[2] / "demo" / "apps"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(name: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The program and its port, once it accepts connections; killed at the end."""
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "server.py"],
        cwd=APPS / name,
        env={**os.environ, "PORT": str(port), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        _wait_until_it_listens(child, port)
        yield child, port
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def _wait_until_it_listens(child: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert child.poll() is None, "the program ended at its start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.005)
    raise AssertionError("the program never listened")
