"""The URL that an app has asked whether a name may have a certificate (`[apps.on_demand] ask`), as a test needs it.

It runs in a thread of its own and counts what it is asked, name by name; `mode` says how it answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Literal
from urllib.parse import parse_qs, urlsplit

Mode = Literal["yes", "no", "fail", "hang", "cut", "flood"]
_STATUS = {"yes": 200, "no": 404, "fail": 500}


class AskServer:
    """`close` it. `flood` answers without an end, `cut` closes the connection, `hang` says nothing at all."""

    def __init__(self) -> None:
        self.mode: Mode = "no"
        self.permitted: set[str] = set()  # of these `no` is not said
        self.delay_s = 0.0  # before each answer
        self.asked: Counter[str] = Counter()
        self.at_once = 0
        self.most_at_once = 0
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), name="ask")
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/may"

    def forget(self, mode: Mode) -> None:
        """Count anew, and answer so from now on."""
        self.mode = mode
        self.asked.clear()
        self.most_at_once = 0

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                name = parse_qs(urlsplit(head.split()[1].decode()).query)["domain"][0]
                self.asked[name] += 1
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.mode == "cut":
                    return
                if self.mode == "hang":
                    await reader.read()  # until the other side gives up
                    return
                if self.mode == "flood":
                    writer.write(b"HTTP/1.1 404 No\r\n\r\n")
                    while True:
                        writer.write(bytes(65_536))
                        await writer.drain()
                status = _STATUS["yes" if self.mode == "no" and name in self.permitted else self.mode]
                writer.write(f"HTTP/1.1 {status} So\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.at_once -= 1
            writer.close()
