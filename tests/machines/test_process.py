"""The process driver against real processes: how they are started, what freezes and ends, what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from proxy.machines import proc
from proxy.machines.driver import DriverError, Exit, Mount
from proxy.model import MachineId
from tests.machines.support import (
    driver_at,
    is_alive,
    needs_root,
    output,
    python,
    said,
    spec,
    started,
    until,
)

# a child that left the session, as a daemon does; it says its pid
_DOUBLE_FORK = (
    "import os,time\nif os.fork()==0:\n os.setsid()\n if os.fork()==0:\n  print(os.getpid())\n  {}\n os._exit(0)\n"
)


class TestWhatAMachineFinds:
    async def test_its_own_environment_and_the_marks_to_find_it_by(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, "env", env=(("PATH", "/usr/bin:/bin"), ("COLOUR", "blå")))
            await driver.start(one, started)
            assert await exits.first() == Exit(code=0)
            assert sorted(output(one)) == [
                "COLOUR=blå",
                "FLY_APP_NAME=demo",
                f"FLY_MACHINE_ID={one.id}",
                "PATH=/usr/bin:/bin",
                f"WAKEFRONT_NODE_DIR={tmp_path}",
            ]

    @pytest.mark.parametrize("at_once", [True, False])
    async def test_its_folder_no_open_files_of_ours_an_empty_input_and_default_signals(
        self, tmp_path: Path, at_once: bool
    ) -> None:
        script = (
            "import os,signal,sys\n"
            "print(os.getcwd()); print(sorted(map(int, os.listdir('/proc/self/fd')))); print(repr(sys.stdin.read()))\n"
            "print(os.getsid(0) == os.getpgid(0) == os.getpid())\n"
            "print([line for line in open('/proc/self/status') if line.startswith('SigBlk')][0].split()[1])\n"
        )
        folder = tmp_path / "app"
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)):  # something that must not leak into it
            async with driver_at(tmp_path) as (driver, exits):
                one = spec(tmp_path, *python(script), cwd=str(folder))
                if at_once:
                    assert driver.start_at_once(one) is not None
                else:
                    await driver.start(one, started)
                assert await exits.first() == Exit(code=0)
                assert output(one) == [str(folder), "[0, 1, 2, 3]", "''", "True", "0000000000000000"]

    async def test_a_program_from_its_own_path_not_from_ours(self, tmp_path: Path) -> None:
        program = tmp_path / "tool" / "frobnicate"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho frobnicated $1\n")
        program.chmod(0o755)
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, "frobnicate", "twice", env=(("PATH", "/nowhere:tool"),))
            await driver.start(one, started)
            assert await exits.first() == Exit(code=0)
            assert output(one) == ["frobnicated twice"]

    async def test_control_stays_in_its_own_folder(self, tmp_path: Path) -> None:
        before = Path.cwd()
        async with driver_at(tmp_path) as (driver, _):
            await driver.start(spec(tmp_path), started)
            assert driver.start_at_once(spec(tmp_path, id="second", cwd=str(tmp_path))) is not None
            assert Path.cwd() == before

    async def test_what_needs_the_spawners_thread_is_not_started_at_once(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, _):
            assert driver.start_at_once(spec(tmp_path, user="nobody")) is None
            assert driver.start_at_once(spec(tmp_path, own_network=True)) is None
            assert driver.start_at_once(spec(tmp_path, id="first")) is not None
            assert driver.start_at_once(spec(tmp_path, id="second")) is None  # in the same turn of the loop
            await asyncio.sleep(0)
            assert driver.start_at_once(spec(tmp_path, id="first")) is None  # it runs
            assert driver.start_at_once(spec(tmp_path, id="second")) is not None

    @pytest.mark.skipif(bool(needs_root), reason=needs_root)
    @pytest.mark.parametrize(("user", "uid", "gid"), [("nobody", 65534, 65534), ("12345:54321", 12345, 54321)])
    async def test_another_user_with_nothing_left_of_ours(self, tmp_path: Path, user: str, uid: int, gid: int) -> None:
        script = "import os;print(os.getresuid(),os.getresgid(),os.getgroups())"
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(
                tmp_path, "/usr/bin/env", "python3", "-c", script, user=user, cwd="/", env=(("PATH", "/usr/bin:/bin"),)
            )
            await driver.start(one, started)
            assert await exits.first() == Exit(code=0)
            assert output(one) == [f"({uid}, {uid}, {uid}) ({gid}, {gid}, {gid}) [{gid}]"]

    @pytest.mark.skipif(bool(needs_root), reason=needs_root)
    async def test_a_volume_folder_belongs_to_the_machines_user(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            volume = tmp_path / "volumes" / "data"
            one = spec(tmp_path, "true", user="nobody", cwd="/", mounts=(Mount(str(volume), "/data", "data"),))
            await driver.start(one, started)
            await exits.first()
            assert (volume.stat().st_uid, stat.S_IMODE(volume.stat().st_mode)) == (65534, 0o700)


class TestWhatCannotStart:
    @pytest.mark.parametrize(
        ("command", "changes", "message"),
        [
            (("no-such-program",), {}, r"command not found: 'no-such-program' \(looked in PATH="),
            (("./missing",), {}, "cannot run './missing' in .*: no such file"),
            (("./data",), {}, "cannot run './data' in .*: not permitted"),
            (("./orphan",), {}, "the interpreter or loader that the file names does not exist"),
            (("./text",), {}, "neither a program nor a script that begins with #!"),
            (("true",), {"cwd": "/no/such/folder"}, "cannot enter its folder /no/such/folder: No such file"),
            (("true",), {"user": "nobody-at-all"}, "user 'nobody-at-all': there is no such account"),
            (("true",), {"user": "1:staff"}, r"expected a name or uid\[:gid\] in numbers"),
        ],
    )
    async def test_says_why(
        self, tmp_path: Path, command: tuple[str, ...], changes: dict[str, Any], message: str
    ) -> None:
        for name, text, mode in (
            ("data", "#!/bin/sh\n", 0o644),
            ("orphan", "#!/no/interpreter\n", 0o755),
            ("text", "hello\n", 0o755),
        ):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(mode)
        async with driver_at(tmp_path) as (driver, exits):
            forked: list[object] = []
            one = spec(tmp_path, *command, **changes)
            driver.prepare(one)
            with pytest.raises(DriverError, match=message):
                await driver.start(one, forked.append)
            assert forked == []
            if one.user is None:
                with pytest.raises(DriverError, match=message):
                    driver.start_at_once(one)
            assert exits.all == []
            assert "not started: " in Path(one.log_path).read_text()
            await driver.start(spec(tmp_path, "true"), started)  # and the next one is none the worse


class TestHowMachinesEnd:
    @pytest.mark.parametrize(
        ("script", "end"), [("exit 0", Exit(code=0)), ("exit 7", Exit(code=7)), ("kill -SEGV $$", Exit(signal=11))]
    )
    async def test_by_themselves_with_code_or_signal_on_record_before_they_are_reaped(
        self, tmp_path: Path, script: str, end: Exit
    ) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, "sh", "-c", script)
            running = await driver.start(one, started)
            assert await exits.first() == end
            found = proc.read_stat(running.pid)
            assert found is not None and found.state == "Z"
            driver.forget(one.id)
            assert proc.read_stat(running.pid) is None

    async def test_one_that_ignores_signals_is_killed_after_the_timeout(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, *python("import signal,time;signal.signal(15,1);print('deaf');time.sleep(1000)"))
            await driver.start(one, started)
            await said(one, "deaf")
            await driver.stop(one.id, signal.SIGTERM, 0.05)
            assert exits.all[0][2] == Exit(signal=signal.SIGKILL)

    async def test_a_frozen_one_handles_its_signal_before_it_is_killed(self, tmp_path: Path) -> None:
        script = (
            "import signal,sys,time\n"
            "signal.signal(15,lambda *_:(print('bye'),sys.exit(3)))\n"
            "print('up')\ntime.sleep(1000)"
        )
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, *python(script))
            await driver.start(one, started)
            await said(one, "up")
            await driver.suspend(one.id)
            await driver.stop(one.id, signal.SIGTERM, 10)
            assert exits.all[0][2] == Exit(code=3)
            assert output(one) == ["up", "bye"]

    async def test_the_signal_reaches_the_whole_group(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, _):
            one = spec(
                tmp_path,
                "sh",
                "-c",
                "trap 'echo shell' TERM; sh -c 'trap \"echo child; exit\" TERM; echo up; sleep 99 & wait' & wait; wait",
            )
            await driver.start(one, started)
            await said(one, "up")
            await driver.stop(one.id, signal.SIGTERM, 10)
            assert sorted(output(one)) == ["child", "shell", "up"]

    async def test_children_that_outlive_the_leader_are_killed_when_it_is_forgotten(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, "sh", "-c", "trap '' TERM; sleep 1000 & echo $!; exit 0")
            await driver.start(one, started)
            await exits.first()
            child = int(output(one)[0])
            assert is_alive(child)
            driver.forget(one.id)
            await until(lambda: not is_alive(child), "the child is killed")

    async def test_a_daemon_that_left_the_session_is_killed_too(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, *python(_DOUBLE_FORK.format("time.sleep(1000)")))
            await driver.start(one, started)
            await exits.first()
            await until(lambda: output(one), "the daemon says its pid")
            daemon = int(output(one)[0])
            driver.forget(one.id)
            await until(lambda: not is_alive(daemon), "the daemon is killed")

    async def test_a_start_waits_until_the_last_runs_stragglers_are_gone(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, *python(_DOUBLE_FORK.format("time.sleep(1000)")))
            await driver.start(one, started)
            await exits.first()
            await until(lambda: output(one), "the daemon says its pid")
            daemon = int(output(one)[0])
            driver.forget(one.id)
            await driver.start(spec(tmp_path, "sleep", "1000"), started)
            assert not is_alive(daemon)

    async def test_machines_of_another_node_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        async with driver_at(tmp_path / "a") as (here, exits), driver_at(tmp_path / "b") as (there, _):
            mine, theirs = spec(tmp_path / "a", "true"), spec(tmp_path / "b", "sleep", "1000")
            neighbour = await there.start(theirs, started)
            await here.start(mine, started)
            await exits.first()
            here.forget(mine.id)
            await here._sweep_task()
            assert here.find_machines() == {}
            assert is_alive(neighbour.pid)

    async def test_a_start_nobody_waits_for_any_more_is_still_told_and_watched(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            forked: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            one = spec(tmp_path, "sh", "-c", "exit 5")
            asking = asyncio.get_running_loop().create_task(driver.start(one, forked.set_result))
            await asyncio.sleep(0)
            asking.cancel()
            await forked
            assert await exits.first() == Exit(code=5)


class TestSuspend:
    # counts as fast as it can, in three processes: leader, child of the group, daemon outside of it
    _BUSY = (
        "import os,time\n"
        "def count(who):\n os.write(1, b'%b %d\\n' % (who, os.getpid()))\n while True: pass\n"  # a line in one piece
        "if os.fork()==0: count(b'child')\n"
        "if os.fork()==0:\n os.setsid()\n if os.fork()==0: count(b'daemon')\n os._exit(0)\n"
        "os.wait(); count(b'leader')\n"
    )

    async def test_cpu_time_of_every_process_stands_still_and_goes_on_after_resume(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, _):
            one = spec(tmp_path, *python(self._BUSY))
            await driver.start(one, started)
            await until(lambda: len(output(one)) == 3, "all three run")
            pids = [int(line.split()[1]) for line in output(one)]
            await driver.suspend(one.id)
            frozen = _cpu(pids)
            await asyncio.sleep(0.1)
            assert _cpu(pids) == frozen
            await driver.resume(one.id)
            await until(lambda: all(now > then for now, then in zip(_cpu(pids), frozen, strict=True)), "all go on")

    async def test_a_process_that_forks_all_the_time_is_caught_whole(self, tmp_path: Path) -> None:
        script = "import os\nprint('up')\nwhile True:\n if os.fork()==0:\n  os.setpgid(0,0); os._exit(0)\n os.wait()"
        async with driver_at(tmp_path) as (driver, _):
            one = spec(tmp_path, *python(script))
            running = await driver.start(one, started)
            await said(one, "up")
            await driver.suspend(one.id)
            assert {stat.state for stat in proc.members(running.pid, str(tmp_path), one.id)} == {"T"}

    async def test_a_resume_in_the_middle_wins(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, _):
            one = spec(tmp_path, *python(self._BUSY))
            await driver.start(one, started)
            await until(lambda: len(output(one)) == 3, "all three run")
            pids = [int(line.split()[1]) for line in output(one)]
            suspending = asyncio.get_running_loop().create_task(driver.suspend(one.id))
            await asyncio.sleep(0)
            await driver.resume(one.id)
            with pytest.raises(DriverError, match="was resumed while it was being suspended"):
                await suspending
            before = _cpu(pids)
            await until(lambda: all(now > then for now, then in zip(_cpu(pids), before, strict=True)), "all run")

    async def test_one_that_is_killed_while_frozen_is_reported(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path)
            running = await driver.start(one, started)
            await driver.suspend(one.id)
            os.kill(running.pid, signal.SIGKILL)
            assert await exits.first() == Exit(signal=signal.SIGKILL)


class TestStats:
    async def test_add_up_the_whole_session(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, _):
            alone = spec(tmp_path, *python("print('up');import time;time.sleep(1000)"), id="alone")
            pair = spec(tmp_path, *python("import os,time;os.fork();print('up');time.sleep(1000)"), id="pair")
            for one, lines in ((alone, 1), (pair, 2)):
                await driver.start(one, started)
                await until(lambda one=one, lines=lines: len(output(one)) == lines, "it is up")  # type: ignore[misc]
            one_process, two_processes = driver.stats(alone.id), driver.stats(pair.id)
            assert one_process is not None and two_processes is not None
            assert two_processes.rss_bytes > 1.3 * one_process.rss_bytes > 0
            assert (one_process.open_files, two_processes.open_files) == (3, 6)
            assert driver.stats(MachineId("stranger")) is None


def _cpu(pids: list[int]) -> list[int]:
    return [found.cpu_ticks if (found := proc.read_stat(pid)) else -1 for pid in pids]


def test_a_process_name_with_spaces_and_parentheses_is_read_right(tmp_path: Path) -> None:
    name = tmp_path / "a) Z 1 (b"
    name.symlink_to("/bin/sleep")
    pid = os.posix_spawn(name, ["x", "1000"], {})
    try:
        found = proc.read_stat(pid)
        assert found is not None and (found.parent, found.group) == (os.getpid(), os.getpgid(0))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def test_the_driver_works_where_threads_may_not_have_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(flags: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("proxy.namespace.unshare", refuse)
    (tmp_path / "app").mkdir()
    async with driver_at(tmp_path) as (driver, exits):
        one = spec(tmp_path, "pwd", cwd=str(tmp_path / "app"))
        await driver.start(one, started)
        assert await exits.first() == Exit(code=0)
        assert output(one) == [str(tmp_path / "app")]
        with pytest.raises(DriverError, match="cannot have a network of its own"):
            await driver.start(spec(tmp_path, id="other", own_network=True), started)


async def test_a_log_that_cannot_be_opened_is_a_driver_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with driver_at(tmp_path) as (driver, _):
        with pytest.raises(DriverError, match=r"cannot open its log .*: Not a directory"):
            await driver.start(spec(tmp_path, log_path=str(tmp_path / "file" / "m.log")), started)


async def test_a_full_disk_keeps_neither_the_start_nor_the_exit_from_being_told(tmp_path: Path) -> None:
    async with driver_at(tmp_path) as (driver, exits):
        await driver.start(spec(tmp_path, "sh", "-c", "exit 4", log_path="/dev/full"), started)
        assert await exits.first() == Exit(code=4)
