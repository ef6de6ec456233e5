"""A small HTTP program that machines of the system tests run. Standard library only, quick to start.

    GET /           who answers: {"pid", "machine", "count"}
    GET /wait/S     answers after S seconds
    GET /exit/N     ends with status N, at once and without an answer
    GET /busy       423 while the file BUSY exists, else 200
    Upgrade: echo   101, then every byte comes back
    anything else   takes the body and tells its length

Environment: STARTS (file: one line "PID MONOTONIC_NS" for each start), NEEDS (file: without it, end with status 7),
LISTEN_NEEDS (file: without it, never listen), BUSY, LISTEN_AFTER_S, LOUD_BYTES_S (write numbered lines that fast).
"""

import json
import os
import socket
import sys
import threading
import time

LINE_BYTES = 100
count = 0


def main() -> None:
    if path := os.environ.get("STARTS"):
        with open(path, "a", encoding="ascii") as starts:
            starts.write(f"{os.getpid()} {time.monotonic_ns()}\n")
    if (path := os.environ.get("NEEDS")) and not os.path.exists(path):
        print("something needed is missing", flush=True)
        sys.exit(7)
    if speed := int(os.environ.get("LOUD_BYTES_S", "0")):
        threading.Thread(target=be_loud, args=(speed,), daemon=True).start()
    if (path := os.environ.get("LISTEN_NEEDS")) and not os.path.exists(path):
        time.sleep(600)
    time.sleep(float(os.environ.get("LISTEN_AFTER_S", "0")))
    with socket.create_server(("", int(os.environ["PORT"])), backlog=1024) as server:
        while True:
            client, _ = server.accept()
            threading.Thread(target=serve, args=(client,), daemon=True).start()


def be_loud(speed: int) -> None:
    number, began = 0, time.monotonic()
    while True:
        until = int((time.monotonic() - began) * speed / LINE_BYTES)
        lines = []
        while number < until:
            lines.append(f"line {number} ".ljust(LINE_BYTES - 1, ".") + "\n")
            number += 1
        os.write(1, "".join(lines).encode())
        time.sleep(0.01)


def serve(client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, client.makefile("rb") as stream:
        while head := read_head(stream):
            if not answer(client, stream, *head):
                return


def read_head(stream):  # type: ignore[no-untyped-def]
    request = stream.readline(65_536)
    if not request:
        return None
    fields = {}
    while line := stream.readline(65_536).strip():
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    return request.split()[1].decode(), fields


def answer(client: socket.socket, stream, path: str, fields: dict[bytes, bytes]) -> bool:  # type: ignore[no-untyped-def]
    global count
    count += 1
    if fields.get(b"upgrade", b"").lower() == b"echo":
        client.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        while data := stream.read1(65_536):
            client.sendall(data)
        return False
    body = stream.read(int(fields.get(b"content-length", b"0")))
    words = path.strip("/").split("/")
    if words[0] == "exit":
        os._exit(int(words[1]))
    if words[0] == "wait":
        time.sleep(float(words[1]))
    told = {"pid": os.getpid(), "machine": os.environ.get("FLY_MACHINE_ID"), "count": count, "bytes": len(body)}
    text = json.dumps(told).encode()
    is_busy = words[0] == "busy" and os.path.exists(os.environ["BUSY"])
    client.sendall(
        (b"HTTP/1.1 423 Locked\r\n" if is_busy else b"HTTP/1.1 200 OK\r\n")
        + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text)
        + text
    )
    return True


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(0)
