"""Custom domains: 1,000 added in a row, and how long from adding one to the first answer that a client trusts.

`python -m bench domains [--quick] [--count N] [--only internal,pebble]`. With the node's own CA, and with Pebble as
an ACME CA (Debian's package of that name), strict. Every name is asked for over TLS at the end, with the CA as the
only root. Method and limits: README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import shutil
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.processes import BenchError, cpu_s, free_port
from bench.report import facts, facts_text, quantile, result_folder, table, write_json
from bench.wakefront import CONFIG, FLY_TOML, STATIC_APP, Wakefront
from proxy.cli.client import ca_pem
from proxy.cli.node import Api, ApiError, find_node
from proxy.cli.pebble import is_installed, pebble

APP = "shop"
ORIGIN_BODY = b"hello from the shop\n"
GOAL_S = 3.0  # from adding a name to the first trusted answer
_TRY_S = 0.02  # between two handshakes of a client that waits for the certificate
_ONE_LIMIT_S = 30.0

ACME = """acme_directory = "{directory}"
acme_ca_file = "{ca_file}"
acme_email = "bench@example.net"
addresses = ["127.0.0.1"]
dns_servers = ["{dns}"]
"""


@dataclass(slots=True)
class Run:
    """One issuer. Times in seconds."""

    issuer: str
    count: int
    add_s: list[float] = field(default_factory=list)  # each call
    all_added_s: float = 0.0
    all_issued_s: float = 0.0  # since the first call
    answered: int = 0  # names that gave a trusted answer at the end
    untrusted: list[str] = field(default_factory=list)  # and some that did not, with the reason
    control_cpu_s: float = 0.0
    first_answer_s: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=0, help="names added in a row (default 1,000; 50 with --quick)")
    parser.add_argument("--firsts", type=int, default=0, help="names timed to their first trusted answer (default 20)")
    parser.add_argument("--only", default="", help="internal, pebble; default both")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which names must have been issued")
    parser.add_argument("--quick", action="store_true", help="a try: few names, kept where git ignores it")


def run(arguments: argparse.Namespace) -> int:
    count = arguments.count or (50 if arguments.quick else 1000)
    firsts = arguments.firsts or (5 if arguments.quick else 20)
    wanted = arguments.only.split(",") if arguments.only else ["internal", "pebble"]
    if "pebble" in wanted and not is_installed():
        if arguments.only:
            raise BenchError("Pebble is not installed: apt-get install pebble")
        wanted.remove("pebble")
    known = facts(["python", "-m", "bench", "domains", *arguments.given])
    out = result_folder("domains", arguments.quick)
    runs = [_measure(issuer, count, firsts, arguments.limit, out) for issuer in wanted]
    write_json(out / "results.json", {**known, "runs": [asdict(one) for one in runs]})
    text = "# Domains\n\n" + facts_text(known) + _text(runs, "pebble" in wanted)
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0 if all(one.answered == one.count and max(one.first_answer_s) <= GOAL_S for one in runs) else 1


def _measure(issuer: str, count: int, firsts: int, limit_s: float, out: Path) -> Run:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wakefront-bench-")))
        machine, plain, tls, admin = stack.enter_context(origin()), free_port(), free_port(), free_port()
        text = CONFIG.format(
            folder=folder, workers=1, plain_port=plain, tls_port=tls, admin_port=admin, access_log=""
        )  # fmt: skip
        roots = ""
        if issuer == "pebble":
            authority = stack.enter_context(pebble(folder / "pebble", plain, tls))
            more = ACME.format(directory=authority.directory_url, ca_file=authority.ca_file, dns=authority.dns)
            text = text.replace('issuer = "internal"\n', f'issuer = "acme"\n{more}')
            roots = authority.roots().decode()
        (folder / f"{APP}.fly.toml").write_text(FLY_TOML.format(name=APP, autostop="off"))
        text += STATIC_APP.format(folder=folder, name=APP, origin_port=machine)
        node = stack.enter_context(Wakefront(folder, text, None, (plain, tls, admin)))
        shutil.copy(node.config, out / f"{issuer}.config.toml")
        api = Api(find_node(node.config, None))
        _await_ready(api)
        trust = ssl.create_default_context(cadata=roots or ca_pem(api))
        found = Run(issuer, count)
        found.first_answer_s = [_first_answer(api, f"f{one:03}.example.com", tls, trust) for one in range(firsts)]
        _add_all(api, found, node.family.control, limit_s)
        _ask_all(found, tls, trust)
        return found


def _await_ready(api: Api) -> None:
    """Until names can be added: the node takes certificates up a moment after it listens."""
    end = time.monotonic() + 20
    while True:
        try:
            _add(api, "ready.example.com")
            return
        except ApiError as error:
            if error.status != 503 or time.monotonic() > end:
                raise BenchError(str(error)) from error
        time.sleep(0.05)


def _name(number: int) -> str:
    """A domain of its own each, as customers have them: a CA counts by registered domain."""
    return f"shop.customer-{number:05}.example"


def _add(api: Api, name: str) -> None:
    api.post(f"/v1/apps/{APP}/certificates/acme", {"hostname": name})


def _first_answer(api: Api, name: str, port: int, trust: ssl.SSLContext) -> float:
    """From before the name is added to the first byte of an answer over a connection that the client trusts."""
    began = time.perf_counter()
    _add(api, name)
    last = ""
    while time.perf_counter() - began < _ONE_LIMIT_S:
        last = _ask(name, port, trust)
        if not last:
            return time.perf_counter() - began
        time.sleep(_TRY_S)
    raise BenchError(f"{name} gave no trusted answer within {_ONE_LIMIT_S:g} s: {last}")


def _add_all(api: Api, found: Run, control: int, limit_s: float) -> None:
    cpu_before, began = cpu_s(control), time.perf_counter()
    for number in range(found.count):
        at = time.perf_counter()
        _add(api, _name(number))
        found.add_s.append(time.perf_counter() - at)
    found.all_added_s = time.perf_counter() - began
    while (left := _not_issued(api)) > 0:
        if time.perf_counter() - began > limit_s:
            raise BenchError(f"{left} of {found.count} names have no certificate after {limit_s:g} s")
        time.sleep(0.1)
    found.all_issued_s = time.perf_counter() - began
    found.control_cpu_s = cpu_s(control) - cpu_before


def _not_issued(api: Api) -> int:
    page = api.get("/v1/certificates", {"filter": "shop.customer-", "limit": 1}, timeout_s=30.0)
    return int(page["total_count"]) - int(page["counts"]["issued"])


def _ask_all(found: Run, port: int, trust: ssl.SSLContext) -> None:
    for number in range(found.count):
        if wrong := _ask(_name(number), port, trust):
            found.untrusted.append(f"{_name(number)}: {wrong}")
        else:
            found.answered += 1
    del found.untrusted[20:]


def _ask(name: str, port: int, trust: ssl.SSLContext) -> str:
    """A request as a browser makes it; why it gave no trusted answer, "" if it did."""
    request = f"GET / HTTP/1.1\r\nHost: {name}\r\nUser-Agent: bench\r\nConnection: close\r\n\r\n".encode()
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            trust.wrap_socket(plain, server_hostname=name) as connection,
        ):
            connection.sendall(request)
            answer = b""
            while more := connection.recv(65536):
                answer += more
    except OSError as error:  # ssl.SSLError is one
        return str(error)
    return "" if answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(ORIGIN_BODY) else repr(answer[:100])


@contextlib.contextmanager
def origin() -> Iterator[int]:
    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(ORIGIN_BODY)))
            self.end_headers()
            self.wfile.write(ORIGIN_BODY)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    thread = threading.Thread(target=server.serve_forever, name="origin")
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def _text(runs: list[Run], with_pebble: bool) -> str:
    rows = [
        [
            one.issuer, f"{one.count:,}",
            f"{quantile(one.add_s, 0.5) * 1e3:.1f}", f"{quantile(one.add_s, 0.99) * 1e3:.1f}",
            f"{one.all_added_s:.1f}", f"{one.all_issued_s:.1f}", f"{one.answered:,}",
            f"{one.control_cpu_s / one.count * 1e3:.1f}",
        ]
        for one in runs
    ]  # fmt: skip
    firsts = [
        [one.issuer, str(len(one.first_answer_s)), *(f"{quantile(one.first_answer_s, q):.2f}" for q in (0.5, 0.9, 1.0))]
        for one in runs
    ]
    wrong = "\n".join(f"- {line}" for one in runs for line in one.untrusted)
    return (
        "\n## Added in a row\n\n"
        + table(
            [
                "issuer",
                "names",
                "a call p50 ms",
                "p99 ms",
                "all added s",
                "all issued s",
                "trusted answers",
                "control's CPU ms a name",
            ],
            rows,
        )
        + (f"\nNo trusted answer:\n\n{wrong}\n" if wrong else "")
        + f"\n## From adding to the first trusted answer, s (goal: {GOAL_S:g})\n\n"
        + table(["issuer", "names", "p50", "p90", "max"], firsts)
        + ("" if with_pebble else "\nPebble is not installed here: apt-get install pebble.\n")
    )
