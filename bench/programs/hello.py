"""The Python program that bench/wake.py starts: listens on $PORT, answers every request with "hello"."""

import os
import socket
import threading

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\r\nhello\n"


def serve(connection: socket.socket) -> None:
    with connection:
        held = b""
        while data := connection.recv(65536):
            held += data
            while b"\r\n\r\n" in held:
                _, _, held = held.partition(b"\r\n\r\n")
                connection.sendall(ANSWER)


listener = socket.create_server(("0.0.0.0", int(os.environ.get("PORT", "8080"))), backlog=4096)
while True:
    accepted, _ = listener.accept()
    threading.Thread(target=serve, args=(accepted,), daemon=True).start()
