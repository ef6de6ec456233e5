"""BIND as name servers on loopback: one process that is a different server at each address.

named listens on addresses of interfaces only, so on 127.0.0.1; for others of 127/8 a relay passes packets on from that
address, by which named chooses the zones to answer from.

    with Bind(tmp_path, {"127.77.0.1": {".": ROOT}, "127.77.0.2": {"example.test": zone("www A 192.0.2.1")}}) as bind:
        ... bind.port, bind.at("127.77.0.2")

With `is_resolver` each answers for all of its zones at once, CNAMEs from one to another followed; a zone "." of its own
keeps it from asking anyone.

Zones are text. Those named in `dynamic` take updates of TXT records, signed with any of `keys` (TSIG name -> base64
secret).
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

import pytest

from tests.support.processes import wait_for

NAMED = shutil.which("named", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
needs_bind = pytest.mark.skipif(NAMED is None, reason="needs BIND (Debian: bind9)")
HOME = "127.0.0.1"

_HEAD = """\
options {{
    directory "{folder}";
    pid-file none; session-keyfile "{folder}/session.key"; lock-file none;
    managed-keys-directory "{folder}"; bindkeys-file "{folder}/none"; geoip-directory none;
    listen-on port {port} {{ 127.0.0.1; }}; listen-on-v6 {{ none; }};
    recursion {recursion}; dnssec-validation no; empty-zones-enable no; notify no; check-names primary ignore;
    allow-transfer {{ none; }}; minimal-responses no; rate-limit {{ responses-per-second 0; }};
    {options}
}};
controls {{ }};
"""


def zone(records: str, *, ns: str = "ns1 ns2", serial: int = 1, ttl: int = 60) -> str:
    """A zone's text from its records: SOA and NS are put before. Names without a dot at the end are the zone's own."""
    servers = "\n".join(f"@ NS {one}" for one in ns.split())
    return f"$TTL {ttl}\n@ SOA {ns.split()[0]} admin {serial} 3600 600 86400 60\n{servers}\n{records}\n"


class Bind:
    """`servers`: address -> zone name -> text. An address may have no zones: it refuses everything."""

    def __init__(
        self, folder: Path, servers: Mapping[str, Mapping[str, str]], *, keys: Mapping[str, str] | None = None,
        dynamic: Collection[str] = (), algorithm: str = "hmac-sha256", options: str = "", is_resolver: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.addresses = tuple(servers)
        self.port = _free_port({HOME, *self.addresses})
        self.keys = dict(keys or {})
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._relays: list[_Relay] = []
        folder.mkdir(parents=True, exist_ok=True)
        lines = [_HEAD.format(folder=folder, port=self.port, options=options, recursion="yes" if is_resolver else "no")]
        for name, secret in self.keys.items():
            lines.append(f'key "{name}" {{ algorithm {algorithm}; secret "{secret}"; }};')
        # as docs/custom-domains.md tells people to
        updaters = " ".join(f'grant "{name}" zonesub TXT;' for name in self.keys)
        for number, (address, zones) in enumerate(sorted(servers.items(), key=lambda one: one[0] == HOME)):
            clients = "any" if address == HOME else address
            lines.append(f'view "{number}" {{ match-clients {{ {clients}; }};')
            for name, text in zones.items():
                file = folder / f"{number}-{name.strip('.') or 'root'}.zone"
                file.write_text(text)
                update = f"update-policy {{ {updaters} }};" if name in dynamic and updaters else ""
                lines.append(f'zone "{name}" {{ type primary; file "{file}"; {update} }};')
            lines.append("};")
        (folder / "named.conf").write_text("\n".join(lines) + "\n")

    def at(self, address: str | None = None) -> str:
        """ "IP:PORT" of a server, the first one if not named."""
        return f"{address or self.addresses[0]}:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "named.log").read_text(errors="replace")

    def start(self) -> Bind:
        assert NAMED is not None
        with open(self.folder / "named.log", "wb") as log:
            self._process = subprocess.Popen(
                [NAMED, "-g", "-n", "1", "-c", str(self.folder / "named.conf")],
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        process = self._process
        try:
            wait_for(lambda: " running\n" in self.log or process.poll() is not None, 20, lambda: self.log[-2000:])
            assert process.poll() is None, f"named ended with {process.returncode}:\n{self.log[-3000:]}"
        except BaseException:
            self.stop()
            raise
        self._relays = [_Relay(address, self.port) for address in self.addresses if address != HOME]
        return self

    def stop(self) -> None:
        for relay in self._relays:
            relay.stop()
        self._relays = []
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def __enter__(self) -> Bind:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Relay:
    """Passes questions to named from `address`, and answers back."""

    def __init__(self, address: str, port: int) -> None:
        self._address = address
        self._home = (HOME, port)
        self._end = threading.Event()
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind((address, port))
        self._tcp = socket.create_server((address, port))
        self._inner = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._inner.bind((address, 0))
        self._inner.connect(self._home)
        for one in (self._udp, self._tcp):
            one.settimeout(0.05)
        self._inner.settimeout(2)
        self._threads = [threading.Thread(target=self._packets), threading.Thread(target=self._streams)]
        for thread in self._threads:
            thread.start()

    def _packets(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(OSError):
                question, peer = self._udp.recvfrom(65_535)
                self._inner.send(question)
                while (answer := self._inner.recv(65_535))[:2] != question[:2]:
                    pass  # of a question that was given up
                self._udp.sendto(answer, peer)

    def _streams(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(TimeoutError):
                outer, _ = self._tcp.accept()
                thread = threading.Thread(target=self._stream, args=(outer,))
                self._threads.append(thread)
                thread.start()

    def _stream(self, outer: socket.socket) -> None:
        with outer, socket.create_connection(self._home, 5, (self._address, 0)) as inner:
            while not self._end.is_set():
                for one in select.select([outer, inner], [], [], 0.05)[0]:
                    try:
                        data = one.recv(65_536)
                        if not data:
                            return
                        (inner if one is outer else outer).sendall(data)
                    except OSError:
                        return

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(10)
        for one in (self._udp, self._tcp, self._inner):
            one.close()


def _free_port(addresses: Collection[str]) -> int:
    """One that is free for TCP and UDP at all the addresses."""
    for _ in range(50):
        held: list[socket.socket] = []
        port = 0
        try:
            for address in addresses:
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    one = socket.socket(socket.AF_INET, kind)
                    held.append(one)
                    one.bind((address, port))
                    port = one.getsockname()[1]
            return port
        except OSError:
            continue
        finally:
            for one in held:
                one.close()
    raise AssertionError("no free port")
