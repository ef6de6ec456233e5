"""A program that is hosted and hostile: it tries, as asked, what a machine may not do. Standard library only.

GET /reach?host=H&port=P&path=/X     status and start of the body of a request to there, or the error
GET /read?path=P                     length of a file, or the error
GET /show?path=P                     its text, or the error
GET /unix?path=P                     "connected", or the error
"""

import http.client
import http.server
import json
import os
import socket
from urllib.parse import parse_qs, urlsplit


def reach(host: str, port: str, path: str) -> str:
    connection = http.client.HTTPConnection(host, int(port), timeout=3)
    try:
        connection.request("POST", path, b"{}")
        answer = connection.getresponse()
        return f"{answer.status} {answer.read(200)!r}"
    finally:
        connection.close()


def read(path: str) -> str:
    with open(path, "rb") as file:
        return f"{len(file.read())} bytes"


def show(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(10_000)


def unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        return "connected"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        words = {name: values[0] for name, values in parse_qs(asked.query).items()}
        try:
            result = {"/reach": reach, "/read": read, "/show": show, "/unix": unix}[asked.path](**words)
        except (OSError, http.client.HTTPException, KeyError) as error:
            result = f"{type(error).__name__}: {error}"
        body = json.dumps({"result": result, "uid": os.getuid()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form: str, *values: object) -> None:
        pass


http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
