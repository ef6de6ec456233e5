"""Volumes at their destination and networks of a machine's own; what of it can't be had is said."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from proxy import namespace
from proxy.machines import volumes
from proxy.machines.driver import DriverError, Exit, Mount
from proxy.namespace import socket_in
from tests.machines.support import (
    WAIT_S,
    driver_at,
    needs_mounts,
    needs_network,
    output,
    python,
    said,
    spec,
    started,
    until,
)

_LISTEN = (
    "import socket\ns=socket.create_server(('127.0.0.1',8080))\nprint('up')\nwhile True:\n s.accept()[0].sendall(b'{}')"
)

with_mounts = pytest.mark.skipif(bool(needs_mounts), reason=needs_mounts)
with_network = pytest.mark.skipif(bool(needs_network), reason=needs_network)


def _mount(tmp_path: Path, destination: str | Path, name: str = "data") -> Mount:
    return Mount(str(tmp_path / "volumes" / name), str(destination), name)


@with_mounts
class TestVolumes:
    async def test_at_a_folder_that_exists_hides_it_from_the_machine_only(self, tmp_path: Path) -> None:
        here = tmp_path / "storage"
        here.mkdir()
        (here / "of-the-host").touch()
        mount = _mount(tmp_path, here)
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(
                tmp_path, "sh", "-c", f"ls {here}; echo kept > {here}/note; echo $FLY_VOLUME_DATA", mounts=(mount,)
            )
            assert volumes.mount_support(one.mounts) == []
            await driver.start(one, started)
            assert await exits.first() == Exit(code=0)
            assert output(one) == [mount.source]
            assert os.listdir(here) == ["of-the-host"]
            assert (Path(mount.source) / "note").read_text() == "kept\n"

    async def test_at_a_folder_below_the_root_that_does_not_exist_leaves_the_host_as_it_was(
        self, tmp_path: Path
    ) -> None:
        before = sorted(os.listdir("/"))
        missing = f"/wakefront-{os.getpid()}"
        one = spec(
            tmp_path,
            "sh",
            "-c",
            f"echo kept > {missing}/deep/note; ls / | wc -l; cat /proc/self/comm; readlink /bin; echo $0; pwd",
            mounts=(_mount(tmp_path, f"{missing}/deep"),),
        )
        async with driver_at(tmp_path) as (driver, exits):
            await driver.start(one, started)
            assert await exits.first() == Exit(code=0)
            link = [os.readlink("/bin")] if os.path.islink("/bin") else []
            visible = [name for name in before if not name.startswith(".")]
            assert output(one) == [str(len(visible) + 1), "cat", *link, "sh", str(tmp_path)]
        assert sorted(os.listdir("/")) == before
        assert (tmp_path / "volumes" / "data" / "note").read_text() == "kept\n"

    async def test_writes_elsewhere_reach_the_host(self, tmp_path: Path) -> None:
        (tmp_path / "app").mkdir()
        mounts = (_mount(tmp_path, "/wakefront-missing"), _mount(tmp_path, tmp_path / "app" / "sub", "other"))
        async with driver_at(tmp_path) as (driver, exits):
            script = f"echo 1 > {tmp_path}/app/sub/inside; echo 2 > {tmp_path}/beside; touch /wakefront-missing/here"
            await driver.start(spec(tmp_path, "sh", "-c", script, mounts=mounts), started)
            assert await exits.first() == Exit(code=0)
        assert (tmp_path / "volumes" / "other" / "inside").read_text() == "1\n"
        assert (tmp_path / "beside").read_text() == "2\n"
        assert (tmp_path / "volumes" / "data" / "here").exists()
        assert os.listdir(tmp_path / "app") == []

    async def test_what_is_kept_in_a_volume_is_there_at_the_next_start(self, tmp_path: Path) -> None:
        one = spec(
            tmp_path, "sh", "-c", "cat /data-x/n; echo again >> /data-x/n", mounts=(_mount(tmp_path, "/data-x"),)
        )
        async with driver_at(tmp_path) as (driver, exits):
            for _ in range(2):
                await driver.start(one, started)
                await exits.first()
                exits.all.clear()
                driver.forget(one.id)
        assert [line for line in output(one) if "No such" not in line] == ["again"]

    async def test_a_volume_folder_made_anew_is_the_one_that_is_bound(self, tmp_path: Path) -> None:
        mount = _mount(tmp_path, "/data-x")
        one = spec(tmp_path, "sh", "-c", "echo new > /data-x/note", mounts=(mount,))
        async with driver_at(tmp_path) as (driver, exits):
            driver.prepare(one)
            await driver.start(one, started)
            await exits.first()
            driver.forget(one.id)
            os.rename(mount.source, tmp_path / "old")
            exits.all.clear()
            await driver.start(one, started)
            await exits.first()
        assert (Path(mount.source) / "note").read_text() == "new\n"

    async def test_one_that_cannot_be_bound_is_named_in_the_environment_only(self, tmp_path: Path) -> None:
        folder = tmp_path / "app"
        folder.mkdir()
        (folder / "server.py").touch()
        mount = _mount(tmp_path, folder / "data", "my-data")
        (reason,) = volumes.mount_support([mount])
        assert reason.startswith(f"volume destination {folder}/data does not exist: make that folder, or ")
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, "sh", "-c", "echo kept > $FLY_VOLUME_MY_DATA/note", mounts=(mount,))
            await driver.start(one, started)
            assert await exits.first() == Exit(code=0)
        assert os.listdir(folder) == ["server.py"]
        assert (Path(mount.source) / "note").read_text() == "kept\n"

    async def test_and_another_user_together(self, tmp_path: Path) -> None:
        one = spec(
            tmp_path, "sh", "-c", "id -un; echo kept > /data-x/note", user="nobody", cwd="/data-x",
            mounts=(_mount(tmp_path, "/data-x"),),
        )  # fmt: skip
        async with driver_at(tmp_path) as (driver, exits):
            await driver.start(one, started)
            assert await exits.first() == Exit(code=0)
            assert output(one) == ["nobody"]

    @pytest.mark.parametrize(
        ("destination", "reason"),
        [
            ("data", "'data' is not an absolute folder other than /"),
            ("/", "'/' is not an absolute folder other than /"),
            ("/proc/data", "lies in a folder of the kernel's"),
            ("/etc/passwd", "exists and is no folder"),
            ("/etc/passwd/data", "/etc/passwd is no folder"),
        ],
    )
    def test_destinations_that_cannot_be(self, tmp_path: Path, destination: str, reason: str) -> None:
        (said_reason,) = volumes.mount_support([_mount(tmp_path, destination)])
        assert reason in said_reason


async def test_without_permission_volumes_are_in_the_environment_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(flags: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("proxy.namespace.unshare", refuse)
    mount = _mount(tmp_path, "/data")
    assert volumes.mount_support([mount]) == [
        "volumes are not bound at their destination: a mount namespace is not permitted here "
        "(Operation not permitted); it needs CAP_SYS_ADMIN"
    ]
    assert volumes.mount_support([]) == []
    assert volumes.network_support() is not None
    async with driver_at(tmp_path) as (driver, exits):
        one = spec(tmp_path, "sh", "-c", "echo kept > $FLY_VOLUME_DATA/note", mounts=(mount,))
        await driver.start(one, started)
        assert await exits.first() == Exit(code=0)
    assert (Path(mount.source) / "note").read_text() == "kept\n"


def test_a_volume_folder_that_cannot_be_made_is_a_driver_error(tmp_path: Path) -> None:
    (tmp_path / "volumes").touch()
    with pytest.raises(DriverError, match="volume data: cannot make its folder"):
        volumes.make_folders([_mount(tmp_path, "/data")], None)


@with_network
class TestOwnNetwork:
    async def test_two_machines_listen_on_the_same_port_and_are_told_apart(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, _):
            for name in ("one", "two"):
                machine = spec(tmp_path, *python(_LISTEN.format(name)), id=name, own_network=True)
                driver.prepare(machine)
                running = await driver.start(machine, started)
                assert running.netns_pid == running.pid
                await said(machine, "up")
                assert await _ask(running.pid) == name.encode()
            assert len(driver.find_machines()) == 2
            assert all(running.netns_pid == running.pid for running in driver.find_machines().values())

    async def test_it_holds_nothing_but_loopback_and_is_kept_over_starts(self, tmp_path: Path) -> None:
        script = "import os;print(os.listdir('/proc/self/net/dev_snmp6'));print(os.stat('/proc/self/ns/net').st_ino)"
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, *python(script), own_network=True)
            for _ in range(2):
                await driver.start(one, started)
                await exits.first()
                exits.all.clear()
                driver.forget(one.id)
            devices, first, _, second = output(one)
            assert "eth" not in devices
            assert first == second
            assert int(first) != os.stat("/proc/self/ns/net").st_ino

    async def test_it_is_given_up_when_the_machine_is_released(self, tmp_path: Path) -> None:
        async with driver_at(tmp_path) as (driver, exits):
            one = spec(tmp_path, "readlink", "/proc/self/ns/net", own_network=True)
            await driver.start(one, started)
            await exits.first()
            before = _namespace_files()
            driver.forget(one.id)
            driver.release(one.id)
            await driver.start(spec(tmp_path, "true", id="next"), started)  # its thread has done the release by now
            assert _namespace_files() == before - 1

    async def test_network_and_volumes_together(self, tmp_path: Path) -> None:
        if needs_mounts:
            pytest.skip(needs_mounts)
        script = "echo kept > /data-x/note; ls /sys/class/net >/dev/null; readlink /proc/self/ns/net"
        async with driver_at(tmp_path) as (driver, exits):
            mounts = (_mount(tmp_path, "/data-x"),)
            await driver.start(spec(tmp_path, "sh", "-c", script, own_network=True, mounts=mounts), started)
            assert await exits.first() == Exit(code=0)
            assert output(spec(tmp_path)) != [os.readlink("/proc/self/ns/net")]
            plain = spec(tmp_path, "readlink", "/proc/self/ns/net", "/proc/self/ns/mnt", id="plain")
            await driver.start(plain, started)  # the thread came home
            await until(lambda: len(exits.all) == 2, "both ended")
            assert output(plain) == [os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/mnt")]

    async def test_a_thread_that_cannot_come_home_is_replaced_and_the_machine_it_started_is_not_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = (spec(tmp_path, id=name, own_network=True) for name in ("one", "two"))
        home, real = os.stat("/proc/self/ns/net").st_ino, namespace.setns

        def stay(fd: int, kind: int) -> None:
            if os.fstat(fd).st_ino == home:
                raise PermissionError(1, "Operation not permitted")
            real(fd, kind)

        async with driver_at(tmp_path) as (driver, exits):
            await driver.start(spec(tmp_path, "true", id="first"), started)
            driver.prepare(one)
            await exits.first()
            with monkeypatch.context() as patch:
                await driver.start(spec(tmp_path, id="warm"), started)  # the preparation is done by now
                patch.setattr(namespace, "setns", stay)
                running = await driver.start(one, started)
                with pytest.raises(DriverError, match="lost its namespace; try again"):
                    await driver.start(two, started)
            assert running.netns_pid
            assert (await driver.start(two, started)).netns_pid
            plain = spec(tmp_path, "readlink", "/proc/self/ns/net", id="plain")
            await driver.start(plain, started)
            await said(plain, os.readlink("/proc/self/ns/net"))


async def _ask(pid: int) -> bytes:
    connection = socket_in(pid)
    loop = asyncio.get_running_loop()
    with connection:
        async with asyncio.timeout(WAIT_S):
            await loop.sock_connect(connection, ("127.0.0.1", 8080))
            return await loop.sock_recv(connection, 100)


def _namespace_files() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread's, closed meanwhile
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("net:")
    return found
