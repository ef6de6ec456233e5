"""A machine that counts the connections it accepts, one line each in the file COUNTED: "PID". Standard library only.

Environment: LISTEN_AFTER_S; SERIAL (one connection is served after the other, each to its end, as small servers do);
DROP (file: while it is there, the process ends with the first connection).
"""

from __future__ import annotations

import os
import socket
import threading
import time


def serve(client: socket.socket) -> None:
    with client, client.makefile("rb") as stream:
        while stream.readline(65_536):
            length = 0
            while line := stream.readline(65_536).strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            told = b"%d %d" % (os.getpid(), len(stream.read(length)))
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))


time.sleep(float(os.environ.get("LISTEN_AFTER_S", "0")))
with socket.create_server(("", int(os.environ["PORT"])), backlog=64) as server:
    while True:
        accepted, _ = server.accept()
        with open(os.environ["COUNTED"], "a", encoding="ascii") as counted:
            counted.write(f"{os.getpid()}\n")
        if os.path.exists(os.environ["DROP"]):
            os._exit(3)
        if "SERIAL" in os.environ:
            serve(accepted)
        else:
            threading.Thread(target=serve, args=(accepted,), daemon=True).start()
