"""Wakefront under measurement: its configuration written, `wakefront serve` started, its processes told apart."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.peers import HOST, Place, Recipe
from bench.processes import ROOT, BenchError, descendants, spawn, stop, wait_for_port

COMMAND = Path(sys.executable).parent / "wakefront"

CONFIG = """[node]
name = "bench"
region = "ams"
domain = "apps.localhost"
data_dir = "{folder}/data"
workers = {workers}

[listen]
80 = ["127.0.0.1:{plain_port}"]
443 = ["127.0.0.1:{tls_port}"]
admin = "127.0.0.1:{admin_port}"

[log]
access = "{access_log}"
format = "json"

[certs]
issuer = "internal"
"""

STATIC_APP = """
[[apps]]
fly_toml = "{folder}/{name}.fly.toml"
driver = "static"

[[apps.machines]]
id = "{name}-1"
address = "127.0.0.1:{origin_port}"
"""

FLY_TOML = """app = "{name}"
primary_region = "ams"

[http_service]
  internal_port = 8080
  force_https = false
  auto_stop_machines = "{autostop}"
  auto_start_machines = true
  min_machines_running = 0

  [http_service.concurrency]
    type = "requests"
    soft_limit = 100000
"""


@dataclass(frozen=True, slots=True)
class Family:
    """The processes of a running `wakefront serve`."""

    supervisor: int
    control: int
    workers: tuple[int, ...]


def recipe(place: Place) -> Recipe | None:
    """One worker, one static machine (the origin), the access log as JSON lines to a file."""
    from bench.processes import free_port

    if not COMMAND.exists():
        return None
    folder = place.folder
    access_log = folder / "access.log"
    config = folder / "config.toml"
    fly_toml = folder / "bench.fly.toml"
    fly_toml.write_text(FLY_TOML.format(name="bench", autostop="off"))
    config.write_text(
        CONFIG.format(
            folder=folder,
            workers=1,
            plain_port=place.plain_port,
            tls_port=place.tls_port,
            admin_port=free_port(),
            access_log=access_log,
        )
        + STATIC_APP.format(folder=folder, name="bench", origin_port=place.origin_port)
    )
    return Recipe(
        "wakefront",
        version(),
        [str(COMMAND), "serve", "--config", str(config)],
        [config, fly_toml],
        access_log,
        "access_log to a file, JSON (its cheapest form, written in batches)",
    )


def version() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return f"wakefront {done.stdout.strip() or 'unknown'}"


def family(supervisor: int, limit_s: float = 20.0) -> Family:
    """Supervisor, control and workers; a child's name (/proc/PID/comm or its arguments) tells which it is."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        control, workers = 0, []
        for pid in descendants(supervisor)[1:]:
            with contextlib.suppress(OSError):
                name = _name(pid)
                if "control" in name:
                    control = pid
                elif "worker" in name:
                    workers.append(pid)
        if control and workers:
            return Family(supervisor, control, tuple(workers))
        time.sleep(0.05)
    names = {pid: _name(pid) for pid in descendants(supervisor)}
    raise BenchError(f"cannot tell control and workers among the children of {supervisor}: {names}")


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


class Wakefront:
    """A `wakefront serve` of its own folder, for wake.py and memory.py; ended on leaving the `with` block."""

    def __init__(self, folder: Path, config: str, core: int | None, ports: tuple[int, ...]) -> None:
        self.folder, self._core, self._ports = folder, core, ports
        self.config = folder / "config.toml"
        self.config.write_text(config)
        self.log = folder / "output.log"

    def __enter__(self) -> Wakefront:
        if not COMMAND.exists():
            raise BenchError(f"{COMMAND} does not exist: pip install -e .")
        with self.log.open("wb") as log:
            self.process: subprocess.Popen[bytes] = spawn(
                [str(COMMAND), "serve", "--config", str(self.config)], self._core, log
            )
        try:
            for port in self._ports:
                wait_for_port(port, self.process, self.log)
            self.family = family(self.process.pid)
        except BaseException:
            stop(self.process)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop(self.process, 20)

    def cli(self, *arguments: str) -> str:
        """Run a command of the CLI against this node; a failure is an error with what it said."""
        command = [str(COMMAND), *arguments, "--config", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode != 0:
            raise BenchError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout


__all__ = ["CONFIG", "FLY_TOML", "HOST", "STATIC_APP", "Family", "Wakefront", "family", "recipe", "version"]
