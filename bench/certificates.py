"""10,000 stored certificates: how soon a node is ready, what a name costs that is asked for first, and memory.

`python -m bench certificates [--quick] [--count N]`. Certificates are stored as ACME's would be, by an authority made
for the run; nobody is asked for one. One worker, so that first and later handshakes meet the same process. Method and
limits: README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import socket
import ssl
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from bench.domains import APP, ORIGIN_BODY, origin
from bench.memory import settled
from bench.processes import BenchError, free_port
from bench.report import facts, facts_text, quantile, result_folder, table, write_json
from bench.wakefront import CONFIG, FLY_TOML, STATIC_APP, Wakefront
from certs import InternalCA, Seal, SealedFolder, load_or_make_secret
from certs.domain import Domain, Origin, Source, certificate_key, domain_key, held_of
from certs.store import SealedStore

READY_GOAL_S = 2.0
COLD_GOAL_MS = 5.0
MEMORY_GOAL_MB = 150.0
_PAIRS = 300
_FEW = 100

NOBODY = """issuer = "acme"
acme_directory = "https://127.0.0.1:9/nobody"
acme_email = "bench@example.net"
check_dns = false
"""


@dataclass(slots=True)
class Run:
    """A node with so many certificates. Seconds, milliseconds and KiB, as the names say."""

    count: int
    ready_s: float = 0.0  # from `wakefront serve` to the first answer under the last name, the certificate file there
    ready_without_file_s: float = 0.0  # the same, when that has to be written first
    cold_ms: list[float] = field(default_factory=list)  # first handshakes, each of another name
    warm_ms: list[float] = field(default_factory=list)  # second ones
    worker_kib: dict[str, int] = field(default_factory=dict)  # proportional, by how many names were asked for
    control_kib: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=0, help="certificates (default 10,000; 500 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a try: few certificates, kept where git ignores it")


def run(arguments: argparse.Namespace) -> int:
    count = arguments.count or (500 if arguments.quick else 10_000)
    known = facts(["python", "-m", "bench", "certificates", *arguments.given])
    out = result_folder("certificates", arguments.quick)
    empty, full = _measure(0), _measure(count)
    write_json(out / "results.json", {**known, "runs": [asdict(empty), asdict(full)]})
    text, held = _text(empty, full)
    text = "# Stored certificates\n\n" + facts_text(known) + text
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0 if held else 1


def _name(number: int) -> str:
    return f"shop.customer-{number:05}.example"


def _measure(count: int) -> Run:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wakefront-bench-")))
        trust = _store(folder / "data", count)
        machine, plain, tls, admin = stack.enter_context(origin()), free_port(), free_port(), free_port()
        text = CONFIG.format(
            folder=folder, workers=1, plain_port=plain, tls_port=tls, admin_port=admin, access_log=""
        ).replace('issuer = "internal"\n', NOBODY)  # fmt: skip
        (folder / f"{APP}.fly.toml").write_text(FLY_TOML.format(name=APP, autostop="off"))
        text += STATIC_APP.format(folder=folder, name=APP, origin_port=machine)
        found = Run(count)
        for attempt in ("without", "with"):
            began = time.perf_counter()
            with Wakefront(folder, text, None, (plain, tls, admin)) as node:
                if count:
                    _first_answer(count - 1, tls, trust)
                ready_s = time.perf_counter() - began
                if attempt == "without":
                    found.ready_without_file_s = ready_s
                    _await_file(folder / "data" / "run" / "certificates", count)
                    continue
                found.ready_s = ready_s
                (worker,) = node.family.workers
                found.worker_kib["0"] = settled(worker)["pss"]
                if count:
                    _touch(found, worker, tls, trust)
                found.control_kib = settled(node.family.control)["pss"]
        shutil.rmtree(folder / "data", ignore_errors=True)
        return found


def _store(data_dir: Path, count: int) -> ssl.SSLContext:
    """What a node would have in its store after these names were added and issued."""
    secret = load_or_make_secret(data_dir / "secret.key")
    authority = InternalCA(SealedFolder(data_dir / "bench-ca", Seal(secret)), data_dir / "bench-ca.pem", time.time)
    root = authority.open()
    store = SealedStore(data_dir / "certs" / "store.db", secret, time.time)
    store._db.execute("PRAGMA synchronous=OFF")  # nobody waits for this disk
    now = time.time()
    for number in range(count):
        name = _name(number)
        leaf = authority.issue(name)
        chained = type(leaf)(name, leaf.chain_pem + root.chain_pem, leaf.key_pem)
        held = msgspec.structs.replace(held_of(leaf, "ecdsa", now), renew_at=now + 60 * 86_400)
        domain = Domain(name, APP, Origin.ADDED, now, now, held={Source.ACME: held})
        store.put(certificate_key(name, Source.ACME), chained.to_pem())
        store.put(domain_key(name), msgspec.json.encode(domain))
    store.close()
    return ssl.create_default_context(cadata=root.chain_pem.decode())


def _await_file(path: Path, count: int) -> None:
    """Until control has written all records into the workers' file, so that the next start finds them there."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        size = path.stat().st_size if path.exists() else 0
        if size != last:
            last, since = size, time.monotonic()
        time.sleep(0.05)


