"""Volumes: folders under data_dir that a machine sees at their destination, in a mount namespace of its own.

The host sees nothing of it: an existing destination is bound over inside the namespace only. One that does not exist
would have to be made on the host, which we never do. Instead its nearest existing parent is mirrored, inside the
namespace: a tmpfs with each entry of the parent bound in place, and the missing folder added. What a machine writes
directly into a mirrored folder would be lost, so only `/` and folders that hold nothing but folders are mirrored (an
overlay would lose more: every write below it). Where neither is possible the machine has the folder's path in
`FLY_VOLUME_<NAME>`, which the process driver always sets, and `mount_support` says why.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import threading
from collections.abc import Callable, Iterable

from proxy import namespace
from proxy.machines.driver import DriverError, Mount

_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")
_MAX_MIRRORED = 512


def variables(mounts: Iterable[Mount]) -> dict[str, str]:
    """FLY_VOLUME_<NAME> for each: the folder on the host, bound or not."""
    return {"FLY_VOLUME_" + re.sub(r"[^A-Z0-9]", "_", one.name.upper()): one.source for one in mounts}


def mount_support(mounts: Iterable[Mount]) -> list[str]:
    """Why volumes will not be seen at their destination; empty when all will. Asks the kernel, changes nothing."""
    mounts = tuple(mounts)
    if not mounts:
        return []
    reason = _not_permitted("a mount namespace", namespace.CLONE_NEWNS)
    if reason is not None:
        return [f"volumes are not bound at their destination: {reason}"]
    return [why for one in mounts if (why := _obstacle(one.destination)) is not None]


def network_support() -> str | None:
    """Why machines can't have a network namespace of their own; None when they can."""
    return _not_permitted("a network namespace", namespace.CLONE_NEWNET)


def make_folders(mounts: Iterable[Mount], user: str | None) -> None:
    """The volumes' folders on the host, those that are missing; they belong to the machine's user."""
    for one in mounts:
        if os.path.isdir(one.source):
            continue
        try:
            os.makedirs(os.path.dirname(one.source), exist_ok=True)
            os.mkdir(one.source, 0o700)
            if user is not None:
                uid, gid, _ = account(user)
                shutil.chown(one.source, uid, gid)
        except OSError as error:
            raise DriverError(f"volume {one.name}: cannot make its folder {one.source}: {error.strerror}") from error


def account(user: str) -> tuple[int, int, list[int]]:
    """(uid, gid, groups) of `name` or `uid[:gid]`. A uid without an account and without :gid gets itself as group."""
    name, _, group = user.partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        if not name.isdigit():
            raise DriverError(f"user {user!r}: there is no such account") from None
        entry = None
    if group and not group.isdigit():
        raise DriverError(f"user {user!r}: expected a name or uid[:gid] in numbers")
    if entry is None:
        gid = int(group or name)
        return int(name), gid, [gid]
    gid = int(group) if group else entry.pw_gid
    return entry.pw_uid, gid, os.getgrouplist(entry.pw_name, gid)


def enter_private_view(mounts: Iterable[Mount], staging: str) -> None:
    """Give the calling thread a mount namespace with these volumes in place; those with an obstacle are left out.

    After a mirror of `/` the thread itself still stands in the old root: the new one is seen by whoever enters the
    namespace with setns. `staging` is an empty folder on the host to build mirrors at.
    """
    namespace.unshare(namespace.CLONE_NEWNS)
    # slave: nothing of ours shows on the host, what the host mounts or unmounts later shows here
    namespace.mount(None, "/", None, namespace.MS_REC | namespace.MS_SLAVE)
    missing: dict[str, list[Mount]] = {}
    for one in mounts:
        if _obstacle(one.destination) is not None:
            continue
        if os.path.isdir(one.destination):
            namespace.mount(one.source, one.destination, None, namespace.MS_BIND | namespace.MS_REC)
        else:
            missing.setdefault(_existing_parent(one.destination), []).append(one)
    for parent in sorted(missing, key=len, reverse=True):  # "/" last: it takes the others' mirrors along
        _mirror(parent, missing[parent], staging)


def _mirror(parent: str, mounts: list[Mount], staging: str) -> None:
    """Put a look-alike of `parent` over it, with the mounts' destinations added."""
    owner = os.stat(parent)
    options = f"mode={owner.st_mode & 0o7777:o},uid={owner.st_uid},gid={owner.st_gid}"
    entries = list(os.scandir(parent))
    namespace.mount("tmpfs", staging, "tmpfs", 0, options)
    namespace.mount(None, staging, None, namespace.MS_UNBINDABLE)  # else binding a folder above it copies it too
    for entry in entries:
        copy = os.path.join(staging, entry.name)
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), copy)
            continue
        if entry.is_dir():
            os.mkdir(copy)
        else:
            os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        namespace.mount(entry.path, copy, None, namespace.MS_BIND | namespace.MS_REC)
    for one in mounts:
        place = os.path.join(staging, os.path.relpath(one.destination, parent))
        os.makedirs(place, exist_ok=True)
        namespace.mount(one.source, place, None, namespace.MS_BIND | namespace.MS_REC)
    namespace.mount(None, staging, None, namespace.MS_PRIVATE)  # bindable again: a mirror of / takes it along
    namespace.mount(staging, parent, None, namespace.MS_MOVE)


def _obstacle(destination: str) -> str | None:
    """Why a volume can't be seen there, however much we may."""
    path = os.path.normpath(destination)
    advice = "the machine finds its folder in FLY_VOLUME_<NAME> only"
    if not os.path.isabs(destination) or path == "/":
        return f"volume destination {destination!r} is not an absolute folder other than /; {advice}"
    if path.startswith(_KERNEL_FOLDERS) and path.split("/")[1] in ("proc", "sys", "dev"):
        return f"volume destination {destination} lies in a folder of the kernel's; {advice}"
    if os.path.isdir(path):
        return None
    if os.path.lexists(path):
        return f"volume destination {destination} exists and is no folder; {advice}"
    parent = _existing_parent(path)
    if not os.path.isdir(parent):
        return f"volume destination {destination}: {parent} is no folder; {advice}"
    entries = list(os.scandir(parent))
    if len(entries) > _MAX_MIRRORED:
        return f"volume destination {destination} does not exist, and {parent} has too many entries; {advice}"
    if parent != "/" and any(entry.is_file(follow_symlinks=False) for entry in entries):
        return f"volume destination {destination} does not exist: make that folder, or {advice}"
    return None


def _existing_parent(path: str) -> str:
    path = os.path.dirname(os.path.normpath(path))
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _not_permitted(what: str, flag: int) -> str | None:
    """Try it in a thread that ends at once, and with it whatever it was given."""
    answer: list[str] = []
    thread = threading.Thread(target=_try, args=(lambda: namespace.unshare(flag), what, answer), name="namespace probe")
    thread.start()
    thread.join()
    return answer[0] if answer else None


def _try(attempt: Callable[[], None], what: str, answer: list[str]) -> None:
    try:
        attempt()
    except OSError as error:
        answer.append(f"{what} is not permitted here ({error.strerror}); it needs CAP_SYS_ADMIN")
