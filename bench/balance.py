"""Response times with one of four machines slow, under each way to choose one.

`python -m bench balance [--quick] [--rounds N] [--seconds N] [--per-s N]`. Requests come at a fixed rate, whatever
becomes of those before, and are timed from the moment they were due. Method and limits: README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.processes import HERE, BenchError, cores, free_port, spawn, stop, wait_for_port
from bench.report import facts, facts_text, median, quantile, result_folder, spread, table, write_json
from bench.wakefront import CONFIG, FLY_TOML, Wakefront

POLICIES = ("fly", "least-loaded", "peak-ewma", "app-load")  # `fly` with its soft limit out of reach is a plain draw
DELAYS_MS = (5.0, 5.0, 5.0, 200.0)
WORKERS = 2
GOAL = ("peak-ewma", "fly", 0.2)  # most that the first's p99 may be of the second's

APP = """
[[apps]]
fly_toml = "{folder}/{name}.fly.toml"
driver = "static"
balance = "{name}"
"""

MACHINE = """
[[apps.machines]]
id = "{name}-{number}"
address = "127.0.0.1:{port}"
"""


@dataclass(slots=True)
class Sample:
    """One run under one policy; `ms` from when a request was due to its answer's last byte."""

    policy: str
    round: int
    ms: list[float]
    by_port: dict[int, int]
    slow_share: float


class Client:
    """Asks at a fixed rate over as many kept connections as that takes."""

    def __init__(self, port: int, host: str) -> None:
        self._port = port
        self._request = f"GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.ms: list[float] = []
        self.ports: Counter[int] = Counter()

    async def ask(self, per_s: float, seconds: float) -> None:
        began = time.monotonic()  # the loop's own time moves on by milliseconds
        async with asyncio.TaskGroup() as tasks:
            for number in range(round(per_s * seconds)):
                due = began + number / per_s
                await asyncio.sleep(due - time.monotonic())
                tasks.create_task(self._one(due))

    async def _one(self, due: float) -> None:
        reader, writer = (
            self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port, limit=65536)
        )
        writer.write(self._request)
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(3) if head.startswith(b"HTTP/1.1 200 ") else b""
        self.ms.append((time.monotonic() - due) * 1000)
        if body != b"ok\n":
            raise BenchError(f"expected 200 and ok, got {head!r} {body!r}")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        self.ports[int(fields[b"x-port"])] += 1
        self._idle.append((reader, writer))

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def measure(port: int, policy: str, round_: int, slow: int, per_s: float, seconds: float) -> Sample:
    """A second to warm up, which tells the node nothing that it would not learn from its first requests, then a run."""
    client = Client(port, f"{policy}.apps.localhost")
    try:
        await client.ask(per_s, 1.0)
        client.ms.clear()
        client.ports.clear()
        await client.ask(per_s, seconds)
    except BaseExceptionGroup as group:
        raise BenchError(f"{policy}, round {round_}: {group.exceptions[0]}") from group
    finally:
        client.close()
    asked = len(client.ms)
    return Sample(policy, round_, client.ms, dict(client.ports), client.ports[slow] / asked)


@contextmanager
def origins(folder: Path) -> Iterator[list[int]]:
    """Four machines; the last is the slow one."""
    ports = [free_port() for _ in DELAYS_MS]
    arguments = [f"{port}:{delay:g}" for port, delay in zip(ports, DELAYS_MS, strict=True)]
    log_path = folder / "origins.log"
    with log_path.open("wb") as log:
        process = spawn([sys.executable, str(HERE / "programs" / "delayed.py"), *arguments], cores()[1], log)
    try:
        for port in ports:
            wait_for_port(port, process, log_path)
        yield ports
    finally:
        stop(process)


def configuration(folder: Path, ports: list[int]) -> tuple[str, int, tuple[int, ...]]:
    plain, tls, admin = free_port(), free_port(), free_port()
    text = CONFIG.format(
        folder=folder,
        workers=WORKERS,
        plain_port=plain,
        tls_port=tls,
        admin_port=admin,
        access_log=folder / "access.log",
    )
    for name in POLICIES:
        (folder / f"{name}.fly.toml").write_text(FLY_TOML.format(name=name, autostop="off"))
        text += APP.format(folder=folder, name=name)
        text += "".join(MACHINE.format(name=name, number=at, port=port) for at, port in enumerate(ports, 1))
    return text, plain, (plain, tls, admin)


def run(arguments: argparse.Namespace) -> int:
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or (3.0 if arguments.quick else 8.0)
    known = facts(["python", "-m", "bench", "balance", *arguments.given])
    out = result_folder("balance", arguments.quick)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="wakefront-bench-") as temporary, origins(Path(temporary)) as ports:
        folder = Path(temporary)
        config, plain, listened = configuration(folder, ports)
        with Wakefront(folder, config, cores()[0], listened) as node:
            shutil.copy(node.config, out / "config.toml")
            shutil.copy(folder / "fly.fly.toml", out / "fly.fly.toml")
            for round_ in range(rounds):
                for policy in POLICIES[round_ % len(POLICIES) :] + POLICIES[: round_ % len(POLICIES)]:
                    sample = uvloop.run(measure(plain, policy, round_, ports[-1], arguments.per_s, seconds))
                    samples.append(sample)
                    _say(sample)
    setup = {
        "rounds": rounds,
        "seconds": seconds,
        "per_s": arguments.per_s,
        "delays_ms": DELAYS_MS,
        "workers": WORKERS,
    }
    write_json(out / "results.json", {**known, **setup, "samples": [asdict(one) for one in samples]})
    text = "# Balance\n\n" + facts_text(known) + _text(setup, samples)
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0


def _say(sample: Sample) -> None:
    times = "  ".join(f"p{q * 100:g} {quantile(sample.ms, q):7.1f}" for q in (0.5, 0.99, 0.999))
    print(f"{sample.round} {sample.policy:13} {times} ms  slow machine {sample.slow_share:6.2%}", flush=True)


def _text(setup: dict[str, Any], samples: list[Sample]) -> str:
    by = {policy: [one for one in samples if one.policy == policy] for policy in POLICIES}
    rows = []
    for policy, group in by.items():
        times = [spread([quantile(one.ms, q) for one in group]) for q in (0.5, 0.9, 0.99, 0.999)]
        rows.append([policy, *times, spread([one.slow_share * 100 for one in group], 2)])
    head = ["balance", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "% to the slow machine"]
    first, second, most = GOAL
    p99 = {policy: median(quantile(one.ms, 0.99) for one in by[policy]) for policy in (first, second)}
    ratio = p99[first] / p99[second]
    delays = ", ".join(f"{delay:g}" for delay in setup["delays_ms"])
    return (
        f"\nMachines that answer after {delays} ms; {setup['per_s']:g} requests/s, {setup['workers']} workers. "
        f"{setup['rounds']} interleaved rounds of {setup['seconds']:g} s; median (lowest–highest).\n\n"
        + table(head, rows)
        + "\n## Goal\n\n"
        + table(
            ["p99", "of", "ratio", "goal", "met"],
            [[first, second, f"{ratio:.3f}", f"≤ {most:g}", "yes" if ratio <= most else "**no**"]],
        )
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one short round: for a look, not for the record")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each run, after a second of warm-up")
    parser.add_argument("--per-s", type=float, default=400.0, help="requests a second")
