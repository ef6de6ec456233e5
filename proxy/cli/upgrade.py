"""`wakefront upgrade`: have a running node become the program that this command belongs to, and tell how that goes.

Run from the new version's environment, beside the node: it needs no admin API, only data_dir and the right to signal
the supervisor. What happens then is the supervisor's (succession.py); this waits for its word.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxy.cli.failure import FAILED, INTERRUPTED, USAGE, CliError
from proxy.cli.node import config_path, is_file
from proxy.cli.output import print_json, say
from proxy.config import load, plan
from proxy.process import ServePlan
from proxy.succession import REQUEST_FILE, RESULT_FILE, Request

MOST_S = 120.0  # every step of the supervisor's has its own, shorter end
LOCK_FILE = "upgrade.lock"  # in run_dir: who has it waits for the supervisor's word
_POLL_S = 0.02
_STAGES = {
    "trial": "trying the new program in a process of its own",
    "exec": "it can be loaded: the supervisor becomes it",
    "control": "the new program's control takes over; machines run on",
    "workers": "its workers start beside the old ones",
}


def upgrade(config: Path | None, as_json: bool) -> None:
    """Returns once the new program serves. Raises CliError where it does not; then the former one does."""
    path = config_path(config)
    if not is_file(path):
        raise CliError(f"No config file at {path}: name the node's with --config FILE.", USAGE)
    result = load(path)
    if result.config is None:
        from proxy.cli.check import run_check

        run_check(path, [], as_json)
        raise CliError(f"Nothing was changed: {path} has faults, listed above.", USAGE)
    wanted = plan(result.config, path)
    request = Request(secrets.token_hex(8), sys.executable, _version(), wanted.to_json())
    _become_owner(wanted.run_dir)
    supervisor, program = _running(wanted)
    if program == sys.executable and not as_json:
        say(f"note: the node runs from {program} too; if files there were replaced, there is no former program to go")
        say("      back to. An environment for each version keeps it (docs/cli.md).")
    began = time.monotonic()
    with _alone(wanted.run_dir):
        _ask(wanted, request, supervisor)
        try:
            last = _wait(wanted, request, supervisor, as_json)
        except KeyboardInterrupt:
            raise CliError("The node goes on with the upgrade; its log tells how that ends.", INTERRUPTED) from None
    seconds = round(time.monotonic() - began, 3)
    answer = {**last, "seconds": seconds, "program": sys.executable, "former": program}
    if as_json:
        print_json(answer)
    elif last["stage"] == "done":
        say(f"done in {seconds:.1f} s: {request.version} serves; old workers end with their connections")
    if last["stage"] == "rolled back":
        raise CliError(
            f"The new program failed and the former one serves on: {last['detail']}."
            " The node's log has more; its control answers again in a moment.",
            FAILED,
        )
    if last["stage"] != "done":
        raise CliError(f"Not upgraded: {last['detail']}", FAILED)


def _become_owner(run_dir: str) -> None:
    """Root goes on as the user that the node runs as, for good.

    The node could not read what root leaves for it; and machines may be of that user too: in a folder of theirs root
    could be led to write elsewhere. A link counts as its own owner's.
    """
    if os.geteuid() != 0:
        return
    try:
        owner = os.lstat(run_dir)
    except FileNotFoundError:
        return  # no node: told next
    if owner.st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


@contextlib.contextmanager
def _alone(run_dir: str) -> Iterator[None]:
    """One command at a time: a second would write over the first one's request, and over the word on it."""
    with open(os.open(os.path.join(run_dir, LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CliError("Another `wakefront upgrade` of this node is under way: wait for its end.") from None
        yield


def _running(wanted: ServePlan) -> tuple[int, str]:
    """The pid of the supervisor that holds data_dir, and the interpreter of its program."""
    run_dir = Path(wanted.run_dir)
    nobody = f"No node runs with data_dir {wanted.data_dir}: start one with `wakefront serve`."
    try:
        with open(run_dir / "supervisor.pid") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            raise CliError(nobody, FAILED)  # who serves would hold the lock
    except BlockingIOError:
        pass
    except FileNotFoundError:
        raise CliError(nobody, FAILED) from None
    except PermissionError as error:
        raise CliError(f"{error.filename} is another user's: run this as the user that the node runs as.") from None
    try:
        children = json.loads((run_dir / "children.json").read_text())
    except (OSError, ValueError) as error:
        raise CliError(f"The node is only just starting or ending ({error}): try again.") from None
    if "upgrade" not in children.get("takes", ()):
        raise CliError("The running version cannot hand over to another: stop it and start this one.")
    return int(children["supervisor"]), str(children["program"])


def _ask(wanted: ServePlan, request: Request, supervisor: int) -> None:
    path = os.path.join(wanted.run_dir, REQUEST_FILE)
    with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(request.to_json())
    os.replace(path + ".new", path)
    try:
        os.kill(supervisor, signal.SIGUSR2)
    except ProcessLookupError:
        raise CliError("The node has just ended.") from None
    except PermissionError:
        raise CliError(f"Process {supervisor} is another user's: run this as the user the node runs as.") from None


def _wait(wanted: ServePlan, request: Request, supervisor: int, as_json: bool) -> dict[str, Any]:
    """The last word on this request; what comes before is told as it comes."""
    path = Path(wanted.run_dir) / RESULT_FILE
    told, deadline = "", time.monotonic() + MOST_S
    while time.monotonic() < deadline:
        result = _read(path)
        if result.get("id") == request.id and result["stage"] != told:
            told = str(result["stage"])
            if told not in _STAGES:
                return result
            if not as_json:
                say(f"  {_STAGES[told]}")
        if not _lives(supervisor):
            raise CliError("The supervisor ended during the upgrade: see the node's log, and start it again.")
        time.sleep(_POLL_S)
    raise CliError(f"No word from the supervisor within {MOST_S:g} s: see the node's log.")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("wakefront")
    except PackageNotFoundError:
        return "unknown"
