"""Pebble and its challenge test server: a real ACME CA and the DNS that it believes, as processes on loopback.

The CA looks for challenges at ports that the caller names. Everything about it (its certificate, its ports) is made for
one run, in one folder. `python -m tests.support.pebble` is not needed: use it as a context manager.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trustme

_READY_S = 20.0


def is_installed() -> bool:
    return bool(shutil.which("pebble") and shutil.which("pebble-challtestsrv"))


@dataclass
class Pebble:
    """A running CA."""

    folder: Path
    directory_url: str
    ca_file: Path  # roots of the CA's own API
    dns: str  # "127.0.0.1:port", over UDP and TCP
    log: Path
    _management: str
    dns_management: str  # of the test DNS, http
    _context: ssl.SSLContext

    def roots(self) -> bytes:
        """The root that issued certificates lead to, PEM: a new one with every start."""
        with urllib.request.urlopen(f"{self._management}/roots/0", context=self._context, timeout=10) as answer:
            return bytes(answer.read())

    def set_a(self, host: str, *addresses: str) -> None:
        """Without addresses: as if there were none."""
        self._tell("clear-a", {"host": f"{host}."})
        self._tell("add-a", {"host": f"{host}.", "addresses": list(addresses)})

    def set_cname(self, host: str, target: str) -> None:
        self._tell("set-cname", {"host": f"{host}.", "target": f"{target}."})

    def set_txt(self, host: str, value: str) -> None:
        self._tell("set-txt", {"host": f"{host}.", "value": value})

    def clear_txt(self, host: str) -> None:
        self._tell("clear-txt", {"host": f"{host}."})

    def set_servfail(self, host: str) -> None:
        self._tell("set-servfail", {"host": f"{host}."})

    def clear_servfail(self, host: str) -> None:
        self._tell("clear-servfail", {"host": f"{host}."})

    def _tell(self, what: str, body: Mapping[str, object]) -> None:
        request = urllib.request.Request(f"{self.dns_management}/{what}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()


@contextlib.contextmanager
def pebble(
    folder: Path,
    http_port: int,
    tls_port: int,
    *,
    environment: Mapping[str, str] | None = None,
    mac_keys: Mapping[str, str] | None = None,
    quick: bool = True,
    dns_server: str | None = None,
) -> Iterator[Pebble]:
    """Start a CA that looks for HTTP-01 at `http_port` and for TLS-ALPN-01 at `tls_port` of 127.0.0.1.

    `mac_keys`: external accounts it insists on. `quick`: it does not wait before it looks. `dns_server` ("IP:PORT"):
    what it asks instead of the challenge test server. It refuses one good nonce in twenty and uses half of its
    authorizations again, as it does by itself, unless `environment` says otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(str(folder / "api-ca.pem"))
    own.private_key_pem.write_to_path(str(folder / "api-key.pem"))
    own.cert_chain_pems[0].write_to_path(str(folder / "api.pem"))
    api, management, dns, dns_management = _free_ports(4)
    settings: dict[str, object] = {
        "listenAddress": f"127.0.0.1:{api}",
        "managementListenAddress": f"127.0.0.1:{management}",
        "certificate": str(folder / "api.pem"),
        "privateKey": str(folder / "api-key.pem"),
        "httpPort": http_port,
        "tlsPort": tls_port,
        "ocspResponderURL": "",
        "externalAccountBindingRequired": bool(mac_keys),
        "externalAccountMACKeys": dict(mac_keys or {}),
    }
    (folder / "pebble.json").write_text(json.dumps({"pebble": settings}))
    own_environment = {**os.environ, **({"PEBBLE_VA_NOSLEEP": "1"} if quick else {}), **(environment or {})}
    log = folder / "pebble.log"
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        for command in (
            ["pebble-challtestsrv", "-defaultIPv4", "127.0.0.1", "-defaultIPv6", "", "-http01", "", "-https01", "",
             "-tlsalpn01", "", "-dns01", f"127.0.0.1:{dns}", "-management", f"127.0.0.1:{dns_management}"],
            ["pebble", "-strict", "-config", str(folder / "pebble.json"),
             "-dnsserver", dns_server or f"127.0.0.1:{dns}"],
        ):  # fmt: skip
            process = subprocess.Popen(command, env=own_environment, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(_end, process)
        for port in (api, management, dns_management):
            _await_listener(port, log)
        context = ssl.create_default_context(cafile=folder / "api-ca.pem")
        yield Pebble(
            folder, f"https://127.0.0.1:{api}/dir", folder / "api-ca.pem", f"127.0.0.1:{dns}", log,
            f"https://127.0.0.1:{management}", f"http://127.0.0.1:{dns_management}", context,
        )  # fmt: skip


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _await_listener(port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing listens on {port}: {log.read_text(errors='replace')[-2000:]}") from None
            time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=10)
