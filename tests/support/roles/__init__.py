"""Small stand-ins for control and worker, so that the supervisor is tested with real processes and nothing else.

The supervisor takes them when WAKEFRONT_ROLES names this package. What they met is appended to data_dir/events as JSON
lines; files in data_dir tell them to misbehave.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from proxy.process import ChildContext
from proxy.state import SharedMemory

BEAT_S = 0.1


class Role:
    """What both stand-ins have in common."""

    def __init__(self, context: ChildContext) -> None:
        assert context.channel is not None
        self.context = context
        self.channel = context.channel
        self.data_dir = Path(context.plan.data_dir)
        self.memory = SharedMemory(context.shared_fd)
        self.tell("started", fds=len(os.listdir("/proc/self/fd")))

    def tell(self, event: str, **more: Any) -> None:
        record = {
            "event": event,
            "role": self.context.role,
            "slot": self.context.slot,
            "pid": os.getpid(),
            "incarnation": self.context.incarnation,
            "at": time.monotonic(),
        }
        with open(self.data_dir / "events", "a") as file:
            file.write(json.dumps(record | more) + "\n")

    def told(self, name: str) -> bool:
        return (self.data_dir / name).exists()

    def beat(self) -> None:
        self.memory.beat(self.context.index, time.monotonic_ns())

    def say(self, **message: Any) -> None:
        self.channel.send(json.dumps(message).encode())

    def hear(self) -> list[dict[str, Any]]:
        """All messages of the supervisor that wait now; sockets that come along are under "sockets"."""
        messages: list[dict[str, Any]] = []
        while True:
            try:
                datagram, fds, _, _ = socket.recv_fds(self.channel, 65_536, 64)
            except BlockingIOError:
                return messages
            if not datagram:
                raise SystemExit("the supervisor is gone")
            messages.append(
                json.loads(datagram) | ({"sockets": [socket.socket(fileno=fd) for fd in fds]} if fds else {})
            )
