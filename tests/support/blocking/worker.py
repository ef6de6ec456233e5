"""A worker that SIGUSR1 keeps busy for BLOCK_S in the middle of its loop."""

from __future__ import annotations

import signal
import time

from proxy.process import ChildContext
from proxy.worker import run as run_worker

BLOCK_S = 60.0


def block(number: int, frame: object) -> None:
    until = time.monotonic() + BLOCK_S
    while time.monotonic() < until:
        sum(range(1000))


def run(context: ChildContext) -> int:
    signal.signal(signal.SIGUSR1, block)
    return run_worker(context)
