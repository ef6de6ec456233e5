"""Linux namespaces: the few system calls Python 3.11 lacks, and a socket made inside another process's network.

A machine with a network of its own can only be reached by a socket that was created in that network; where the socket
is used later does not matter. `socket_in` is for the edge's loop thread, the rest is for whoever starts machines.
Needs CAP_SYS_ADMIN; every failure is an OSError that names what was tried.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000

MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19

_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.prctl.argtypes = (ctypes.c_int, *([ctypes.c_ulong] * 4))
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)


def drop_ambient_capabilities() -> None:
    """Have what this process starts from now on inherit no capability that a service manager gave it (prctl(2)).

    For the calling thread and the threads that it starts. The process itself keeps what it has. Raises OSError.
    """
    if _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0:
        raise _error("prctl(PR_CAP_AMBIENT)")


def unshare(flags: int) -> None:
    """Give the calling thread namespaces (or a working directory, CLONE_FS) of its own."""
    if _libc.unshare(flags) != 0:
        raise _error(f"unshare(0x{flags:x})")


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into the namespace that `fd` names."""
    if _libc.setns(fd, kind) != 0:
        raise _error(f"setns(0x{kind:x})")


def mount(source: str | None, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2), in the calling thread's mount namespace."""
    if _libc.mount(_bytes(source), _bytes(target), _bytes(fstype), flags, _bytes(data)) != 0:
        raise _error(f"mount {source or fstype or 'propagation'} on {target}")


def loopback_up() -> None:
    """Bring up `lo` in the calling thread's network; a new network namespace has it down, without addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def socket_in(netns_pid: int, family: int = socket.AF_INET) -> socket.socket:
    """A non-blocking TCP socket in the network namespace of a process. Raises OSError; costs about 25 µs.

    The namespace is opened anew each time, as a pid may be reused; one that turns out to be our own is refused, since
    its loopback addresses are those of other programs. The calling thread is moved there and back: if the way back
    fails, the process ends, for everything it opened afterwards would be in the wrong network.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/proc/{netns_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.path.samestat(os.fstat(there), os.fstat(home)):
                raise ProcessLookupError(f"process {netns_pid} has no network of its own: the machine is gone")
            setns(there, CLONE_NEWNET)
            try:
                return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            finally:
                return_home(home)
        finally:
            os.close(there)
    finally:
        os.close(home)


def return_home(home: int) -> None:
    """Back to the network this thread came from, or the end of the process."""
    if _libc.setns(home, CLONE_NEWNET) != 0:
        os.write(2, b"cannot return to the own network namespace; giving up this process\n")
        os._exit(70)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
