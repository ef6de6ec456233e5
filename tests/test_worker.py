from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any, cast

from proxy.process import unix_address
from proxy.worker import Link


async def test_a_link_that_is_tried_again_and_again_under_a_long_path_leaves_no_descriptors(tmp_path: Path) -> None:
    run_dir = tmp_path / ("d" * 120)
    run_dir.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as full:
        full.bind(unix_address(str(run_dir), "control.sock"))  # nobody listens there: each attempt is refused
        Link(cast(Any, None), str(run_dir)).start()  # the worker is not asked before control has spoken
        try:
            await asyncio.sleep(0.03)
            before = len(os.listdir("/proc/self/fd"))
            await asyncio.sleep(0.15)
            assert len(os.listdir("/proc/self/fd")) == before
        finally:
            for task in asyncio.all_tasks():
                if task.get_name() == "control-link":
                    task.cancel()
