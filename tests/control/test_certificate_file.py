"""The certificate file as control writes it: one at a time, whatever is cancelled."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from certs import PackReader, PackWriter
from proxy.control.presenter import CertificateFile

SECRET = bytes(range(32))


async def test_a_write_that_is_cancelled_is_over_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = PackWriter(tmp_path / "certificates", SECRET)
    begun, go_on = threading.Event(), threading.Event()
    real = pack._write

    def slow(content: bytes) -> None:
        if not begun.is_set():
            begun.set()
            go_on.wait(10)
        real(content)

    monkeypatch.setattr(pack, "_write", slow)
    file = CertificateFile(pack)
    loop = asyncio.get_running_loop()
    first = loop.create_task(file.put("a.example.com", b"chain a", b"key a"))
    await asyncio.to_thread(begun.wait, 10)
    first.cancel()
    second = loop.create_task(file.put("b.example.com", b"chain b", b"key b"))
    await asyncio.sleep(0.2)
    is_early = second.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second
    assert not is_early
    file.close()
    reader = PackReader(tmp_path / "certificates", SECRET)
    assert reader.get("a.example.com") == (b"chain a", b"key a")
    assert reader.get("b.example.com") == (b"chain b", b"key b")
    reader.close()
