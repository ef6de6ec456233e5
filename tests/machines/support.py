"""Specs of small real machines, and what a test has to see of processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any  # changes of any field of a spec

from proxy.machines import logs, proc
from proxy.machines.driver import Exit, MachineSpec, Mount, Running
from proxy.machines.process import ProcessDriver
from proxy.machines.volumes import mount_support, network_support
from proxy.model import AppName, Endpoint, MachineId

WAIT_S = 20.0  # longer than any step takes on a busy machine

needs_network = (network_support() or "") and f"network namespaces: {network_support()}"
needs_mounts = "; ".join(mount_support([Mount("/", "/data", "probe")]))
_CAP_SETUID = 7
_capabilities = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")]
needs_root = "" if int(_capabilities[0].split()[1], 16) >> _CAP_SETUID & 1 else "needs root to change users"


def spec(folder: Path, *command: str, id: str = "e2865013a12345", **changes: Any) -> MachineSpec:
    """A machine in `folder`, whose node is `folder` too."""
    values: dict[str, Any] = {
        "id": MachineId(id),
        "app": AppName("demo"),
        "group": "app",
        "command": command or ("sleep", "1000"),
        "cwd": str(folder),
        "env": (("PATH", os.environ["PATH"]), ("LANG", "C.UTF-8")),
        "endpoints": (Endpoint(8080, "127.0.0.1", 20000),),
        "kill_signal": signal.SIGTERM,
        "kill_timeout_s": 5.0,
        "log_path": logs.log_path(str(folder), "demo", id),
        **changes,
    }
    return MachineSpec(**values)


def python(script: str) -> tuple[str, ...]:
    return (sys.executable, "-u", "-S", "-c", script)


class Exits:
    """Every exit a driver reported, and a way to wait for the next."""

    def __init__(self) -> None:
        self.all: list[tuple[MachineId, Running, Exit]] = []
        self._news = asyncio.Event()

    def __call__(self, machine: MachineId, running: Running, end: Exit) -> None:
        self.all.append((machine, running, end))
        self._news.set()

    async def first(self) -> Exit:
        async with asyncio.timeout(WAIT_S):
            while not self.all:
                self._news.clear()
                await self._news.wait()
        return self.all[0][2]


@contextlib.asynccontextmanager
async def driver_at(folder: Path, supervisor: int | None = None) -> AsyncIterator[tuple[ProcessDriver, Exits]]:
    """A process driver whose machines are all ended when the test is over."""
    driver, exits = ProcessDriver(str(folder), supervisor=supervisor), Exits()
    driver.set_on_exit(exits)
    try:
        yield driver, exits
    finally:
        await end_all(driver)


async def end_all(driver: ProcessDriver) -> None:
    for machine in list(driver._watches):
        await driver.stop(machine, signal.SIGKILL, 5)
        driver.forget(machine)
    for machine, running in driver.find_machines().items():
        await driver.stop_stray(machine, running, 0)
    if driver._sweeper is not None:
        await driver._sweeper
    await driver.close()


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until something outside of the test's control is so; there is nothing to wait on but to look again."""
    deadline = asyncio.get_running_loop().time() + WAIT_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.005)


def output(one: MachineSpec) -> list[str]:
    """What the machine wrote, without our own lines."""
    try:
        lines = Path(one.log_path).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if not line.startswith("--- ")]


async def said(one: MachineSpec, line: str) -> None:
    await until(lambda: line in output(one), f"{one.id} writes {line!r}")


def is_alive(pid: int) -> bool:
    stat = proc.read_stat(pid)
    return stat is not None and not stat.has_ended


def started(_: Running) -> None:
    """For starts whose fork the test does not look at."""
