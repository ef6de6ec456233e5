"""Processes of a benchmark: compiled, started on a core, their processor time read, ended by pid.

Leaves to others what the processes are (peers, wakefront, origin) and what is asked of them (load, wake, memory).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A benchmark cannot go on; the message says what is missing and how to get it."""


def compile_program(name: str, into: Path, *libraries: str) -> Path:
    """Compile bench/programs/NAME.c with cc; the binary lands in `into`."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("no C compiler (cc); install it: apt-get install gcc libc6-dev libssl-dev")
    binary = into / name
    command = [compiler, "-O2", "-o", str(binary), str(HERE / "programs" / f"{name}.c"), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)} failed (apt-get install gcc libc6-dev libssl-dev):\n{done.stderr}")
    return binary


_given: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 outside ip_local_port_range, so that no outgoing connection takes it meanwhile."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in range(min(low, 32768) - 1 - os.getpid() % 4000, 10000, -1):
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise BenchError("no free port below ip_local_port_range on 127.0.0.1")


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path, limit_s: float = 20.0) -> None:
    """Until something accepts on 127.0.0.1:port; an early end of the process is an error with its log."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
    raise BenchError(f"{process.args!r} does not listen on 127.0.0.1:{port} (exit status {process.poll()}):\n{tail}")


def spawn(
    command: Sequence[str], core: int | None, log: IO[bytes], env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process of its own session, bound to one core before it runs a single instruction of its own."""
    prefix = [] if core is None else ["taskset", "-c", str(core)]
    full_env = {**os.environ, **(env or {})}
    return subprocess.Popen(
        [*prefix, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=full_env, start_new_session=True
    )


def stop(process: subprocess.Popen[bytes], limit_s: float = 10.0) -> None:
    """SIGTERM, then SIGKILL to the process and what is left of its children."""
    if process.poll() is not None:
        return
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in family[1:]:
        if _is_ours(pid, process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_ours(pid: int, session: int) -> bool:
    """Whether `pid` still is of the session that we started (a pid may have been given away since)."""
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False


def descendants(pid: int) -> list[int]:
    """The process and all below it, parents first."""
    found = [pid]
    for one in found:
        for task in _children_files(one):
            with contextlib.suppress(OSError):
                found.extend(int(child) for child in task.read_text().split())
    return found


def _children_files(pid: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield task / "children"


def cpu_s(pid: int) -> float:
    """Processor time (utime + stime) that a process has used so far, all its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def cpu_by_pid(pids: Sequence[int]) -> dict[int, float]:
    return {pid: cpu_s(pid) for pid in pids}


def busy_s() -> float:
    """Processor time of the whole machine so far, idle and waiting apart: shows what else ran during a sample."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) * TICK_S


def memory_kib(pid: int) -> dict[str, int]:
    """Rss, Pss and private memory of a process from smaps_rollup, in KiB."""
    values: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0])
    return {"rss": values["Rss"], "pss": values["Pss"], "private": values["Private_Clean"] + values["Private_Dirty"]}


def cores() -> tuple[int, int]:
    """(core of the proxy, core of load and origin): the last two that we may use; the same one twice on one core."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[-1])
