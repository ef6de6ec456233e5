"""One load straight to an origin and through each proxy: processor time per request, requests/s, latency.

`python -m bench load [--quick] [--only CASE,...] [--proxies NAME,...]`. Method and limits: README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import shutil
import ssl
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import wakefront
from bench.certificate import make_certificate
from bench.origin import BODIES, UPLOAD_ANSWER_BYTES, Origin
from bench.peers import HOST, PEERS, Place, Running
from bench.processes import BenchError, busy_s, compile_program, cores, cpu_by_pid, descendants, free_port, stop
from bench.report import facts, facts_text, median, result_folder, spread, table, write_json

UPLOAD_BYTES = 65536

# What a browser sends; with Host these are ten fields.
FIELDS = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "Accept-Language": "en-GB,en;q=0.7,nl;q=0.3",
    "Accept-Encoding": "gzip, deflate, br",
    "Referer": f"https://{HOST}/products/overview",
    "Cookie": "session=0123456789abcdef0123456789abcdef; theme=dark",
    "Cache-Control": "no-cache",
    "DNT": "1",
    "Sec-Fetch-Mode": "navigate",
}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    text: str
    path: str
    tls: bool = False
    upload: bool = False
    handshakes: bool = False
    resumes: bool = False  # each connection with a ticket that an earlier one was given
    unlike: bool = False  # no two heads are the same, of requests or of answers
    connections: int = 32

    @property
    def body_bytes(self) -> int:
        return UPLOAD_ANSWER_BYTES if self.upload else BODIES[self.path]


CASES = (
    Case("get", "10-header GET, 100 B, keep-alive", "/small"),
    Case("get-tls", "10-header GET, 100 B, keep-alive, TLS", "/small", tls=True),
    Case(
        "unlike", "the same, no two heads alike (an id in each request, an ETag in each answer)", "/fresh", unlike=True
    ),
    Case("unlike-tls", "no two heads alike, TLS", "/fresh", tls=True, unlike=True),
    Case("new-tls", "GET, a new TLS connection (full handshake) each", "/small", tls=True, handshakes=True),
    Case(
        "resumed-tls",
        "GET, a new TLS connection (resumed by ticket) each",
        "/small",
        tls=True,
        handshakes=True,
        resumes=True,
    ),
    Case("1k", "1 KiB down", "/1k"),
    Case("1k-tls", "1 KiB down, TLS", "/1k", tls=True),
    Case("100k", "100 KiB down", "/100k"),
    Case("100k-tls", "100 KiB down, TLS", "/100k", tls=True),
    Case("10m", "10 MB down", "/10m", connections=8),
    Case("10m-tls", "10 MB down, TLS", "/10m", tls=True, connections=8),
    Case("up64k", "64 KiB up", "/upload", upload=True),
    Case("up64k-tls", "64 KiB up, TLS", "/upload", upload=True, tls=True),
)

# (case, peer, most that our processor time per request may be of the peer's)
GOALS = (
    ("get", "envoy", 0.65),
    ("get", "nginx", 1.5),
    ("get-tls", "nginx", 1.5),
    ("unlike", "nginx", 1.5),
    ("unlike-tls", "nginx", 1.5),
    ("new-tls", "nginx", 1.25),
    ("resumed-tls", "nginx", 1.25),
    ("10m", "haproxy", 0.9),
    ("10m-tls", "haproxy", 1.1),
)


@dataclass(slots=True)
class Sample:
    """One run of one load against one proxy. Times in µs; `errors` says why a run is invalid."""

    case: str
    proxy: str
    round: int
    requests: int
    seconds: float
    per_s: float
    cpu_us: float  # all processes of the proxy
    cpu_us_by_role: dict[str, float]
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    origin_cpu_share: float
    load_cpu_share: float
    other_cpu_share: float  # cores busy with anything else meanwhile
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return self.requests > 0 and not any(self.errors.values())


@dataclass(slots=True)
class Subject:
    """What is measured: a running proxy, or the origin itself (`running` is None)."""

    name: str
    plain_port: int
    tls_port: int
    running: Running | None = None
    requests: int = 0

    def roles(self) -> dict[str, list[int]]:
        """The proxy's processes by what they do, read anew for each sample."""
        if self.running is None:
            return {}
        pid = self.running.process.pid
        if self.name != "wakefront":
            return {"all": descendants(pid)}
        family = wakefront.family(pid)
        return {"workers": list(family.workers), "control": [family.control], "supervisor": [family.supervisor]}


