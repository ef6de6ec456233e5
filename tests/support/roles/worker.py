"""A worker that answers every connection with who it is, and can be asked to count load."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import ssl

from proxy.process import ChildContext
from proxy.state import W_CONNECTIONS
from tests.support.roles import BEAT_S, Role


def run(context: ChildContext) -> int:
    role = Role(context)
    if role.told("worker-crashes") or role.told(f"worker-{context.slot}-crashes"):
        role.memory.cells[role.memory.load_base(context.slot) + 2 * 7] += 3  # it dies at work
        role.memory.cells[role.memory.queue_base(context.slot) + 7] = 1
        raise RuntimeError("told to crash")
    draining: list[int] = []
    covered: dict[int, list[socket.socket]] = {}
    signal.signal(signal.SIGTERM, lambda number, frame: draining.append(number))
    selector = selectors.DefaultSelector()
    for listener in context.listeners:
        selector.register(listener.socket, selectors.EVENT_READ, listener.public_port)
    selector.register(role.channel, selectors.EVENT_READ)
    leaf = _leaf_context(role)
    if not role.told("worker-never-beats"):
        role.beat()
    role.say(op="ready")
    while True:
        for key, _ in selector.select(BEAT_S):
            if key.fileobj is role.channel:
                for message in role.hear():
                    sockets = message.pop("sockets", [])
                    role.tell("message", message=message)
                    if message["op"] == "cover":
                        covered[message["slot"]] = sockets
                        for spare, port in zip(sockets, message["public_ports"], strict=True):
                            selector.register(spare, selectors.EVENT_READ, port)
                    elif message["op"] == "uncover":
                        for spare in covered.pop(message["slot"]):
                            selector.unregister(spare)
                            spare.close()
                    else:
                        draining.append(0)
            else:
                _serve(role, key.fileobj, leaf)  # type: ignore[arg-type]  # selectors types fileobj loosely
        if not role.told("worker-never-beats"):
            role.beat()
        if draining and not role.told("worker-does-not-end"):
            role.tell("drained")
            return 0


def _leaf_context(role: Role) -> ssl.SSLContext | None:
    if not role.told("leaf.pem"):
        return None
    leaf = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.load_cert_chain(role.data_dir / "leaf.pem")
    return leaf


def _serve(role: Role, listener: socket.socket, leaf: ssl.SSLContext | None) -> None:
    try:
        client, _ = listener.accept()
    except BlockingIOError:
        return
    with client:
        client.settimeout(5)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if leaf is not None:
            base = role.context.tls_context
            assert base is not None
            base.sni_callback = lambda connection, name, context: setattr(connection, "context", leaf)
            client = base.wrap_socket(client, server_side=True)
        line = client.makefile("r").readline().split()
        memory, slot = role.memory, role.context.slot
        if line[0] == "load":
            memory.cells[memory.load_base(slot) + 2 * int(line[1])] += int(line[2])
            memory.cells[memory.load_base(slot) + 2 * int(line[1]) + 1] += int(line[2])
            memory.cells[memory.worker_base(slot) + W_CONNECTIONS] += int(line[2])
        answer = {
            "pid": os.getpid(),
            "slot": slot,
            "incarnation": role.context.incarnation,
            "in_flight": memory.in_flight(7),
            "admitted": memory.admitted(7),
            "queued": sum(bool(memory.cells[memory.queue_base(one) + 7]) for one in range(memory.rows_in_use)),
            "resumed": isinstance(client, ssl.SSLSocket) and bool(client.session_reused),
        }
        client.sendall(json.dumps(answer).encode() + b"\n")
