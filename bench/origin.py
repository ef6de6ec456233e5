"""The origin behind every proxy: programs/origin.c on the load generator's core; nginx where there is no compiler."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path

from bench.processes import BenchError, compile_program, free_port, spawn, wait_for_port

BODIES = {"/small": 100, "/fresh": 100, "/1k": 1024, "/100k": 102400, "/10m": 10485760}
UPLOAD_ANSWER_BYTES = 10


class Origin:
    """A running origin; `kind` goes into the results."""

    def __init__(self, folder: Path, core: int) -> None:
        self.port = free_port()
        self.kind = "bench/programs/origin.c" if shutil.which("cc") else "nginx"
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "origin.log"
        command = self._compiled(folder) if self.kind != "nginx" else self._nginx(folder)
        with self._log.open("wb") as log:
            self.process: subprocess.Popen[bytes] = spawn(command, core, log)
        wait_for_port(self.port, self.process, self._log)

    def _compiled(self, folder: Path) -> list[str]:
        return [str(compile_program("origin", folder)), str(self.port)]

    def _nginx(self, folder: Path) -> list[str]:
        nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if nginx is None:
            raise BenchError(
                "neither cc nor nginx for the origin; install one: apt-get install gcc libc6-dev nginx-light"
            )
        for path, size in BODIES.items():
            (folder / path[1:]).write_bytes((b"abcdefghijklmnopqrstuvwxyz012345" * (size // 32 + 1))[:size])
        names = ("host", "x_forwarded_for", "x_forwarded_proto", "via", "x_request_id")
        echo = "".join(f"{name.replace('_', '-')}: $http_{name}\\r\\n" for name in names)
        (folder / "origin-nginx.conf").write_text(
            f"""daemon off; worker_processes 1; pid {folder}/origin.pid; error_log stderr warn; user root;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; sendfile on; tcp_nodelay on; client_body_buffer_size 256k;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{self.port} backlog=4096; root {folder};
    location = /upload {{ return 200 "0000065536"; }}
    location = /head {{ return 200 "{echo}"; }}
    location = /stats {{ return 200 '{{"connections": $connection, "requests": 0}}'; }}
  }}
}}
"""
        )
        return [nginx, "-p", str(folder), "-c", str(folder / "origin-nginx.conf")]

    def stats(self) -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=10) as answer:
            return dict(json.loads(answer.read()))
