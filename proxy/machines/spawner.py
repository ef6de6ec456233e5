"""The thread that makes processes: where they start, in which namespaces, as whom, with which files open.

A thread of its own, because working directory and namespaces belong to a thread once it has unshared them: it goes
where the machine shall start, spawns there (vfork, so that control's size does not matter), and goes home. If it can't
go home it refuses further work (`is_lost`) and is replaced. It watches and reaps nothing.

A machine that needs no namespaces and no other user is better started where one stands (`Doorstep`): handing it to the
thread and back cost the client who waits another 0.3 ms.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proxy import namespace
from proxy.machines import posix_spawn, proc, volumes
from proxy.machines.driver import DriverError, MachineSpec, Running
from proxy.model import MachineId

_log = logging.getLogger(__name__)

_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
_OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)  # what machines get: control raises its own later


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that exists. Our child: its pid stays until the driver reaps it. `pidfd` is the driver's to close."""

    running: Running
    pidfd: int


@dataclass(slots=True)
class _Place:
    """Namespaces made for a machine before it starts; they serve all its starts. -1: the host's."""

    mounts: tuple[tuple[object, ...], ...]
    net: int = -1
    mnt: int = -1


class Spawner:
    """Runs jobs one after the other on its thread; a job's answer comes through a callback on that thread."""

    def __init__(self, node_dir: str) -> None:
        self.is_lost = False
        self._node_dir = node_dir
        self._places: dict[MachineId, _Place] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="machine spawner", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """End the thread after the jobs it has, and wait for that. Machines go on."""
        self.leave()
        self._thread.join(timeout=5)

    def leave(self) -> None:
        self._jobs.put(None)

    # what follows runs on the thread only

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # inherited by what is forked rather than spawned
        try:
            namespace.unshare(namespace.CLONE_FS)
            self._can_move = True
        except OSError:  # as in a container without privileges; namespaces are out of reach there too
            self._can_move = False
        # Python opens nothing that a child inherits; whoever started us may have
        self._inherited = _inheritable_files()
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._home_net = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._home_mnt = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        while (job := self._jobs.get()) is not None:
            job()
        for machine in list(self._places):
            self.release(machine)
        for fd in (self._null, self._home_net, self._home_mnt):
            os.close(fd)

    def prepare(self, spec: MachineSpec) -> _Place:
        """Make the namespaces that this machine will start in, unless they are there and still right."""
        self._refuse_if_lost(spec)
        volumes.make_folders(spec.mounts, spec.user)
        seen = tuple((one, *_identity(one.source)) for one in spec.mounts)
        place = self._places.get(spec.id)
        if place is not None and place.mounts == seen and (place.net >= 0) == spec.own_network:
            return place
        self.release(spec.id)
        place = self._places[spec.id] = _Place(seen)
        if spec.own_network:
            place.net = self._make_network(spec)
        if spec.mounts:
            place.mnt = self._make_view(spec)
        self._refuse_if_lost(spec)
        return place

    def _refuse_if_lost(self, spec: MachineSpec) -> None:
        if self.is_lost:
            raise DriverError(f"machine {spec.id}: the thread that starts machines lost its namespace; try again")

    def release(self, machine: MachineId) -> None:
        place = self._places.pop(machine, None)
        if place is not None:
            for fd in (place.net, place.mnt):
                if fd >= 0:
                    os.close(fd)

    def spawn(self, spec: MachineSpec, log_fd: int) -> Spawned:
        """Start the machine's command. Raises DriverError that says what is wrong with it."""
        environ = environment(spec, self._node_dir)
        place = self.prepare(spec)
        output = log_fd if log_fd >= 0 else self._null
        with self._inside(place):
            try:
                if self._can_move:
                    os.chdir(spec.cwd)
                else:
                    os.listdir(spec.cwd)
            except OSError as error:
                raise DriverError(f"machine {spec.id}: cannot enter its folder {spec.cwd}: {error.strerror}") from error
            path = find_program(spec, environ)
            try:
                if self._can_move and spec.user is None:
                    pid = self._spawn(spec, path, environ, output)
                else:
                    pid = self._fork(spec, path, environ, output)
            except (OSError, ValueError) as error:
                raise DriverError(_why_not(spec, path, error)) from error
        return _identify(pid, spec)

    def _spawn(self, spec: MachineSpec, path: str, environ: dict[str, str], output: int) -> int:
        """Where this thread stands."""
        files = {0: self._null, 1: output, 2: output}
        return posix_spawn.spawn(path, spec.command, environ, None, files, self._inherited)

    def _fork(self, spec: MachineSpec, path: str, environ: dict[str, str], output: int) -> int:
        """As another user, or where the thread can't change folder. With a user it is a real fork, slower the larger
        control is: changing users between vfork and exec is not on offer."""
        uid, gid, groups = (None, None, None) if spec.user is None else volumes.account(spec.user)
        child = subprocess.Popen(
            spec.command,
            executable=path,
            env=environ,
            cwd=spec.cwd,
            stdin=self._null,
            stdout=output,
            stderr=output,
            start_new_session=True,
            user=uid,
            group=gid,
            extra_groups=groups,
        )
        # It would reap the process some day on its own; here the driver does, after the exit was recorded.
        child.returncode = 0
        return child.pid

    @contextlib.contextmanager
    def _inside(self, place: _Place) -> Iterator[None]:
        try:
            if place.net >= 0:
                namespace.setns(place.net, namespace.CLONE_NEWNET)
            if place.mnt >= 0:
                namespace.setns(place.mnt, namespace.CLONE_NEWNS)
            yield
        finally:
            self._go_home(place.net >= 0, place.mnt >= 0)

    def _go_home(self, net: bool, mnt: bool) -> None:
        try:
            if mnt:
                namespace.setns(self._home_mnt, namespace.CLONE_NEWNS)
            if net:
                namespace.setns(self._home_net, namespace.CLONE_NEWNET)
        except OSError as error:  # no exception: a machine that was spawned here must still be told of
            self.is_lost = True
            _log.error("the thread that starts machines cannot leave a machine's namespace (%s): replacing it", error)
            return
        if self._can_move:
            os.chdir("/")  # hold no folder of a machine's that somebody may want to unmount

    def _make_network(self, spec: MachineSpec) -> int:
        """A network with nothing but loopback in it."""
        try:
            namespace.unshare(namespace.CLONE_NEWNET)
        except OSError as error:
            raise DriverError(
                f"machine {spec.id}: cannot have a network of its own ({error.strerror}); it needs CAP_SYS_ADMIN"
            ) from error
        try:
            namespace.loopback_up()
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DriverError(f"machine {spec.id}: cannot bring up loopback in its network: {error}") from error
        finally:
            self._go_home(net=True, mnt=False)

    def _make_view(self, spec: MachineSpec) -> int:
        """A view of the files with its volumes in place, or -1 where it is not permitted (`mount_support` tells)."""
        staging = os.path.join(self._node_dir, "run", "mirror")
        os.makedirs(staging, exist_ok=True)
        try:
            volumes.enter_private_view(spec.mounts, staging)
            return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            return -1
        except OSError as error:
            raise DriverError(f"machine {spec.id}: cannot bind its volumes: {error}") from error
        finally:
            self._go_home(net=False, mnt=_is_elsewhere(self._home_mnt))