class Loader:
    """wrk, and our own client for full handshakes, on the load core."""

    def __init__(self, folder: Path, core: int, raw: Path) -> None:
        wrk = shutil.which("wrk")
        if wrk is None:
            raise BenchError("wrk is not installed: apt-get install wrk")
        self.version = subprocess.run([wrk, "-v"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
        self._wrk, self._core, self._folder, self._raw = wrk, core, folder, raw
        self._handshakes = compile_program("handshakes", folder, "-lssl", "-lcrypto")
        for case in CASES:
            (folder / f"{case.name}.lua").write_text(_lua(case))

    def command(self, case: Case, port: int, seconds: float) -> list[str]:
        pinned = ["taskset", "-c", str(self._core)]
        if case.handshakes:
            arguments = ["127.0.0.1", port, HOST, case.path, case.body_bytes, case.connections, seconds]
            arguments.append(int(case.resumes))
            return [*pinned, str(self._handshakes), *map(str, arguments)]
        scheme = "https" if case.tls else "http"
        script, url = str(self._folder / f"{case.name}.lua"), f"{scheme}://{HOST}:{port}{case.path}"
        duration = f"{max(1, round(seconds))}s"
        return [
            *pinned,
            self._wrk,
            "-t1",
            f"-c{case.connections}",
            f"-d{duration}",
            "--timeout",
            "10s",
            "-s",
            script,
            url,
        ]

    def run(self, case: Case, port: int, seconds: float, note: str) -> dict[str, Any]:
        """Runs one load; the answer has requests, bytes, seconds, latency quantiles and errors (Any: from JSON)."""
        command = self.command(case, port, seconds)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 60)
        with self._raw.open("a") as raw:
            raw.write(f"### {note}\n$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
        last = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not last:
            raise BenchError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return dict(json.loads(last[-1]))


_NUMBERED = """local number = 0
function request()
  number = number + 1
  wrk.headers["X-Request-Id"] = string.format("%016x", number)
  return wrk.format()
end
"""


def _lua(case: Case) -> str:
    """wrk's script: connects to 127.0.0.1 whatever the URL's host (kept for SNI and Host), prints JSON at the end."""
    fields = "".join(f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}\n" for name, value in FIELDS.items())
    upload = f'wrk.method = "POST"\nwrk.body = string.rep("u", {UPLOAD_BYTES})\n' if case.upload else ""
    return (
        f"""wrk.headers["Host"] = "{HOST}"
{fields}{upload}{_NUMBERED if case.unlike else ""}function wrk.resolve(host, service)
  wrk.addrs = {{ wrk.lookup("127.0.0.1", service)[1] }}
end
"""
        + """function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('{"requests": %d, "bytes": %.0f, "seconds": %.6f, "p50_us": %.0f, "p90_us": %.0f, ' ..
    '"p99_us": %.0f, "p999_us": %.0f, "errors": ' ..
    '{"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\\n',
    summary.requests, summary.bytes, summary.duration / 1e6, latency:percentile(50), latency:percentile(90),
    latency:percentile(99), latency:percentile(99.9), e.connect, e.read, e.write, e.status, e.timeout))
end
"""
    )


def verify(subject: Subject, origin: Origin, limit_s: float = 15.0) -> dict[str, Any]:
    """Every path over both schemes, what the origin is told, upstream reuse; returns what is worth recording."""
    found: dict[str, Any] = {}
    for tls in (False, True):
        _until_routed(subject, tls, limit_s)
        for path, size in BODIES.items():
            body = _ask(subject, tls, path)[1]
            expected = (b"abcdefghijklmnopqrstuvwxyz012345" * (size // 32 + 1))[:size]
            if hashlib.sha256(body).digest() != hashlib.sha256(expected).digest():
                raise BenchError(f"{subject.name}: {path} came with another body ({len(body)} bytes, {size} expected)")
        answer = _ask(subject, tls, "/upload", b"u" * UPLOAD_BYTES)[1]
        if answer != b"%010d" % UPLOAD_BYTES:
            raise BenchError(f"{subject.name}: the origin received {answer!r} of {UPLOAD_BYTES} bytes")
        found["tls_told" if tls else "plain_told"] = _told(subject, tls)
    before = origin.stats()["connections"]
    connection = http.client.HTTPConnection("127.0.0.1", subject.plain_port, timeout=10)
    for _ in range(50):
        connection.request("GET", "/small", headers={"Host": HOST, **FIELDS})
        connection.getresponse().read()
    connection.close()
    found["upstream_connections_for_50_requests"] = origin.stats()["connections"] - before - 1
    if found["upstream_connections_for_50_requests"] > 5:
        raise BenchError(f"{subject.name} does not reuse upstream connections: {found}")
    return found


def _until_routed(subject: Subject, tls: bool, limit_s: float) -> None:
    """Some proxies listen before they have their routes or certificates."""
    end = time.monotonic() + limit_s
    while True:
        try:
            status, _, _ = _ask(subject, tls, "/small", check=False)
            if status == 200:
                return
            seen = f"status {status}"
        except OSError as error:
            seen = repr(error)
        if time.monotonic() > end:
            said = subject.running.output() if subject.running else ""
            raise BenchError(f"{subject.name}: no good answer over {'TLS' if tls else 'plain HTTP'}: {seen}\n{said}")
        time.sleep(0.1)


def _ask(
    subject: Subject, tls: bool, path: str, body: bytes | None = None, check: bool = True
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", subject.plain_port, timeout=10)
    about: dict[str, str] = {}
    if tls:
        raw = http.client.HTTPConnection("127.0.0.1", subject.tls_port, timeout=10)
        raw.connect()
        context = ssl._create_unverified_context(ssl.PROTOCOL_TLS_CLIENT)
        secured = context.wrap_socket(raw.sock, server_hostname=HOST)
        raw.sock = secured
        cipher = secured.cipher()
        about = {"version": secured.version() or "", "cipher": cipher[0] if cipher else ""}
        connection = raw
    try:
        connection.request("POST" if body is not None else "GET", path, body=body, headers={"Host": HOST, **FIELDS})
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if check and answer.status != 200:
        raise BenchError(f"{subject.name}: {path} answered {answer.status}: {content[:200]!r}")
    return answer.status, content, about


def _told(subject: Subject, tls: bool) -> dict[str, str]:
    """What the origin is told by the proxy; a field that should be there and is not ends the benchmark."""
    _, head, about = _ask(subject, tls, "/head")
    lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    fields = {name.strip().lower(): value.strip() for name, _, value in lines if name.strip()}
    if tls and about["version"] != "TLSv1.3":
        raise BenchError(f"{subject.name}: negotiated {about['version']}, not TLSv1.3")
    wanted = {"host": HOST, "x-forwarded-proto": "https" if tls else "http"}
    for name, value in wanted.items():
        if fields.get(name) != value:
            raise BenchError(f"{subject.name}: the origin saw {name}: {fields.get(name)!r}, expected {value!r}")
    identity = ["x-forwarded-for", "via"]
    identity += (
        [] if subject.name == "traefik" else ["fly-request-id" if subject.name == "wakefront" else "x-request-id"]
    )
    missing = [name for name in identity if not fields.get(name)]
    if missing:
        raise BenchError(f"{subject.name}: the origin saw no {', '.join(missing)}: {sorted(fields)}")
    return {**{name: fields[name] for name in [*wanted, *identity]}, **about, "field_count": str(len(fields))}


def measure(loader: Loader, origin: Origin, subject: Subject, case: Case, round_: int, seconds: float) -> Sample:
    """Warm up, then one measured window: processor time of the proxy read just before and just after the load."""
    port = subject.tls_port if case.tls else subject.plain_port
    note = f"round {round_} {case.name} {subject.name}"
    warm = loader.run(case, port, 1.0, f"{note} (warm-up)")
    roles = subject.roles()
    pids = [pid for group in roles.values() for pid in group]
    cpu, origin_cpu, busy, load = cpu_by_pid(pids), cpu_by_pid([origin.process.pid]), busy_s(), _children_cpu_s()
    began = time.monotonic()
    got = loader.run(case, port, seconds, note)
    window = time.monotonic() - began
    after, origin_after = cpu_by_pid(pids), cpu_by_pid([origin.process.pid])
    used = {pid: after[pid] - cpu[pid] for pid in pids}
    origin_used = origin_after[origin.process.pid] - origin_cpu[origin.process.pid]
    load_used = _children_cpu_s() - load
    other = busy_s() - busy - sum(used.values()) - origin_used - load_used
    requests = int(got["requests"])
    subject.requests += requests + int(warm["requests"])
    # Answers under way when the load ends were worked for too: with few large ones that counts, so by bytes.
    worth = got["bytes"] / (case.body_bytes + 200) if case.body_bytes >= 1_000_000 else requests
    errors = dict(got["errors"]) if isinstance(got["errors"], dict) else {"failed": got["errors"]}
    if case.resumes:
        # the first connection of each client has no ticket
        errors["full handshakes"] = max(0, requests - int(got["resumed"]) - case.connections)
    elif case.handshakes:
        errors["resumed"] = int(got["resumed"])
    return Sample(
        case.name,
        subject.name,
        round_,
        requests,
        got["seconds"],
        worth / got["seconds"],
        sum(used.values()) / max(worth, 1) * 1e6,
        {role: sum(used[pid] for pid in group) / max(worth, 1) * 1e6 for role, group in roles.items()},
        got["p50_us"],
        got["p90_us"],
        got["p99_us"],
        got["p999_us"],
        origin_used / window,
        load_used / window,
        max(0.0, other) / window,
        errors,
    )


def _children_cpu_s() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def start(names: list[str], folder: Path, origin: Origin, core: int) -> tuple[list[Subject], dict[str, str]]:
    """Starts all proxies; returns those that run, and why others do not."""
    certificate = make_certificate(HOST, folder)
    subjects, missing = [Subject("direct", origin.port, 0)] if "direct" in names else [], {}
    for name in names:
        if name == "direct":
            continue
        place = Place(folder / name, free_port(), free_port(), origin.port, certificate, core)
        place.folder.mkdir()
        try:
            made = wakefront.recipe(place) if name == "wakefront" else PEERS[name](place)
            if made is None:
                missing[name] = "not installed: pip install -e .[bench]"
                continue
            running = Running(made, place)
        except BenchError as error:
            if name in ("nginx", "haproxy", "wakefront"):
                _stop_all(subjects)
                raise
            missing[name] = str(error)
            continue
        subjects.append(Subject(name, place.plain_port, place.tls_port, running))
    return subjects, missing


def _stop_all(subjects: list[Subject]) -> None:
    for subject in subjects:
        if subject.running is not None:
            stop(subject.running.process)


def count_lines(subject: Subject) -> int:
    """Lines of the access log, after a moment for those who buffer."""
    if subject.running is None:
        return 0
    with subject.running.recipe.access_log.open("rb") as lines:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(1 << 20), b""))


def run(arguments: argparse.Namespace) -> int:
    names = arguments.proxies.split(",")
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only.split(",")]
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or (2 if arguments.quick else 4)
    out = result_folder("load", arguments.quick)
    known = facts(["python", "-m", "bench", "load", *arguments.given])
    proxy_core, load_core = cores()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="wakefront-bench-") as temporary:
        folder = Path(temporary)
        origin = Origin(folder / "origin", load_core)
        subjects: list[Subject] = []
        try:
            loader = Loader(folder, load_core, out / "raw.txt")
            subjects, missing = start(names, folder, origin, proxy_core)
            seen = {one.name: verify(one, origin) for one in subjects if one.running is not None}
            for round_ in range(rounds):
                for case in cases:
                    turn = subjects[round_ % len(subjects) :] + subjects[: round_ % len(subjects)]
                    for subject in turn:
                        if case.tls and subject.running is None:
                            continue
                        sample = measure(loader, origin, subject, case, round_, seconds)
                        samples.append(sample)
                        _say(sample)
            time.sleep(2)  # those who buffer their access log flush it
            logged = {
                one.name: {"requests": one.requests, "lines": count_lines(one)} for one in subjects if one.running
            }
        finally:
            _stop_all(subjects)
            stop(origin.process)
        setup = {
            "rounds": rounds,
            "seconds": seconds,
            "core_of_proxy": proxy_core,
            "core_of_load_and_origin": load_core,
            "origin": origin.kind,
            "load": [loader.version, "bench/programs/handshakes.c"],
            "missing": missing,
            "proxies": _describe(subjects, out),
            "verified": seen,
            "access_log": logged,
        }
    write_json(out / "results.json", {**known, **setup, "samples": [asdict(sample) for sample in samples]})
    text = "# Load\n\n" + facts_text(known) + _text(setup, cases, samples)
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0 if all(sample.valid for sample in samples) else 1


def _describe(subjects: list[Subject], out: Path) -> dict[str, dict[str, str]]:
    """Versions, commands and log forms; the configurations are copied beside the results."""
    described = {}
    for subject in subjects:
        if subject.running is None:
            continue
        recipe = subject.running.recipe
        kept = out / "configurations" / subject.name
        kept.mkdir(parents=True)
        for file in recipe.configuration:
            shutil.copy(file, kept / file.name)
        described[subject.name] = {
            "version": recipe.version,
            "command": " ".join(recipe.command),
            "access_log": recipe.access_log_form,
            "remarks": recipe.remarks,
            **{f"env_{name}": value for name, value in recipe.env.items() if name == "GOMAXPROCS"},
        }
    return described


def _say(sample: Sample) -> None:
    bad = "" if sample.valid else f"  INVALID {sample.errors}"
    print(
        f"{sample.round} {sample.case:10} {sample.proxy:10} {sample.per_s:9.0f}/s  {sample.cpu_us:9.1f} µs  "
        f"p50 {sample.p50_us:.0f} p99 {sample.p99_us:.0f}  other {sample.other_cpu_share:.2f}{bad}",
        flush=True,
    )


def _text(setup: dict[str, Any], cases: list[Case], samples: list[Sample]) -> str:
    lines = [
        f"\n{setup['rounds']} interleaved rounds of {setup['seconds']} s; median (lowest–highest). Proxies on core "
        f"{setup['core_of_proxy']}, load and origin on core {setup['core_of_load_and_origin']}. "
        f"Origin: {setup['origin']}.\n"
    ]
    for name, why in setup["missing"].items():
        lines.append(f"\n**{name} is missing**: {why}\n")
    invalid = [sample for sample in samples if not sample.valid]
    for sample in invalid:
        lines.append(
            f"\n**Invalid run, left out**: {sample.case} {sample.proxy} round {sample.round}: {sample.errors}\n"
        )
    lines.append("\n" + table(["proxy", "version", "access log", "lines / requests"], _proxy_rows(setup)))
    by: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        if sample.valid:
            by.setdefault((sample.case, sample.proxy), []).append(sample)
    for case in cases:
        lines.append(f"\n## {case.text} (`{case.name}`, {case.connections} connections)\n\n" + _case_table(case, by))
    lines.append("\n## Goals\n\n" + _goals(by))
    other = [sample.other_cpu_share for sample in samples]
    if other:
        lines.append(
            f"\nCores busy with anything else during the runs: median {median(other):.2f}, highest {max(other):.2f}.\n"
        )
    return "".join(lines)


def _proxy_rows(setup: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, about in setup["proxies"].items():
        logged = setup["access_log"][name]
        remark = f"; {about['remarks']}" if about["remarks"] else ""
        rows.append([name, about["version"], about["access_log"] + remark, f"{logged['lines']} / {logged['requests']}"])
    return rows


def _case_table(case: Case, by: dict[tuple[str, str], list[Sample]]) -> str:
    base = {
        peer: median(one.cpu_us for one in by[case.name, peer])
        for peer in ("nginx", "haproxy", "envoy")
        if (case.name, peer) in by
    }
    rows = []
    for (name, proxy), group in sorted(by.items(), key=lambda item: median(one.cpu_us for one in item[1])):
        if name != case.name:
            continue
        cpu = [one.cpu_us for one in group]
        ratios = [
            f"{median(cpu) / base[peer]:.2f}" if peer in base and proxy != "direct" else "–"
            for peer in ("nginx", "haproxy", "envoy")
        ]
        beside = ""
        if proxy == "wakefront":
            roles = {role: median(one.cpu_us_by_role[role] for one in group) for role in group[0].cpu_us_by_role}
            beside = " = " + " + ".join(f"{role} {value:.1f}" for role, value in roles.items())
        rows.append(
            [
                proxy,
                (spread(cpu) if proxy != "direct" else "–") + beside,
                *ratios,
                spread([one.per_s for one in group], 0),
                spread([one.p50_us / 1000 for one in group], 2),
                spread([one.p99_us / 1000 for one in group], 2),
            ]
        )
    return table(
        ["proxy", "CPU µs a request", "÷ nginx", "÷ HAProxy", "÷ Envoy", "requests/s", "p50 ms", "p99 ms"], rows
    )


def _goals(by: dict[tuple[str, str], list[Sample]]) -> str:
    rows = []
    for case, peer, most in GOALS:
        ours, theirs = by.get((case, "wakefront")), by.get((case, peer))
        if not ours or not theirs:
            rows.append([f"{case} ÷ {peer}", f"≤ {most:g}", "not measured", "–"])
            continue
        ratio = median(one.cpu_us for one in ours) / median(one.cpu_us for one in theirs)
        rows.append([f"{case} ÷ {peer}", f"≤ {most:g}", f"{ratio:.2f}", "yes" if ratio <= most else "**no**"])
    return table(["CPU a request", "goal", "measured", "met"], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one round of 2 s: for a look, not for the record")
    parser.add_argument("--only", default="", help="cases, comma-separated: " + ",".join(case.name for case in CASES))
    parser.add_argument("--proxies", default="direct,nginx,haproxy,wakefront,envoy,traefik,caddy")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=0)
