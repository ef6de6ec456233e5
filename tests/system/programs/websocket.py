"""A machine that speaks WebSocket to whoever connects: text frames without end. Standard library.

What it sends at a time ends in the middle of a frame, always: a frame's end and the next one's beginning come in one
piece. What the client sends is not looked at.
"""

import base64
import hashlib
import os
import socket
import threading
import time

_KEY = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_PAYLOAD = b"tick" * 50  # longer than 125 bytes: the length takes 16 bits
_FRAME = b"\x81\x7e" + len(_PAYLOAD).to_bytes(2, "big") + _PAYLOAD


def main() -> None:
    with socket.create_server(("", int(os.environ["PORT"])), backlog=64) as server:
        while True:
            client, _ = server.accept()
            threading.Thread(target=serve, args=(client,), daemon=True).start()


def serve(client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, client.makefile("rb") as stream:
        key = b""
        while line := stream.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"sec-websocket-key":
                key = value.strip()
        accept = base64.b64encode(hashlib.sha1(key + _KEY).digest())
        head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        try:
            client.sendall(head + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
            place, rest = 0, b""
            while True:
                place = place % (len(_FRAME) - 1) + 1
                client.sendall(rest + _FRAME[:place])
                rest = _FRAME[place:]
                time.sleep(0.01)
        except OSError:
            return


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(0)
