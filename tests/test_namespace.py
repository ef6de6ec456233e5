"""Sockets inside another process's network, from a thread that must come home whatever happens."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from proxy import namespace
from proxy.machines.volumes import network_support

pytestmark = pytest.mark.skipif(network_support() is not None, reason=f"network namespaces: {network_support()}")


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process with a network of its own, loopback up, nobody listening."""
    script = (
        "import os;from proxy import namespace as n;n.unshare(n.CLONE_NEWNET);n.loopback_up();"
        "print('up',flush=True);os.read(0,1)"
    )
    with subprocess.Popen(
        ["python3", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        yield process.pid
        process.communicate(b"x")


def _here() -> str:
    return os.readlink("/proc/thread-self/ns/net")


def test_the_socket_is_there_and_the_thread_is_here(stranger: int) -> None:
    before = _here()
    with socket.create_server(("127.0.0.1", 0)) as ours, namespace.socket_in(stranger) as theirs:
        assert _here() == before
        assert not theirs.getblocking()
        theirs.setblocking(True)
        with pytest.raises(ConnectionRefusedError):  # our listener is out of its reach
            theirs.connect(ours.getsockname())


def test_both_families_are_on_offer(stranger: int) -> None:
    with namespace.socket_in(stranger, socket.AF_INET6) as theirs:
        assert theirs.family == socket.AF_INET6


def test_a_process_without_a_network_of_its_own_is_refused() -> None:
    before = _here()
    with pytest.raises(ProcessLookupError, match="has no network of its own"):
        namespace.socket_in(os.getpid())
    assert _here() == before


def test_a_process_that_is_gone_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        namespace.socket_in(2**22 - 1)


def test_a_failing_socket_call_brings_the_thread_home(stranger: int) -> None:
    before = _here()
    with pytest.raises(OSError, match="not supported"):
        namespace.socket_in(stranger, 44)
    assert _here() == before


def test_no_descriptor_is_left_behind(stranger: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        namespace.socket_in(stranger).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_thread_that_cannot_come_home_ends_the_process() -> None:
    child = os.fork()
    if child == 0:
        os.close(2)
        namespace.return_home(os.open(os.devnull, os.O_RDWR))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 70


def test_errors_name_what_was_tried() -> None:
    with pytest.raises(OSError, match=r"setns\(0x40000000\): Bad file descriptor"):
        namespace.setns(-1, namespace.CLONE_NEWNET)
    with pytest.raises(OSError, match="mount /no/such on /no/where: No such file or directory"):
        namespace.mount("/no/such", "/no/where", None, namespace.MS_BIND)


def test_what_is_started_inherits_no_ambient_capability() -> None:
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    code = (
        "import os;from proxy import namespace as n;"
        "status=lambda:[l for l in open('/proc/self/status') if l.startswith('Cap')];"
        "before=status();n.drop_ambient_capabilities();after=status();"
        "print(before[4].split()[1], after[4].split()[1], before[2]==after[2], flush=True);"
        "os.execv('/bin/grep', ['grep', 'CapEff', '/proc/self/status'])"
    )
    caps = ["--inh-caps", "+net_bind_service", "--ambient-caps", "+net_bind_service"]
    as_nobody = [setpriv, "--reuid", "65534", "--clear-groups", *caps]
    readable = subprocess.run([*as_nobody, sys.executable, "-c", "import proxy"], capture_output=True, check=False)
    if readable.returncode:
        pytest.skip("another user cannot read this folder")
    told = subprocess.run([*as_nobody, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == [f"{1 << 10:016x}", "0" * 16, "True", "CapEff:", "0" * 16]
