"""Memory of one worker per idle connection: plain, TLS after the handshake, TLS after 10 MB each way.

`python -m bench memory [--quick] [--connections N]`. The worker's private memory (smaps_rollup) with the connections
open less that before them, over their number; kernel socket buffers are not in it. Method and limits: README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.origin import Origin
from bench.processes import ROOT, BenchError, cores, free_port, memory_kib, stop
from bench.report import facts, facts_text, result_folder, table, write_json
from bench.wakefront import CONFIG, FLY_TOML, STATIC_APP, Wakefront

# (name, TLS, 10 MB each way on each, share of --connections, most bytes a connection)
KINDS = (
    ("plain, one request answered", False, False, 1.0, 12_000),
    ("TLS, one request answered", True, False, 1.0, 30_000),
    ("TLS, 10 MB each way", True, True, 0.125, 50_000),
    ("plain, 10 MB each way", False, True, 0.125, None),
)


class IdleClient:
    def __init__(self, port: int, tls: bool, log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.idle_client", str(port), "tls" if tls else "plain"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def tell(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise BenchError(f"the idle client ended at `{command}`:\n{self._log.read_text()[-2000:]}")
        return dict(json.loads(line))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def settled(pid: int) -> dict[str, int]:
    """Memory once it has stopped changing for half a second (at most ten seconds)."""
    before = memory_kib(pid)
    for _ in range(20):
        time.sleep(0.5)
        now = memory_kib(pid)
        if abs(now["private"] - before["private"]) <= 64:
            return now
        before = now
    return before


def measure(
    folder: Path, origin: Origin, kind: tuple[str, bool, bool, float, int | None], total: int, out: Path
) -> dict[str, Any]:
    """One kind in a node of its own, so that no kind inherits another's heap."""
    name, tls, large, share, limit = kind
    count = max(10, int(total * share))
    ports = {"plain_port": free_port(), "tls_port": free_port(), "admin_port": free_port()}
    config = CONFIG.format(folder=folder, workers=1, access_log=folder / "access.log", **ports)
    config += "\n[limits]\nidle_timeout = 900\n"
    config += STATIC_APP.format(folder=folder, name="bench", origin_port=origin.port)
    (folder / "bench.fly.toml").write_text(FLY_TOML.format(name="bench", autostop="off"))
    with Wakefront(folder, config, cores()[0], tuple(ports.values())) as node:
        shutil.copy(node.config, out / "config.toml")
        worker = node.family.workers[0]
        client = IdleClient(ports["tls_port" if tls else "plain_port"], tls, folder / "client.log")
        try:
            # The first connections of all bring in code and caches; they stay open, and out of the account. What large
            # bodies leave behind in the heap is in it.
            client.tell("open 20")
            before = settled(worker)
            client.tell(f"open {count}")
            if large:
                client.tell(f"large {count + 20}")
            during = settled(worker)
            still = client.tell("ask 200" if count >= 200 else f"ask {count}")
            client.tell("close")
            after = settled(worker)
        finally:
            client.end()
    used = (during["private"] - before["private"]) * 1024 / count
    return {
        "kind": name,
        "connections": count,
        "open_at_the_end": still["open"] - 20,
        "before_kib": before,
        "during_kib": during,
        "after_close_kib": after,
        "bytes_a_connection": used,
        "pss_bytes_a_connection": (during["pss"] - before["pss"]) * 1024 / count,
        "limit": limit,
    }


def run(arguments: argparse.Namespace) -> int:
    total = arguments.connections or (800 if arguments.quick else 8000)
    known = facts(["python", "-m", "bench", "memory", *arguments.given])
    out = result_folder("memory", arguments.quick)
    found = []
    with tempfile.TemporaryDirectory(prefix="wakefront-bench-") as temporary:
        origin = Origin(Path(temporary) / "origin", cores()[1])
        try:
            for index, kind in enumerate(KINDS):
                folder = Path(temporary) / str(index)
                folder.mkdir()
                one = measure(folder, origin, kind, total, out)
                found.append(one)
                print(f"{one['kind']:30} {one['connections']:6} {one['bytes_a_connection']:9.0f} B", flush=True)
        finally:
            stop(origin.process)
    write_json(out / "results.json", {**known, "kinds": found})
    text = "# Memory\n\n" + facts_text(known) + "\n" + _table(found)
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0


def _table(found: list[dict[str, Any]]) -> str:
    rows = []
    for one in found:
        used, limit = one["bytes_a_connection"], one["limit"]
        rows.append(
            [
                one["kind"],
                str(one["connections"]),
                f"{used:,.0f}",
                f"{one['pss_bytes_a_connection']:,.0f}",
                " / ".join(f"{one[when]['private']:,}" for when in ("before_kib", "during_kib", "after_close_kib")),
                f"≤ {limit:,}" if limit else "told",
                ("yes" if used <= limit else "**no**") if limit else "",
            ]
        )
    head = ["idle connections", "number", "bytes each", "by Pss", "private KiB before / with / after", "goal", "met"]
    return table(head, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a tenth of the connections: for a look")
    parser.add_argument("--connections", type=int, default=0, help="idle connections on the worker (8000)")