def _touch(found: Run, worker: int, port: int, trust: ssl.SSLContext) -> None:
    numbers = list(range(found.count))
    random.Random(7).shuffle(numbers)
    pairs = numbers[: min(_PAIRS, found.count // 2)]
    for place, number in enumerate(pairs):
        found.cold_ms.append(_handshake_ms(number, port, trust))
        found.warm_ms.append(_handshake_ms(number, port, trust))
        if place + 1 == _FEW:
            found.worker_kib[str(_FEW)] = settled(worker)["pss"]
    for number in numbers[len(pairs) :]:
        _handshake_ms(number, port, trust)
    found.worker_kib[str(found.count)] = settled(worker)["pss"]


def _handshake_ms(number: int, port: int, trust: ssl.SSLContext) -> float:
    """From the ClientHello to the end of the handshake, on a new connection and a new session."""
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        began = time.perf_counter()
        with trust.wrap_socket(plain, server_hostname=_name(number)):
            return (time.perf_counter() - began) * 1e3


def _first_answer(number: int, port: int, trust: ssl.SSLContext) -> None:
    name, end = _name(number), time.monotonic() + 60
    last = "nothing"
    while time.monotonic() < end:
        try:
            with (
                socket.create_connection(("127.0.0.1", port), 10) as plain,
                trust.wrap_socket(plain, server_hostname=name) as connection,
            ):
                connection.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
                answer = b""
                while more := connection.recv(65_536):
                    answer += more
                if answer.endswith(ORIGIN_BODY):
                    return
                last = repr(answer[:80])
        except OSError as error:
            last = str(error)
        time.sleep(0.01)
    raise BenchError(f"{name} gave no trusted answer within 60 s: {last}")


def _text(empty: Run, full: Run) -> tuple[str, bool]:
    extra = [cold - warm for cold, warm in zip(full.cold_ms, full.warm_ms, strict=True)]
    few = str(_FEW) if str(_FEW) in full.worker_kib else str(full.count)
    more_mb = (full.worker_kib[str(full.count)] - empty.worker_kib["0"]) / 1024
    median_ms = quantile(full.cold_ms, 0.5) - quantile(full.warm_ms, 0.5)
    rows = [
        ["serve to the first answer, s", f"{full.ready_s:.2f}", f"{empty.ready_s:.2f} with none stored", "2"],
        ["the same, the workers' file lost, s", f"{full.ready_without_file_s:.2f}", "", ""],
        ["first handshake of a name, p50 / p99 ms", f"{quantile(full.cold_ms, 0.5):.2f} / "
         f"{quantile(full.cold_ms, 0.99):.2f}", f"later: {quantile(full.warm_ms, 0.5):.2f} / "
         f"{quantile(full.warm_ms, 0.99):.2f}", ""],
        ["more than a later one, p50 / p99 of pairs, ms", f"{quantile(extra, 0.5):.2f} / {quantile(extra, 0.99):.2f}",
         "", "5"],
        ["worker at rest, MB", f"{full.worker_kib['0'] / 1024:.1f}", f"{empty.worker_kib['0'] / 1024:.1f} with none",
         ""],
        [f"worker after {few} names, MB", f"{full.worker_kib[few] / 1024:.1f}", "", ""],
        [f"worker after {full.count:,} names, MB", f"{full.worker_kib[str(full.count)] / 1024:.1f}",
         f"{more_mb:+.1f} to none stored", "150 more"],
        ["control, MB", f"{full.control_kib / 1024:.1f}", f"{empty.control_kib / 1024:.1f} with none stored", ""],
    ]  # fmt: skip
    held = full.ready_s <= READY_GOAL_S and median_ms <= COLD_GOAL_MS and more_mb <= MEMORY_GOAL_MB
    return f"\n{full.count:,} certificates, one worker.\n\n" + table(["", "", "beside", "must"], rows) + "\n", held
