"""What a replayed GET costs beside a plain one: processor time of all our processes, in turn on the same node.

`python -m bench replay [--quick] [--rounds N] [--seconds N]`. Two machines: the first hands every request on to the
second with fly-replay. Method: README.md, as `load`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.load import Case, Loader
from bench.processes import BenchError, compile_program, cores, cpu_by_pid, free_port, spawn, stop, wait_for_port
from bench.report import facts, facts_text, median, result_folder, spread, table, write_json
from bench.wakefront import CONFIG, FLY_TOML, HOST, Wakefront

GOAL = 2.2  # most that a replayed request may cost, in plain ones
APP = HOST.partition(".")[0]
KINDS = {"plain": "bench-2", "replayed": "bench-1"}  # -> the machine that the client asks for

MACHINES = """
[[apps]]
fly_toml = "{folder}/{name}.fly.toml"
driver = "static"

[[apps.machines]]
id = "bench-1"
address = "127.0.0.1:{first}"

[[apps.machines]]
id = "bench-2"
address = "127.0.0.1:{second}"
"""


@dataclass(slots=True)
class Sample:
    """One run of one kind."""

    kind: str
    round: int
    requests: int
    cpu_us: float  # of all our processes, a request


def run(arguments: argparse.Namespace) -> int:
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or 2
    known = facts(["python", "-m", "bench", "replay", *arguments.given])
    out = result_folder("replay", arguments.quick)
    ours, loads = cores()
    with tempfile.TemporaryDirectory(prefix="wakefront-bench-") as temporary:
        folder = Path(temporary)
        program = compile_program("origin", folder)
        first, second = free_port(), free_port()
        origins = [_origin(folder, [str(program), str(first), "bench-2"], first, loads)]
        try:
            origins.append(_origin(folder, [str(program), str(second)], second, loads))
            samples = _measure(folder, out, (first, second), (ours, loads), rounds, seconds)
        finally:
            for origin in origins:
                stop(origin)
    write_json(out / "results.json", {**known, "samples": [asdict(one) for one in samples]})
    text = "# Replay\n\n" + facts_text(known) + _text(samples)
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0


def _origin(folder: Path, command: list[str], port: int, core: int) -> subprocess.Popen[bytes]:
    path = folder / f"origin-{port}.log"
    with path.open("wb") as log:
        process = spawn(command, core, log)
    wait_for_port(port, process, path)
    return process


def _measure(
    folder: Path, out: Path, origins: tuple[int, int], on: tuple[int, int], rounds: int, seconds: int
) -> list[Sample]:
    loaders = {kind: _loader(folder, kind, machine, on[1], out) for kind, machine in KINDS.items()}
    plain, tls, admin = free_port(), free_port(), free_port()
    config = CONFIG.format(
        folder=folder, workers=1, plain_port=plain, tls_port=tls, admin_port=admin, access_log=folder / "access.log"
    )
    config += MACHINES.format(folder=folder, name=APP, first=origins[0], second=origins[1])
    (folder / f"{APP}.fly.toml").write_text(FLY_TOML.format(name=APP, autostop="off"))
    samples = []
    with Wakefront(folder, config, on[0], (plain, tls, admin)) as node:
        shutil.copy(node.config, out / "config.toml")
        pids = [node.family.supervisor, node.family.control, *node.family.workers]
        for number in range(rounds):
            for kind in list(KINDS) if number % 2 == 0 else reversed(list(KINDS)):
                loader, case = loaders[kind]
                loader.run(case, plain, 1.0, f"round {number} {kind} (warm-up)")
                before = cpu_by_pid(pids)
                got = loader.run(case, plain, seconds, f"round {number} {kind}")
                used = sum(cpu_by_pid(pids).values()) - sum(before.values())
                requests = int(got["requests"])
                if not requests or any(got["errors"].values()):
                    raise BenchError(f"{kind}: {got}")
                samples.append(Sample(kind, number, requests, used / requests * 1e6))
                print(f"{number} {kind:9} {samples[-1].cpu_us:7.1f} us", flush=True)
    return samples


def _loader(folder: Path, kind: str, machine: str, core: int, out: Path) -> tuple[Loader, Case]:
    """A loader whose requests ask for this machine first."""
    place = folder / kind
    place.mkdir()
    case = Case("get", f"{kind} GET", "/handed")
    loader = Loader(place, core, out / "wrk.txt")
    script = place / "get.lua"
    script.write_text(f'wrk.headers["fly-force-instance-id"] = {json.dumps(machine)}\n' + script.read_text())
    return loader, case


def _text(samples: list[Sample]) -> str:
    by = {kind: [one.cpu_us for one in samples if one.kind == kind] for kind in KINDS}
    ratio = median(by["replayed"]) / median(by["plain"])
    rows: list[list[Any]] = [[kind, spread(costs)] for kind, costs in by.items()]
    met = "met" if ratio <= GOAL else "**missed**"
    told = f"\nA replayed GET costs {ratio:.2f} plain ones; goal at most {GOAL}: {met}.\n"
    return "\n" + table(["10-header GET", "CPU us a request"], rows) + told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one round: for a look, not for the record")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=0)
