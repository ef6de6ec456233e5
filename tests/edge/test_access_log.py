"""The access log: whole lines in order, and a file that takes nothing never holds anybody up."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.edge import access_log
from proxy.edge.access_log import AccessLog
from proxy.edge.access_record import Record, json_line, text_line
from proxy.edge.timers import Wheel
from proxy.state import W_LOG_DROPPED
from tests.support.edge import EdgeHarness, answers

GET = b"GET /x HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def record(target: str = "/", **more: object) -> Record:
    return Record(
        1_800_000_000.0, "web", "127.0.0.1", "GET", "web.apps.test", target, 200, 1.5, 0, 2, "ID-ams", 80, **more  # type: ignore[arg-type]
    )  # fmt: skip


class Dropped:
    def __init__(self) -> None:
        self.lines = 0

    def __call__(self, lines: int) -> None:
        self.lines += lines


@pytest.fixture
def dropped() -> Dropped:
    return Dropped()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A pipe that is open but not read, with room for one page."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    yield str(path), reader
    os.close(reader)


async def read_lines(reader: int, count: int) -> list[bytes]:
    """At least so many lines from a descriptor that does not block."""
    data = b""
    deadline = time.monotonic() + 20
    while data.count(b"\n") < count:
        assert time.monotonic() < deadline, f"{data.count(10)} lines of {count}"
        try:
            data += os.read(reader, 1 << 16)
        except BlockingIOError:
            await asyncio.sleep(0.005)
    return data.splitlines()


def test_a_json_line_leaves_out_what_is_empty() -> None:
    line = json_line(record('/a\nb"c'))
    assert line.count(b"\n") == 1
    found = json.loads(line)
    assert found["target"] == '/a\nb"c' and "code" not in found and "wake_ms" not in found and "tls" not in found
    assert json.loads(json_line(record(code="WU01", tls=True)))["code"] == "WU01"


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/plain?a=b", "/plain?a=b"),
        ('/x" 200 - "', '/x\\" 200 - \\"'),
        ("/new\nline\r", "/new\\nline\\r"),
        ("/\x1b[31mred", "/\\x1b[31mred"),
        ("/ümlaut", "/\\xfcmlaut"),
        ("/back\\slash", "/back\\\\slash"),
        ("", "-"),
    ],
)
def test_a_target_cannot_forge_a_column_or_a_line_of_the_text_log(target: str, shown: str) -> None:
    line = text_line(record(target)).decode("ascii")
    assert line == (
        f'127.0.0.1 [15/Jan/2027:08:00:00 +0000] "GET {shown}" web.apps.test 200 2 1.500ms web/- ID-ams -\n'
    )


async def test_lines_arrive_whole_and_in_order_and_the_rest_at_close(tmp_path: Path, dropped: Dropped) -> None:
    wheel = Wheel(asyncio.get_running_loop())
    path = tmp_path / "folder" / "access.log"
    log = AccessLog(str(path), "json", wheel, dropped)
    for number in range(3000):
        log.write(record(f"/{number}"))
        if number % 1000 == 0:
            await asyncio.sleep(0.25)
    log.close()
    wheel.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["target"] for line in lines] == [f"/{number}" for number in range(3000)]
    assert dropped.lines == 0 and path.stat().st_mode & 0o007 == 0


async def test_a_pipe_that_nobody_reads_costs_lines_and_no_time(
    fifo: tuple[str, int], dropped: Dropped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "MAX_HELD_BYTES", 200_000)
    path, reader = fifo
    wheel = Wheel(asyncio.get_running_loop())
    log = AccessLog(path, "text", wheel, dropped)
    total, longest = 20_000, 0.0
    for number in range(total):
        began = time.perf_counter()
        log.write(record(f"/{number}"))
        longest = max(longest, time.perf_counter() - began)
        if number % 1000 == 0:
            await asyncio.sleep(0.02)
    assert longest < 0.1
    assert 0 < dropped.lines < total
    kept = total - dropped.lines
    lines = await read_lines(reader, kept)
    numbers = [int(line.split(b" /")[1].split(b'"')[0]) for line in lines]
    assert len(numbers) == kept and numbers == sorted(numbers)
    log.write(record("/again"))
    assert b"/again" in (await read_lines(reader, 1))[0]
    log.close()
    wheel.close()


async def test_closing_a_log_whose_file_takes_nothing_is_bounded(fifo: tuple[str, int], dropped: Dropped) -> None:
    wheel = Wheel(asyncio.get_running_loop())
    log = AccessLog(fifo[0], "text", wheel, dropped)
    for number in range(1000):
        log.write(record(f"/{number}"))
    await asyncio.sleep(0.4)
    for number in range(500):
        log.write(record(f"/{number}"))
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 2.0
    assert dropped.lines >= 500
    wheel.close()


async def test_a_full_disk_costs_lines_that_are_counted(dropped: Dropped) -> None:
    wheel = Wheel(asyncio.get_running_loop())
    log = AccessLog("/dev/full", "json", wheel, dropped)
    for number in range(100):
        log.write(record(f"/{number}"))
    log.close()
    wheel.close()
    assert dropped.lines == 100


async def test_requests_are_unharmed_while_the_log_is_stuck(
    fifo: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "MAX_HELD_BYTES", 20_000)
    harness = EdgeHarness(access_log=fifo[0], access_log_format="json")
    await harness.start()
    try:
        origin = await harness.origin(answers(OK))
        harness.set_app(harness.app(harness.machine(origin.port)))
        reader, writer = await harness.connect()
        for _ in range(600):
            writer.write(GET)
            assert (await asyncio.wait_for(reader.readuntil(b"ok"), 2)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert harness.edge.cells[harness.edge.worker_base + W_LOG_DROPPED] > 0
    finally:
        await asyncio.wait_for(harness.stop(), 10)


async def test_no_path_means_no_log(dropped: Dropped) -> None:
    wheel = Wheel(asyncio.get_running_loop())
    log = AccessLog("", "json", wheel, dropped)
    assert not log.is_on
    log.close()
    wheel.close()


async def test_a_pipe_without_a_reader_is_an_error_at_once(tmp_path: Path, dropped: Dropped) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    wheel = Wheel(asyncio.get_running_loop())
    with pytest.raises(OSError, match="No such device"):
        AccessLog(str(path), "json", wheel, dropped)
    wheel.close()


async def test_a_log_that_was_renamed_goes_on_under_its_old_name_and_no_line_is_lost(
    tmp_path: Path, dropped: Dropped
) -> None:
    wheel = Wheel(asyncio.get_running_loop())
    path, first, second = tmp_path / "access.log", tmp_path / "access.log.1", tmp_path / "access.log.2"
    log = AccessLog(str(path), "json", wheel, dropped)
    for at in range(300):
        log.write(record(f"/{at}"))
        if at == 100:
            path.rename(first)
        elif at == 200:
            await until_written(path)
            path.rename(second)
            path.touch()  # as by logrotate's `create`
        if at % 10 == 0:
            await asyncio.sleep(0.02)
    log.close()
    targets = [json.loads(line)["target"] for one in (first, second, path) for line in one.read_text().splitlines()]
    assert targets == [f"/{at}" for at in range(300)] and dropped.lines == 0
    assert path.stat().st_size and second.stat().st_size
    wheel.close()


async def until_written(path: Path) -> None:
    async with asyncio.timeout(5):
        while not path.exists() or not path.stat().st_size:
            await asyncio.sleep(0.01)


async def test_a_log_whose_folder_has_gone_is_made_again(tmp_path: Path, dropped: Dropped) -> None:
    wheel = Wheel(asyncio.get_running_loop())
    path = tmp_path / "logs" / "access.log"
    log = AccessLog(str(path), "json", wheel, dropped)
    path.unlink()
    path.parent.rmdir()
    log.write(record("/after"))
    log.close()
    assert json.loads(path.read_text())["target"] == "/after"
    wheel.close()


async def test_a_log_that_cannot_go_on_under_its_name_is_told_of_once_and_loses_no_line(
    tmp_path: Path, dropped: Dropped, caplog: pytest.LogCaptureFixture
) -> None:
    wheel = Wheel(asyncio.get_running_loop())
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    log = AccessLog(str(path), "json", wheel, dropped)
    path.rename(moved)
    path.mkdir()
    for at in range(3):
        log.write(record(f"/{at}"))
        log._flush_now()
        while log._writing is not None and not log._writing.done:
            await asyncio.sleep(0.005)
    log.close()
    assert [json.loads(line)["target"] for line in moved.read_text().splitlines()] == ["/0", "/1", "/2"]
    assert dropped.lines == 0 and caplog.text.count("no new one can be opened") == 1
    wheel.close()
