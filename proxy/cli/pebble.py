"""Pebble and its challenge test server: a real ACME CA and the DNS that it believes, as processes on loopback.

For the demo and for tests: certificates from here are trusted by nobody who was not told its root. The CA looks for
challenges at ports that the caller names; its own certificate, its ports and its root are made for one run.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_READY_S = 20.0
_ADDRESS = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


def is_installed() -> bool:
    return bool(shutil.which("pebble") and shutil.which("pebble-challtestsrv"))


@dataclass
class Pebble:
    """A running CA."""

    folder: Path
    directory_url: str
    ca_file: Path  # roots of the CA's own API
    dns: str  # "127.0.0.1:port", over UDP and TCP
    dns_management: str  # of the test DNS, http
    log: Path
    _management: str
    _context: ssl.SSLContext

    def roots(self) -> bytes:
        """The root that issued certificates lead to, PEM: a new one with every start."""
        with urllib.request.urlopen(f"{self._management}/roots/0", context=self._context, timeout=10) as answer:
            return bytes(answer.read())

    def set_a(self, host: str, *addresses: str) -> None:
        """Without addresses: as if there were none."""
        self._tell("clear-a", {"host": f"{host}."})
        self._tell("add-a", {"host": f"{host}.", "addresses": list(addresses)})

    def set_default_a(self, address: str) -> None:
        """Of names for which nothing was set."""
        self._tell("set-default-ipv4", {"ip": address})

    def set_cname(self, host: str, target: str) -> None:
        self._tell("set-cname", {"host": f"{host}.", "target": f"{target}."})

    def set_txt(self, host: str, value: str) -> None:
        self._tell("set-txt", {"host": f"{host}.", "value": value})

    def clear_txt(self, host: str) -> None:
        self._tell("clear-txt", {"host": f"{host}."})

    def set_servfail(self, host: str) -> None:
        self._tell("set-servfail", {"host": f"{host}."})

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

    Raises RuntimeError if it does not start, with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca_file, key_file = folder / "api-ca.pem", folder / "api-key.pem"
    _make_certificate(ca_file, key_file)
    api, management, dns, dns_management = free_ports(4)
    settings: dict[str, object] = {
        "listenAddress": f"{_ADDRESS}:{api}",
        "managementListenAddress": f"{_ADDRESS}:{management}",
        "certificate": str(ca_file),
        "privateKey": str(key_file),
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
            ["pebble-challtestsrv", "-defaultIPv4", _ADDRESS, "-defaultIPv6", "", "-http01", "", "-https01", "",
             "-tlsalpn01", "", "-dns01", f"{_ADDRESS}:{dns}", "-management", f"{_ADDRESS}:{dns_management}"],
            ["pebble", "-strict", "-config", str(folder / "pebble.json"),
             "-dnsserver", dns_server or f"{_ADDRESS}:{dns}"],
        ):  # fmt: skip
            process = subprocess.Popen(
                command, env=own_environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                process_group=0, preexec_fn=_end_with_parent,
            )  # fmt: skip
            stack.callback(_end, process)
        for port in (api, management, dns_management):
            _await_listener(port, log)
        yield Pebble(
            folder, f"https://{_ADDRESS}:{api}/dir", ca_file, f"{_ADDRESS}:{dns}", f"http://{_ADDRESS}:{dns_management}",
            log, f"https://{_ADDRESS}:{management}", ssl.create_default_context(cafile=ca_file),
        )  # fmt: skip


def free_ports(count: int) -> tuple[int, ...]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((_ADDRESS, 0))) for _ in range(count)]
        return tuple(one.getsockname()[1] for one in sockets)


def _make_certificate(path: Path, key_path: Path) -> None:
    """For the CA's API: signed by itself, so that it is its own root."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Pebble's API")])
    now = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    alternatives = [x509.IPAddress(ipaddress.ip_address(_ADDRESS)), x509.DNSName("localhost")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=5))  # a client's clock may be set otherwise
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.touch(0o600)
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _await_listener(port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            socket.create_connection((_ADDRESS, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing listens on {port}: {log.read_text(errors='replace')[-2000:]}") from None
            time.sleep(0.02)


def _end_with_parent() -> None:
    """In the child, before exec: it does not outlive whoever started it, even if that is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=10)
