"""A served node whose apps are scripted origins, and clients for it: what the data plane's system tests stand on."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.peer import Answer, Peer
from tests.support.processes import wait_for
from tests.support.script import PROGRAM
from tests.support.serve import ServedNode, free_ports

HTTP_80 = '[[services.ports]]\nport = 80\nhandlers = ["http"]\n'
TLS_443 = '[[services.ports]]\nport = 443\nhandlers = ["tls", "http"]\n'


def scripted_app(
    folder: Path,
    name: str,
    ports: str = HTTP_80 + TLS_443,
    *,
    kind: str = "requests",
    more: str = "",
    service: str = "",
) -> str:
    """Write a fly.toml for a scripted origin. Returns its [[apps]] section; `more` are lines of that section."""
    fly_toml = folder / f"{name}.toml"
    fly_toml.write_text(
        f'app = "{name}"\n[[services]]\ninternal_port = 8080\nprotocol = "tcp"\nauto_stop_machines = true\n'
        f'[services.concurrency]\ntype = "{kind}"\nsoft_limit = 1000\n{ports}'
    )
    command = json.dumps([sys.executable, "-I", "-S", str(PROGRAM)])
    return f'[[apps]]\nfly_toml = "{fly_toml}"\ncommand = {command}\n{more}'


def static_app(folder: Path, name: str, address: str, ports: str = HTTP_80 + TLS_443, more: str = "") -> str:
    """An app whose machine is an address: whatever is there, or is not."""
    fly_toml = folder / f"{name}.toml"
    fly_toml.write_text(f'app = "{name}"\n[[services]]\ninternal_port = 8080\nprotocol = "tcp"\n{ports}')
    return (
        f'[[apps]]\nfly_toml = "{fly_toml}"\ndriver = "static"\n{more}'
        f'[[apps.machines]]\nid = "{name}-1"\naddress = "{address}"\n'
    )


class Plane(ServedNode):
    """The node, with its access log and a third public port, 8000. `sections` and `node` are more of config.toml."""

    def __init__(
        self,
        folder: Path,
        apps: str,
        sections: str = "",
        log_format: str = "json",
        *,
        workers: int = 2,
        node: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / "access.log"
        (self.third_port,) = free_ports(1)
        log = f'[log]\naccess = "{self.log_file}"\nformat = "{log_format}"\n'
        listen = f'8000 = ["127.0.0.1:{self.third_port}"]\n'
        super().__init__(folder, f"{log}{sections}\n{apps}", listen=listen, workers=workers, node=node, env=env)

    def peer(self, app: str = "web", tls: bool = False, timeout: float = 20.0, source: str | None = None) -> Peer:
        sock = self.connect(app, tls=tls, timeout=timeout, source=source)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Peer(sock)

    def connect_to(self, port: int, tls_app: str | None) -> socket.socket:
        """A raw connection to one of the node's ports, through TLS for an app's name if given."""
        raw = socket.create_connection(("127.0.0.1", port), timeout=20)
        if tls_app is None:
            return raw
        try:
            return self.client_context().wrap_socket(raw, server_hostname=self.host(tls_app))
        except BaseException:
            raw.close()
            raise

    def head(
        self,
        target: str,
        *fields: str,
        app: str = "web",
        method: str = "GET",
        version: str = "1.1",
        body: str | bytes = b"",
    ) -> bytes:
        """A request as bytes."""
        lines = "".join(f"{field}\r\n" for field in fields)
        head = f"{method} {target} HTTP/{version}\r\nHost: {self.host(app)}\r\n{lines}\r\n".encode("latin-1")
        return head + (body.encode("latin-1") if isinstance(body, str) else body)

    def ask(self, target: str, *fields: str, app: str = "web", tls: bool = False, method: str = "GET") -> Answer:
        """One request on a connection of its own."""
        with self.peer(app, tls) as peer:
            peer.send(self.head(target, *fields, app=app, method=method))
            return peer.read_answer(method)

    def poke(self, name: str, app: str = "web") -> None:
        """Let the origin go on that waits for `name`."""
        assert self.ask(f"/poke?do=poke:{name}&do=tell", app=app).status == 200

    def wait_poked(self, name: str, app: str = "web") -> None:
        """Until the origin has poked `name` itself."""
        assert self.ask(f"/wait?do=wait:{name}&do=tell", app=app).status == 200

    def records(self) -> list[dict[str, Any]]:
        """All of the access log, if it is JSON."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def record(self, **match: Any) -> dict[str, Any]:
        """The one record with these values, once it is written. Records leave out what is false or empty."""
        wanted = {key: value or None for key, value in match.items()}

        def find() -> list[dict[str, Any]]:
            return [one for one in self.records() if all(one.get(key) == value for key, value in wanted.items())]

        found = wait_for(find, 10, lambda: f"a record with {match} among {self.records()[-5:]}")
        assert len(found) == 1, found
        return found[0]

    def line(self, what: Callable[[str], bool]) -> str:
        """The first line of a text log for which `what` holds, once it is written."""
        return wait_for(
            lambda: next(filter(what, self.log_file.read_text().splitlines()), None),
            10, lambda: f"a line among {self.log_file.read_text()[-2000:]}",
        )  # fmt: skip

    def metric(self, series: str, **labels: str) -> float:
        """The sum of a series' samples that carry these labels."""
        status, text = self.api("GET", "/metrics")
        assert status == 200
        total = 0.0
        for line in str(text).splitlines():
            name, _, rest = line.partition("{")
            if name == series and all(f'{key}="{value}"' in rest for key, value in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total
