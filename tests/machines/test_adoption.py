"""Machines outlive the control that started them: it is killed for real, and another driver takes over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.machines import proc
from proxy.machines.driver import DriverError, Exit, MachineSpec, Running
from proxy.machines.process import ProcessDriver
from tests.machines.support import WAIT_S, Exits, driver_at, is_alive, output, python, said, spec, started, until

_FROM_TERM_9 = (
    "import signal,sys,time\nsignal.signal(15,lambda *_:sys.exit(9))\nprint('up')\nwhile True: time.sleep(1000)"
)
# 1,000 lines of 1,000 bytes a second, numbered; at the end it says how many there were
_WRITER = (
    "import signal,sys,time\n"
    "ended=[]\nsignal.signal(15,lambda *_:ended.append(1))\n"
    "n=0;start=time.monotonic()\n"
    "while not ended:\n"
    " while n < (time.monotonic()-start)*1000:\n  sys.stdout.write('%09d %s\\n'%(n,'x'*989)); n+=1\n"
    " sys.stdout.flush(); time.sleep(.001)\n"
    "print('total',n)\n"
)


@dataclass
class Orphanage:
    """See orphanage.py. `running` names the machine it started."""

    process: asyncio.subprocess.Process
    running: Running

    async def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())

    async def hears(self) -> list[str]:
        assert self.process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            return (await self.process.stdout.readline()).decode().split()

    async def kill_control(self) -> None:
        await self.tell("kill")
        assert await self.hears() == ["killed"]


@contextlib.asynccontextmanager
async def orphanage(one: MachineSpec, node_dir: Path) -> AsyncIterator[Orphanage]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.machines.orphanage", str(node_dir), one.id, one.log_path, *one.command,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_S):
        pid, ticks = (await process.stdout.readline()).split()
    running = Running(int(pid), int(ticks))
    try:
        yield Orphanage(process, running)
    finally:
        found = proc.read_stat(running.pid)
        if found is not None and found.start_ticks == running.start_ticks and not found.has_ended:
            os.killpg(running.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_the_next_control_gets_the_exit_status_from_the_supervisor(tmp_path: Path) -> None:
    one = spec(tmp_path, *python(_FROM_TERM_9))
    async with orphanage(one, tmp_path) as parent, driver_at(tmp_path) as (driver, exits):
        await said(one, "up")
        await parent.kill_control()
        assert driver.find_machines() == {one.id: parent.running}
        assert driver.adopt(one, None) == parent.running
        stopping = asyncio.get_running_loop().create_task(driver.stop(one.id, signal.SIGTERM, 10))
        word, pid, code, _ = await parent.hears()
        assert (word, int(pid), int(code)) == ("exited", parent.running.pid, 9)
        assert driver.exited_elsewhere(int(pid), Exit(code=9))
        await stopping
        assert exits.all == [(one.id, parent.running, Exit(code=9))]
        assert driver.exited_elsewhere(int(pid), Exit(code=9))  # re-sent: known, not reported again
        assert len(exits.all) == 1
        driver.forget(one.id)
        assert not driver.exited_elsewhere(int(pid), Exit(code=9))


async def test_an_end_that_nobody_can_tell_of_is_reported_as_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.machines.process._ELSEWHERE_S", 0.05)
    one = spec(tmp_path, *python(_FROM_TERM_9))
    async with orphanage(one, tmp_path) as parent, driver_at(tmp_path) as (driver, exits):
        await said(one, "up")
        await parent.kill_control()
        assert driver.adopt(one, parent.running) == parent.running
        await driver.stop(one.id, signal.SIGTERM, 10)
        assert exits.all == [(one.id, parent.running, Exit(code=None, signal=None))]
        assert "ended, exit code unknown" in Path(one.log_path).read_text()


async def test_the_end_of_one_that_outlived_its_supervisor_is_not_waited_for_long(tmp_path: Path) -> None:
    one = spec(tmp_path, *python(_FROM_TERM_9))
    async with orphanage(one, tmp_path) as parent, driver_at(tmp_path, supervisor=os.getpid()) as (driver, exits):
        await said(one, "up")
        await parent.kill_control()
        assert driver.adopt(one, parent.running) == parent.running
        began = asyncio.get_running_loop().time()
        os.kill(parent.running.pid, signal.SIGTERM)
        assert await exits.first() == Exit(code=None, signal=None)
        assert asyncio.get_running_loop().time() - began < 0.9, "who could have told is gone"


async def test_who_ended_and_is_still_to_be_told_of_is_known_to_have_ended(tmp_path: Path) -> None:
    one = spec(tmp_path, *python(_FROM_TERM_9))
    async with orphanage(one, tmp_path) as parent, driver_at(tmp_path) as (driver, exits):
        await said(one, "up")
        await parent.kill_control()
        assert driver.adopt(one, parent.running) == parent.running and not driver.has_ended(one.id)
        os.kill(parent.running.pid, signal.SIGTERM)
        assert (await parent.hears())[0] == "exited"
        assert driver.has_ended(one.id) and exits.all == []
        assert driver.exited_elsewhere(parent.running.pid, Exit(code=9))
        assert not driver.has_ended(one.id) and exits.all == [(one.id, parent.running, Exit(code=9))]


async def test_one_that_ended_while_there_was_no_control_is_adopted_for_its_exit_status(tmp_path: Path) -> None:
    one = spec(tmp_path, *python(_FROM_TERM_9))
    async with orphanage(one, tmp_path) as parent, driver_at(tmp_path) as (driver, exits):
        await said(one, "up")
        await parent.kill_control()
        os.kill(parent.running.pid, signal.SIGTERM)
        assert (await parent.hears())[0] == "exited"
        assert driver.adopt(one, None) is None  # it does not run
        assert driver.adopt(one, parent.running) == parent.running
        assert driver.exited_elsewhere(parent.running.pid, Exit(code=9))
        assert await exits.first() == Exit(code=9)
        driver.forget(one.id)
        await parent.tell("reap")


@pytest.mark.slow
async def test_a_machine_that_writes_a_megabyte_a_second_loses_no_line_when_control_is_killed(tmp_path: Path) -> None:
    one = spec(tmp_path, *python(_WRITER))
    log = Path(one.log_path)
    async with orphanage(one, tmp_path) as parent, driver_at(tmp_path) as (driver, exits):
        await until(lambda: log.stat().st_size > 200_000, "some output before")
        await parent.kill_control()
        size = log.stat().st_size
        await until(lambda: log.stat().st_size > size + 200_000, "more output without control")
        assert driver.adopt(one, parent.running)
        size = log.stat().st_size
        await until(lambda: log.stat().st_size > size + 200_000, "and after")
        stopping = asyncio.get_running_loop().create_task(driver.stop(one.id, signal.SIGTERM, 10))
        _, pid, code, _ = await parent.hears()
        driver.exited_elsewhere(int(pid), Exit(code=int(code)))
        await stopping
        assert exits.all[0][2] == Exit(code=0)
        *lines, total = output(one)
        assert [int(line[:9]) for line in lines] == list(range(int(total.split()[1])))
        assert len(lines) > 500


async def test_one_that_was_frozen_can_be_resumed_whole(tmp_path: Path) -> None:
    script = (
        "import os\nif os.fork()==0:\n os.setsid()\n"
        "print('pid',os.getpid())\nwhile True: pass"
    )  # fmt: skip
    async with driver_at(tmp_path) as (first, _):
        one = spec(tmp_path, *python(script))
        running = await first.start(one, started)
        await until(lambda: len(output(one)) == 2, "both run")
        pids = [int(line.split()[1]) for line in output(one)]
        await first.suspend(one.id)
        await first.close()
        async with driver_at(tmp_path) as (second, _):
            assert second.adopt(one, running) == running
            assert [_state(pid) for pid in pids] == ["T", "T"]
            await second.resume(one.id)
            await until(lambda: [_state(pid) for pid in pids] == ["R", "R"], "both run again")


async def test_a_frozen_machine_stays_frozen_when_its_control_is_killed(tmp_path: Path) -> None:
    one = spec(tmp_path, *python(_FROM_TERM_9))
    async with orphanage(one, tmp_path) as parent, driver_at(tmp_path) as (driver, exits):
        await said(one, "up")
        os.killpg(parent.running.pid, signal.SIGSTOP)
        await until(lambda: _state(parent.running.pid) == "T", "it stands still")
        await parent.kill_control()
        assert driver.adopt(one, parent.running) == parent.running
        assert _state(parent.running.pid) == "T"
        await driver.resume(one.id)
        await until(lambda: _state(parent.running.pid) == "S", "it goes on")
        assert exits.all == []


async def test_a_program_whose_first_thread_left_is_no_zombie(tmp_path: Path) -> None:
    exit_thread = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine)
    if exit_thread is None:
        pytest.skip(f"the number of the exit system call on {os.uname().machine} is not known here")
    script = (
        "import ctypes,threading,time\nthreading.Thread(target=time.sleep,args=(1000,)).start()\n"
        f"print('up'); ctypes.CDLL(None).syscall({exit_thread},0)"
    )
    async with driver_at(tmp_path) as (first, exits):
        one = spec(tmp_path, *python(script))
        running = await first.start(one, started)
        await until(lambda: _state(running.pid) == "Z", "its first thread left")
        assert is_alive(running.pid)
        assert exits.all == []
        await first.close()
        async with driver_at(tmp_path) as (second, exits):
            assert second.adopt(one, running) == running
            await second.stop(one.id, signal.SIGTERM, 5)
            assert exits.all[0][2] == Exit(signal=signal.SIGTERM)


async def test_a_reused_pid_fools_nobody(tmp_path: Path) -> None:
    async with driver_at(tmp_path) as (first, _):
        one = spec(tmp_path)
        running = await first.start(one, started)
        other = await first.start(spec(tmp_path, id="other"), started)
        await first.close()
        async with driver_at(tmp_path) as (second, _):
            assert second.adopt(one, Running(running.pid, running.start_ticks + 1)) is None
            assert second.adopt(one, other) is None  # runs, but is another machine
            assert second.adopt(one, _myself()) is None
            await second._sweep_task()
            assert is_alive(other.pid)


async def test_the_leader_is_found_not_its_children_nor_what_left_its_session(tmp_path: Path) -> None:
    script = "import os,time\nif os.fork()==0:\n os.setsid()\nos.fork()\nprint('up')\ntime.sleep(1000)"
    async with driver_at(tmp_path) as (first, _):
        one = spec(tmp_path, *python(script))
        running = await first.start(one, started)
        await until(lambda: len(output(one)) == 4, "all four run")
        await first.close()
        async with driver_at(tmp_path) as (second, _):
            assert second.find_machines() == {one.id: running}
            assert second.adopt(one, None) == running


async def test_a_program_that_wrote_over_its_environment_is_known_by_its_output(tmp_path: Path) -> None:
    script = (
        "import ctypes,os,time\n"
        "fields=open('/proc/self/stat').read().rsplit(')',1)[1].split()\n"
        "start,end=int(fields[47]),int(fields[48])\n"
        "ctypes.memset(start,0,end-start)\n"
        "assert b'FLY' not in open('/proc/self/environ','rb').read()\n"
        "print('up')\ntime.sleep(1000)"
    )
    async with driver_at(tmp_path) as (first, _):
        one = spec(tmp_path, *python(script))
        running = await first.start(one, started)
        await said(one, "up")
        await first.close()
        async with driver_at(tmp_path) as (second, _):
            assert second.adopt(one, running) == running
            await second.stop(one.id, signal.SIGKILL, 5)


async def test_what_is_left_of_a_machine_whose_leader_is_gone_is_killed_at_the_next_start_of_control(
    tmp_path: Path,
) -> None:
    async with driver_at(tmp_path) as (first, exits):
        one = spec(tmp_path, "sh", "-c", "sleep 1000 & echo $!; exit 0")
        running = await first.start(one, started)
        await exits.first()
        child = int(output(one)[0])
        await first.close()
        os.waitid(os.P_PID, running.pid, os.WEXITED)  # noqa: ASYNC222 - it has ended
        async with driver_at(tmp_path) as (second, _):
            assert await asyncio.to_thread(second.find_machines) == {}
            await until(lambda: not is_alive(child), "the child is killed")


async def test_a_start_that_the_journal_missed_is_adopted_though_the_journal_names_an_older_one(tmp_path: Path) -> None:
    async with driver_at(tmp_path) as (first, _):
        one = spec(tmp_path)
        old = await first.start(one, started)
        await first.stop(one.id, signal.SIGTERM, 5)
        first.forget(one.id)
        new = await first.start(one, started)
        await first.close()
        async with driver_at(tmp_path) as (second, exits):
            assert second.adopt(one, old) is None
            assert second.adopt(one, None) == new
            await asyncio.shield(second._sweep_task())
            assert is_alive(new.pid)
            assert exits.all == []


async def test_a_stray_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    async with driver_at(tmp_path) as (first, _):
        one = spec(tmp_path, "sh", "-c", "trap '' TERM; echo up; sleep 1000 & wait; wait")
        running = await first.start(one, started)
        await said(one, "up")
        await first.close()
        second = ProcessDriver(str(tmp_path))
        second.set_on_exit(Exits())
        await second.stop_stray(one.id, running, 0.05)
        assert not is_alive(running.pid)
        assert second.find_machines() == {}
        await second.stop_stray(one.id, running, 0.05)  # and again
        await second.close()
        with pytest.raises(DriverError):
            await second.resume(one.id)


def _myself() -> Running:
    found = proc.read_stat(os.getpid())
    assert found is not None
    return Running(found.pid, found.start_ticks)


def _state(pid: int) -> str:
    found = proc.read_stat(pid)
    return found.state if found is not None else "gone"
