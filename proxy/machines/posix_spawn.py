"""posix_spawn(3) with what Python's own leaves out: the child's working directory.

The child has nothing of ours but what is named here. vfork underneath, so that the size of this process does not
matter: it stands still until the program has been loaded, 0.3 to 0.7 ms. The interpreter lock is kept for that long.
Where it was let go, another thread at work (one that looks through /proc after a stop) took it, and the processor:
2 to 10 ms instead.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Mapping, Sequence

_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80
_ROOM = 1024  # bytes; the C types have at most 336

_libc = ctypes.PyDLL(None)  # keeps the lock

#: Whether a child can be given a working directory (glibc 2.29, musl 1.1.24).
CAN_MOVE = hasattr(_libc, "posix_spawn_file_actions_addchdir_np")


def _attributes() -> ctypes.Array[ctypes.c_char]:
    """A session of its own, no signal blocked, none ignored."""
    made, signals = ctypes.create_string_buffer(_ROOM), ctypes.create_string_buffer(_ROOM)
    _check(_libc.posix_spawnattr_init(made))
    _check(_libc.posix_spawnattr_setflags(made, ctypes.c_short(_SETSIGDEF | _SETSIGMASK | _SETSID)))
    _libc.sigemptyset(signals)
    _check(_libc.posix_spawnattr_setsigmask(made, signals))
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        _libc.sigaddset(signals, int(number))
    _check(_libc.posix_spawnattr_setsigdefault(made, signals))
    return made


def spawn(
    path: str, command: Sequence[str], environ: Mapping[str, str], cwd: str | None, files: Mapping[int, int],
    closed: Iterable[int] = (),
) -> int:  # fmt: skip
    """Start a program and return its pid. `files`: the child's descriptor -> ours. `cwd` None: where the caller stands.

    The child does not get what is in `closed`, unless `files` gives it: a number may have come to mean another file.

    Raises OSError (which step it was is not told), ValueError for a text with a NUL in it.
    """
    actions = ctypes.create_string_buffer(_ROOM)
    _check(_libc.posix_spawn_file_actions_init(actions))
    try:
        for descriptor in set(closed).difference(files.values()):
            _check(_libc.posix_spawn_file_actions_addclose(actions, descriptor))
        for theirs, ours in files.items():
            _check(_libc.posix_spawn_file_actions_adddup2(actions, ours, theirs))
        if cwd is not None:
            _check(_libc.posix_spawn_file_actions_addchdir_np(actions, _bytes(cwd)))
        pid = ctypes.c_int()
        variables = [f"{name}={value}" for name, value in environ.items()]
        _check(
            _libc.posix_spawn(
                ctypes.byref(pid), _bytes(path), actions, _ATTRIBUTES, _strings(command), _strings(variables)
            )
        )
        return pid.value
    finally:
        _libc.posix_spawn_file_actions_destroy(actions)


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*map(_bytes, texts), None)


def _bytes(text: str) -> bytes:
    found = os.fsencode(text)
    if b"\0" in found:
        raise ValueError("embedded null byte")
    return found


def _check(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))


_ATTRIBUTES = _attributes()
