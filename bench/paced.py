"""Response times at one fixed rate for all proxies: half of what we take at most.

`python -m bench paced [--quick] [--rate N] [--proxies NAME,...]`. Method and limits: README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.load import CASES, FIELDS, Loader, Subject, start, verify
from bench.origin import BODIES, Origin
from bench.peers import HOST
from bench.processes import BenchError, compile_program, cores, stop
from bench.report import facts, facts_text, median, result_folder, spread, table, write_json

CONNECTIONS = 64
GOAL = 1.5  # most that our p99 may be of nginx's


@dataclass(frozen=True, slots=True)
class Sample:
    """One run against one proxy. Times in µs from when a request was due to the last byte of its answer."""

    proxy: str
    round: int
    rate: int
    requests: int
    late: int  # sent over 1 ms after their time: the client's fault, or no connection was free
    p50_us: int
    p90_us: int
    p99_us: int
    p999_us: int
    max_us: int


def run(arguments: argparse.Namespace) -> int:
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or (2 if arguments.quick else 5)
    out = result_folder("paced", arguments.quick)
    known = facts(["python", "-m", "bench", "paced", *arguments.given])
    proxy_core, load_core = cores()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="wakefront-bench-") as temporary:
        folder = Path(temporary)
        origin = Origin(folder / "origin", load_core)
        subjects: list[Subject] = []
        try:
            client = _Client(folder, load_core, seconds, out / "raw.txt")
            subjects, missing = start(arguments.proxies.split(","), folder, origin, proxy_core)
            for subject in subjects:
                verify(subject, origin)
            rate = arguments.rate or _half_of_ours(subjects, Loader(folder, load_core, out / "raw.txt"))
            for round_ in range(rounds):
                for subject in subjects[round_ % len(subjects) :] + subjects[: round_ % len(subjects)]:
                    samples.append(client.run(subject, rate, round_))
                    print(asdict(samples[-1]), flush=True)
        finally:
            for subject in subjects:
                if subject.running is not None:
                    stop(subject.running.process)
            stop(origin.process)
    write_json(out / "results.json", {**known, "missing": missing, "samples": [asdict(one) for one in samples]})
    text = "# Response times at a fixed rate\n\n" + facts_text(known) + _text(samples, rounds, seconds)
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0


def _half_of_ours(subjects: list[Subject], loader: Loader) -> int:
    """Half of the requests a second that we take with the load generator never waiting, in whole hundreds."""
    case = next(case for case in CASES if case.name == "get")
    ours = next((one for one in subjects if one.name == "wakefront"), None)
    if ours is None:
        raise BenchError("without wakefront among the proxies, say --rate")
    loader.run(case, ours.plain_port, 1.0, "saturation (warm-up)")
    got = loader.run(case, ours.plain_port, 3.0, "saturation")
    return int(got["requests"] / got["seconds"] / 200) * 100


class _Client:
    """programs/paced.c on the load core."""

    def __init__(self, folder: Path, core: int, seconds: float, raw: Path) -> None:
        self._program = compile_program("paced", folder)
        self._core, self._seconds, self._raw = core, seconds, raw
        self._request = folder / "request"
        fields = "".join(f"{name}: {value}\r\n" for name, value in {"Host": HOST, **FIELDS}.items())
        self._request.write_text(f"GET /small HTTP/1.1\r\n{fields}\r\n", newline="")

    def run(self, subject: Subject, rate: int, round_: int) -> Sample:
        given = [subject.plain_port, rate, self._seconds, CONNECTIONS, BODIES["/small"], self._request]
        command = ["taskset", "-c", str(self._core), str(self._program), *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=self._seconds + 60)
        with self._raw.open("a") as raw:
            raw.write(f"### round {round_} {subject.name}\n$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
        if done.returncode != 0:
            raise BenchError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        got: dict[str, Any] = json.loads(done.stdout)  # Any: from JSON
        if got.pop("errors") or not got["requests"]:
            raise BenchError(f"{subject.name} at {rate}/s: {done.stdout}")
        return Sample(subject.name, round_, rate, **got)


def _text(samples: list[Sample], rounds: int, seconds: float) -> str:
    by: dict[str, list[Sample]] = {}
    for sample in samples:
        by.setdefault(sample.proxy, []).append(sample)
    rows = [
        [
            name,
            *(spread([getattr(one, key) / 1000 for one in group], 2) for key in ("p50_us", "p90_us", "p99_us")),
            spread([one.p999_us / 1000 for one in group], 2),
            str(sum(one.late for one in group)),
        ]
        for name, group in by.items()
    ]
    told = (
        f"\n10-header GET, 100 B, {samples[0].rate} a second over {CONNECTIONS} connections (half of our saturation "
        f"unless --rate says another), {rounds} interleaved rounds of {seconds:g} s; median (lowest-highest).\n\n"
    )
    told += table(["proxy", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "sent late"], rows)
    if {"wakefront", "nginx"} <= by.keys():
        ratio = median(one.p99_us for one in by["wakefront"]) / median(one.p99_us for one in by["nginx"])
        told += f"\np99 ÷ nginx's: {ratio:.2f}; goal at most {GOAL}: {'met' if ratio <= GOAL else '**missed**'}.\n"
    return told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one round: for a look, not for the record")
    parser.add_argument("--proxies", default="nginx,haproxy,wakefront")
    parser.add_argument("--rate", type=int, default=0, help="requests a second; half of our saturation if not given")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=0)
