"""Runs the control process by itself, with what the supervisor would hand to it; a script for test_server.py.

python -m tests.control.control_process CONFIG INCARNATION SHARED_FD LISTENER_FD CHANNEL_FD
"""

from __future__ import annotations

import socket
import sys

from proxy import config
from proxy.process import ChildContext
from proxy.server import run


def main(config_path: str, incarnation: str, shared: str, listener: str, channel: str) -> int:
    draft = config.load(config_path).draft
    assert draft is not None
    plan = config.plan(draft, config_path)
    context = ChildContext(
        "control", 0, 0, int(incarnation), plan, int(shared), control_listener=socket.socket(fileno=int(listener)),
        channel=socket.socket(fileno=int(channel)),
    )  # fmt: skip
    return run(context)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