class Doorstep:
    """Starts machines that need no place of their own, on the caller's thread, which goes nowhere."""

    def __init__(self, node_dir: str) -> None:
        self._node_dir = node_dir
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._inherited = _inheritable_files()

    @staticmethod
    def takes(spec: MachineSpec) -> bool:
        return posix_spawn.CAN_MOVE and spec.user is None and not spec.own_network and not spec.mounts

    def spawn(self, spec: MachineSpec, log_fd: int) -> Spawned:
        """As Spawner.spawn."""
        environ = environment(spec, self._node_dir)
        output = log_fd if log_fd >= 0 else self._null
        path = find_program(spec, environ)
        files = {0: self._null, 1: output, 2: output}
        try:
            pid = posix_spawn.spawn(path, spec.command, environ, spec.cwd, files, self._inherited)
        except (OSError, ValueError) as error:
            try:
                os.listdir(spec.cwd)
            except OSError as why:
                raise DriverError(f"machine {spec.id}: cannot enter its folder {spec.cwd}: {why.strerror}") from error
            raise DriverError(_why_not(spec, path, error)) from error
        return _identify(pid, spec)

    def close(self) -> None:
        os.close(self._null)


def environment(spec: MachineSpec, node_dir: str) -> dict[str, str]:
    """What control gave it, and what this driver needs in order to find the machine again."""
    return {
        **volumes.variables(spec.mounts),
        **dict(spec.env),
        proc.MACHINE_VARIABLE: spec.id,
        proc.APP_VARIABLE: spec.app,
        proc.NODE_VARIABLE: node_dir,
    }


def find_program(spec: MachineSpec, environ: dict[str, str]) -> str:
    """argv[0] as the machine's own PATH has it; a name with a slash stays, relative to the machine's folder."""
    if not spec.command or not spec.command[0]:
        raise DriverError(f"machine {spec.id}: its command is empty")
    name = spec.command[0]
    if "/" in name:
        return name
    search = environ.get("PATH", _DEFAULT_PATH)
    for folder in search.split(":"):
        path = os.path.join(spec.cwd, folder, name)
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise DriverError(f"machine {spec.id}: command not found: {name!r} (looked in PATH={search})")


def _why_not(spec: MachineSpec, path: str, error: Exception) -> str:
    what = f"machine {spec.id}: cannot run {path!r} in {spec.cwd}"
    if isinstance(error, FileNotFoundError):
        exists = os.path.exists(os.path.join(spec.cwd, path))
        hint = "the interpreter or loader that the file names does not exist" if exists else "no such file"
        return f"{what}: {hint}"
    if isinstance(error, PermissionError) and spec.user is not None:
        return f"{what} as user {spec.user!r}: not permitted (a change of user needs root; the file must be executable)"
    if isinstance(error, PermissionError):
        return f"{what}: not permitted (is the file executable?)"
    if isinstance(error, OSError) and error.errno == 8:  # ENOEXEC
        return f"{what}: neither a program nor a script that begins with #!"
    return f"{what}: {error}"


def _identify(pid: int, spec: MachineSpec) -> Spawned:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:  # out of descriptors: a machine that can't be watched may not run
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise DriverError(f"machine {spec.id}: cannot watch its process: {error.strerror}") from error
    with contextlib.suppress(OSError):  # another user's, or it has ended
        resource.prlimit(pid, resource.RLIMIT_NOFILE, _OPEN_FILES)
    stat = proc.read_stat(pid)
    assert stat is not None  # it is our child and not reaped
    return Spawned(Running(pid, stat.start_ticks, netns_pid=pid if spec.own_network else 0), pidfd)


def _inheritable_files() -> list[int]:
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # closed meanwhile by another thread
            if fd > 2 and os.get_inheritable(fd):
                found.append(fd)
    return found


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _is_elsewhere(home_mnt: int) -> bool:
    return not os.path.samestat(os.stat("/proc/thread-self/ns/mnt"), os.fstat(home_mnt))
