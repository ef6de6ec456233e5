"""What a GET that crosses to another node costs beside one served where it came: processor time, latency, reuse.

`python -m bench crossing [--quick] [--rounds N] [--seconds N]`. Two nodes of one fleet on this machine, one worker
each; the app's machine is the second's. Method: README.md, as `load`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.load import Case, Loader
from bench.origin import Origin
from bench.processes import BenchError, cores, cpu_by_pid, free_port, stop
from bench.report import facts, facts_text, median, result_folder, spread, table, write_json
from bench.wakefront import CONFIG, FLY_TOML, HOST, STATIC_APP, Wakefront
from proxy.cli.node import Api, find_node

GOAL_CPU = 2.2  # most that a crossing request may cost, in local ones
GOAL_P50_MS = 1.0  # most that crossing may add to the median, the way itself apart
GOAL_REUSED = 0.999
APP = HOST.partition(".")[0]
KINDS = ("local", "crossing")


@dataclass(slots=True)
class Sample:
    """One run of one kind."""

    kind: str
    round: int
    requests: int
    cpu_us: float  # of all processes of both nodes, a request
    p50_ms: float
    connects: int  # between the nodes, meanwhile


class _Node:
    def __init__(self, folder: Path, name: str, region: str, app: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.plain, self.tls, self.admin, self.backhaul = free_port(), free_port(), free_port(), free_port()
        config = CONFIG.format(
            folder=folder, workers=1, plain_port=self.plain, tls_port=self.tls, admin_port=self.admin,
            access_log=folder / "access.log",
        )  # fmt: skip
        config = config.replace('name = "bench"', f'name = "{name}"').replace('"ams"', f'"{region}"')
        self.text = config.replace("[listen]", f'[listen]\nbackhaul = "127.0.0.1:{self.backhaul}"') + app

    def start(self, core: int) -> Wakefront:
        return Wakefront(self.folder, self.text, core, (self.plain, self.tls, self.admin))


def run(arguments: argparse.Namespace) -> int:
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or 3
    known = facts(["python", "-m", "bench", "crossing", *arguments.given])
    out = result_folder("crossing", arguments.quick)
    ours, loads = cores()
    with tempfile.TemporaryDirectory(prefix="wakefront-bench-") as temporary:
        folder = Path(temporary)
        origin = Origin(folder / "origin", loads)
        try:
            samples = _measure(folder, out, origin, ours, loads, rounds, seconds)
        finally:
            stop(origin.process)
    write_json(out / "results.json", {**known, "samples": [asdict(one) for one in samples]})
    text = "# Crossing\n\n" + facts_text(known) + _text(samples)
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0


def _measure(folder: Path, out: Path, origin: Origin, ours: int, loads: int, rounds: int, seconds: int) -> list[Sample]:
    place = folder / "iad"
    far = _Node(place, "iad-1", "iad", STATIC_APP.format(folder=place, name=APP, origin_port=origin.port))
    (place / f"{APP}.fly.toml").write_text(FLY_TOML.format(name=APP, autostop="off"))
    near = _Node(folder / "ams", "ams-1", "ams", "")
    samples = []
    with far.start(ours) as there:
        token = _retried(lambda: there.cli("node", "invite").strip())
        (near.folder / "config.toml").write_text(near.text)
        joining = Wakefront(near.folder, near.text, None, ())
        joining.cli("node", "join", token)
        with near.start(ours) as here:
            shutil.copy(here.config, out / "config.toml")
            api = Api(find_node(here.config, None))
            _retried(lambda: _met(api))
            pids = [pid for one in (here.family, there.family) for pid in (one.supervisor, one.control, *one.workers)]
            folders = {kind: folder / kind for kind in KINDS}
            for one in folders.values():
                one.mkdir()
            loaders = {kind: Loader(one, loads, out / "wrk.txt") for kind, one in folders.items()}
            case = Case("get", "GET", "/small")
            ports = {"local": far.plain, "crossing": near.plain}
            for number in range(rounds):
                for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                    loaders[kind].run(case, ports[kind], 1.0, f"round {number} {kind} (warm-up)")
                    before, connected = cpu_by_pid(pids), _connects(near.admin)
                    got = loaders[kind].run(case, ports[kind], seconds, f"round {number} {kind}")
                    used = sum(cpu_by_pid(pids).values()) - sum(before.values())
                    requests = int(got["requests"])
                    if not requests or any(got["errors"].values()):
                        raise BenchError(f"{kind}: {got}")
                    p50_ms = float(got["p50_us"]) / 1000
                    connects = _connects(near.admin) - connected
                    samples.append(Sample(kind, number, requests, used / requests * 1e6, p50_ms, connects))
                    print(f"{number} {kind:9} {samples[-1].cpu_us:7.1f} us {p50_ms:6.2f} ms {connects}", flush=True)
    return samples


def _met(api: Api) -> None:
    rows = api.get("/v1/nodes")["nodes"]
    if not any(one["state"] == "up" and one["apps"] for one in rows if not one["is_self"]):
        raise BenchError(f"the nodes have not met: {json.dumps(rows)}")


def _connects(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    for line in lines:
        if line.startswith("wakefront_peer_connects_count"):
            return int(float(line.rpartition(" ")[2]))
    raise BenchError("no wakefront_peer_connects_count in /metrics")


def _retried(step: Any, limit_s: float = 20.0) -> Any:  # Any: whatever the step gives
    end = time.monotonic() + limit_s
    while True:
        try:
            return step()
        except Exception:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def _text(samples: list[Sample]) -> str:
    by = {kind: [one for one in samples if one.kind == kind] for kind in KINDS}
    costs = {kind: [one.cpu_us for one in found] for kind, found in by.items()}
    ratio = median(costs["crossing"]) / median(costs["local"])
    requests = sum(one.requests for one in by["crossing"])
    reused = 1 - sum(one.connects for one in by["crossing"]) / requests
    rows: list[list[Any]] = [
        [kind, spread(costs[kind]), f"{median([one.p50_ms for one in found]):.2f}"] for kind, found in by.items()
    ]

    def met(yes: bool) -> str:
        return "met" if yes else "**missed**"

    return (
        "\n"
        + table(["10-header GET", "CPU us a request, both nodes", "p50 ms, 32 connections"], rows)
        + f"\nA crossing GET costs {ratio:.2f} local ones; goal at most {GOAL_CPU}: {met(ratio <= GOAL_CPU)}. "
        f"{reused:.3%} went over kept connections; goal {GOAL_REUSED:.1%}: {met(reused >= GOAL_REUSED)}.\n"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one round: for a look, not for the record")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=0)
