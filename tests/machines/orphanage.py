"""A process that plays supervisor and first control, so that a test can be the second control.

    python -m tests.machines.orphanage NODE_DIR MACHINE_ID LOG_PATH ARGV...

It becomes a subreaper, forks a control that starts the machine with a process driver, and prints the machine's pid and
start ticks. Told `kill`, it kills that control with SIGKILL and prints `killed`. Then it does as the supervisor does:
it peeks at each orphan that ends, prints `exited PID CODE SIGNAL`, and reaps it when told `reap`.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from pathlib import Path

from proxy.machines.process import ProcessDriver
from tests.machines.support import spec

_PR_SET_CHILD_SUBREAPER = 36


async def _control(node_dir: str, machine: str, log_path: str, command: list[str]) -> None:
    driver = ProcessDriver(node_dir)
    one = spec(Path(node_dir), *command, id=machine, log_path=log_path)
    await driver.start(one, lambda running: print(running.pid, running.start_ticks, flush=True))
    await asyncio.Event().wait()


def main() -> None:
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    node_dir, machine, log_path, *command = sys.argv[1:]
    control = os.fork()
    if control == 0:
        asyncio.run(_control(node_dir, machine, log_path, command))
    assert sys.stdin.readline() == "kill\n"
    os.kill(control, signal.SIGKILL)
    os.waitpid(control, 0)
    print("killed", flush=True)
    while True:
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return
        assert info is not None
        code, number = (info.si_status, "-") if info.si_code == os.CLD_EXITED else ("-", info.si_status)
        print("exited", info.si_pid, code, number, flush=True)
        assert sys.stdin.readline() == "reap\n"
        os.waitid(os.P_PID, info.si_pid, os.WEXITED)


if __name__ == "__main__":
    main()
