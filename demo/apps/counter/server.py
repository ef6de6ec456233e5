"""Counts requests in memory: the count survives a suspend, and is lost when the machine stops.

GET /          {"count": 3, "pid": 4711, "machine": "…"}
GET /stream    five lines, a tenth of a second apart
"""

import itertools
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

requests = itertools.count(1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together: sent apart, the body waits for a delayed ACK, 40 ms

    def do_GET(self) -> None:
        if self.path == "/stream":
            self.stream()
            return
        facts = {"count": next(requests), "pid": os.getpid(), "machine": os.environ.get("FLY_MACHINE_ID", "")}
        body = json.dumps(facts).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(1, 6):
            line = b"line %d\n" % number
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
            time.sleep(0.1)
        self.wfile.write(b"0\r\n\r\n")


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # a crowd may arrive at once
    daemon_threads = True


def leave(signum: int, _frame: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)  # Fly's default kill_signal
    signal.signal(signal.SIGTERM, leave)
    Server(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Handler).serve_forever()
