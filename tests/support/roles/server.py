"""A control that starts programs on request, and answers the supervisor's reports of their ends."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import time

from proxy.process import ChildContext
from tests.support.roles import BEAT_S, Role


def run(context: ChildContext) -> int:
    role = Role(context)
    if role.told("control-crashes"):
        raise RuntimeError("told to crash")
    assert context.control_listener is not None
    selector = selectors.DefaultSelector()
    selector.register(context.control_listener, selectors.EVENT_READ)
    selector.register(role.channel, selectors.EVENT_READ)
    if not role.told("control-hangs-at-start"):
        role.beat()
    role.say(op="ready")
    while True:
        for key, _ in selector.select(BEAT_S):
            if key.fileobj is role.channel:
                for message in role.hear():
                    role.tell("message", message=message)
                    if message["op"] == "drain" and not role.told("control-does-not-end"):
                        return 1 if role.told("control-fails-to-drain") else 0
                    if message["op"] == "leave":
                        while role.told("control-leaves-slowly"):
                            role.beat()
                            time.sleep(0.01)
                        return 0
                    if message["op"] == "exited" and not role.told("control-does-not-reap"):
                        role.say(op="reap", pid=message["pid"])
            else:
                _serve(role, context.control_listener)
        if not role.told("control-hangs-at-start"):
            role.beat()


def _serve(role: Role, listener: socket.socket) -> None:
    client, _ = listener.accept()
    with client:
        client.settimeout(5)
        command = json.loads(client.makefile("r").readline())
        if command["do"] == "spawn":
            started = subprocess.Popen(command["argv"], start_new_session=True)
            started.returncode = 0  # this control never waits for it: no warning at its collection
            client.sendall(f"{started.pid}\n".encode())
        elif command["do"] == "say":
            role.channel.send(command["datagram"].encode())
            client.sendall(b"said\n")
        elif command["do"] == "pid":
            client.sendall(f"{os.getpid()}\n".encode())
