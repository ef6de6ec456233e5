"""A machine whose health the test decides: `/up` answers with the status in the file $HEALTH.<machine id>, or 200.

Everything else is answered with the machine's id and how many requests it has had beside checks.
"""

import http.server
import os
import pathlib
import threading

MACHINE = os.environ["FLY_MACHINE_ID"]
LOCK = threading.Lock()
served = 0


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        global served
        if self.path == "/up":
            self.answer(status(), "as I am told")
            return
        with LOCK:
            served += 1
            count = served
        self.answer(200, f"{MACHINE} {count}")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def status() -> int:
    for name in (f"{os.environ['HEALTH']}.{MACHINE}", os.environ["HEALTH"]):
        if pathlib.Path(name).exists():
            return int(pathlib.Path(name).read_text())
    return 200


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


if __name__ == "__main__":
    Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
