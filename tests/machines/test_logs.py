"""Output on disk: bounded without losing what is within the bound, read back and followed, of any machine's making."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import pytest

from proxy.machines import logs
from proxy.machines.logs import Follower, LogLine, log_files, log_path, mark, open_log, tail, trim
from tests.machines.support import driver_at, python, spec, started, until


def _write(path: Path | str, data: bytes) -> None:
    fd = open_log(str(path))
    os.write(fd, data)
    os.close(fd)


def _texts(lines: list[LogLine]) -> list[bytes]:
    return [line.text for line in lines]


class TestMark:
    def test_stands_on_a_line_of_its_own_even_after_an_unfinished_one(self, tmp_path: Path) -> None:
        path = tmp_path / "logs" / "app" / "m.log"
        fd = open_log(str(path))
        mark(fd, 0.0, "m", "starting")
        os.write(fd, b"no end")
        mark(fd, 1.5, "m", "ended, exit code 1")
        os.close(fd)
        assert path.read_text() == (
            "--- 1970-01-01T00:00:00.000Z m starting ---\n"
            "no end\n"
            "--- 1970-01-01T00:00:01.500Z m ended, exit code 1 ---\n"
        )

    def test_only_the_owner_may_read_output(self, tmp_path: Path) -> None:
        _write(tmp_path / "app" / "m.log", b"secret\n")
        assert (tmp_path / "app" / "m.log").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "app").stat().st_mode & 0o777 == 0o700


class TestTail:
    def test_gives_the_last_lines_of_several_machines_the_latest_writer_last(self, tmp_path: Path) -> None:
        for machine, when in (("b", 1), ("a", 2)):
            _write(
                log_path(str(tmp_path), "app", machine), b"".join(b"%s%d\n" % (machine.encode(), n) for n in range(5))
            )
            os.utime(log_path(str(tmp_path), "app", machine), (when, when))
        files = log_files(str(tmp_path), "app")
        assert list(files) == ["b", "a"]
        assert tail(files, 3) == [LogLine("a", b"a2"), LogLine("a", b"a3"), LogLine("a", b"a4")]
        assert _texts(tail(files, 7)) == [b"b3", b"b4", b"a0", b"a1", b"a2", b"a3", b"a4"]
        assert tail(files, 0) == []

    def test_of_nothing_is_nothing(self, tmp_path: Path) -> None:
        assert log_files(str(tmp_path), "app") == {}
        assert tail({"gone": str(tmp_path / "gone.log")}, 10) == []
        _write(tmp_path / "empty.log", b"")
        assert tail({"m": str(tmp_path / "empty.log")}, 10) == []

    def test_reads_lines_across_its_chunks(self, tmp_path: Path) -> None:
        lines = [b"%06d " % n + b"x" * (n % 300) for n in range(3000)]
        _write(tmp_path / "m.log", b"\n".join(lines) + b"\n")
        assert _texts(tail({"m": str(tmp_path / "m.log")}, 2500)) == lines[-2500:]

    def test_an_unfinished_last_line_an_empty_one_and_carriage_returns(self, tmp_path: Path) -> None:
        _write(tmp_path / "m.log", b"one\r\n\ntwo")
        assert _texts(tail({"m": str(tmp_path / "m.log")}, 10)) == [b"one", b"", b"two"]

    def test_a_line_without_end_comes_in_bounded_pieces(self, tmp_path: Path) -> None:
        _write(tmp_path / "m.log", b"y" * (5 * logs.MAX_LINE_BYTES) + b"\nshort\n")
        assert [len(text) for text in _texts(tail({"m": str(tmp_path / "m.log")}, 3))] == [65536, 65536, 5]


class TestTrim:
    def test_gives_back_space_and_leaves_what_is_within_the_bound(self, tmp_path: Path) -> None:
        path = tmp_path / "m.log"
        lines = [b"%08d\n" % n for n in range(200_000)]
        _write(path, b"".join(lines))
        freed = trim(str(path), 256 << 10)
        assert freed > 1_000_000
        assert path.stat().st_blocks * 512 < 512 << 10
        assert path.stat().st_size == 1_800_000
        kept = _texts(tail({"m": str(path)}, 10**6))
        assert kept == [line[:-1] for line in lines[-len(kept) :]]
        assert len(kept) * 9 > (256 << 10) - 9
        assert trim(str(path), 256 << 10) == 0

    def test_of_a_small_or_missing_file_does_nothing(self, tmp_path: Path) -> None:
        _write(tmp_path / "m.log", b"x" * 5000)
        assert trim(str(tmp_path / "m.log"), 5000) == 0
        assert trim(str(tmp_path / "gone.log"), 5000) == 0

    @pytest.mark.slow
    def test_loses_no_line_within_the_bound_while_a_machine_writes(self, tmp_path: Path) -> None:
        path = str(tmp_path / "m.log")
        total = 100_000

        def machine() -> None:
            fd = open_log(path)
            for n in range(total):
                os.write(fd, b"%08d %s\n" % (n, b"z" * 40))
            os.close(fd)

        _write(path, b"")
        follower = Follower({"m": path}, budget_bytes=64 << 20)
        writer = threading.Thread(target=machine)
        writer.start()
        seen: list[bytes] = []
        while writer.is_alive():
            seen += _texts(follower.read())
            trim(path, 1 << 20)
        writer.join()
        while news := _texts(follower.read()):
            seen += news
        numbers = [int(text[:8]) for text in seen if not text.startswith(b"---")]
        told = [text for text in seen if text.startswith(b"---")]
        assert numbers == sorted(set(numbers))
        assert told or numbers == list(range(total))
        kept = [int(text[:8]) for text in _texts(tail({"m": path}, total))]
        assert kept == list(range(total - len(kept), total))
        assert os.stat(path).st_blocks * 512 < 4 << 20

    def test_where_holes_are_not_to_be_had_the_file_is_emptied_and_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class NoHoles:
            @staticmethod
            def fallocate(*_: int) -> int:
                ctypes.set_errno(95)  # EOPNOTSUPP
                return -1

        monkeypatch.setattr(logs, "_libc", NoHoles)
        path = tmp_path / "m.log"
        _write(path, b"x\n" * 100_000)
        assert trim(str(path), 4096) == 200_000
        assert path.read_bytes() == b"--- older output dropped: this file system cannot free part of a file ---\n"

    async def test_the_driver_keeps_a_running_machine_within_the_bound(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("proxy.machines.process._TEND_S", 0.02)
        async with driver_at(tmp_path) as (driver, _):
            driver._log_limit_bytes = 64 << 10
            one = spec(tmp_path, *python("import time\nprint('x\\n'*500000)\nprint('last')\ntime.sleep(1000)"))
            await driver.start(one, started)
            await until(lambda: tail({"m": one.log_path}, 1) == [LogLine("m", b"last")], "all is written")
            await until(lambda: os.stat(one.log_path).st_blocks * 512 < 200 << 10, "the rest is freed")

    def test_a_log_grown_long_begins_anew_at_a_start_and_the_old_one_is_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "m.log"
        _write(path, b"old\n")
        os.truncate(path, 2 << 30)  # sparse
        _write(path, b"new\n")
        assert path.read_bytes() == b"new\n"
        assert (tmp_path / "m.log.1").stat().st_size == 2 << 30


class TestFollower:
    def test_tells_what_is_appended_after_it_began(self, tmp_path: Path) -> None:
        path = str(tmp_path / "m.log")
        _write(path, b"before\n")
        follower = Follower({"m": path})
        assert follower.read() == []
        _write(path, b"one\ntw")
        assert _texts(follower.read()) == [b"one"]
        _write(path, b"o\n")
        assert follower.read() == [LogLine("m", b"two")]

    def test_finds_machines_that_begin_later_from_their_first_line(self, tmp_path: Path) -> None:
        follower = Follower(log_files(str(tmp_path), "app"))
        _write(log_path(str(tmp_path), "app", "new"), b"hello\n")
        assert follower.read(log_files(str(tmp_path), "app")) == [LogLine("new", b"hello")]

    def test_begins_again_with_a_file_made_anew_or_emptied(self, tmp_path: Path) -> None:
        path = tmp_path / "m.log"
        _write(path, b"a long first line\n")
        follower = Follower({"m": str(path)})
        os.replace(path, tmp_path / "m.log.1")
        _write(path, b"a line of the new file, longer than that\n")
        assert _texts(follower.read()) == [b"a line of the new file, longer than that"]
        os.truncate(path, 0)
        _write(path, b"short\n")
        assert _texts(follower.read()) == [b"short"]

    def test_says_how_much_was_dropped_before_it_was_read(self, tmp_path: Path) -> None:
        path = tmp_path / "m.log"
        _write(path, b"")
        follower = Follower({"m": str(path)}, budget_bytes=1 << 20)
        _write(path, b"".join(b"%07d\n" % n for n in range(50_000)))
        trim(str(path), 64 << 10)
        first, *rest = _texts(follower.read())
        assert first.endswith(b" bytes of older output dropped ---")
        assert rest[-1] == b"0049999"
        assert [int(text) for text in rest] == list(range(50_000 - len(rest), 50_000))

    def test_a_line_without_end_takes_no_more_memory_than_a_piece(self, tmp_path: Path) -> None:
        path = str(tmp_path / "m.log")
        _write(path, b"")
        follower = Follower({"m": path}, budget_bytes=1 << 20)
        _write(path, b"y" * (3 * logs.MAX_LINE_BYTES + 7))
        assert [len(text) for text in _texts(follower.read())] == [65536] * 3
        _write(path, b"\n")
        assert _texts(follower.read()) == [b"y" * 7]

    def test_one_reading_is_bounded_and_the_next_goes_on(self, tmp_path: Path) -> None:
        path = str(tmp_path / "m.log")
        _write(path, b"")
        follower = Follower({"m": path}, budget_bytes=64 << 10)
        _write(path, b"x" * 99 + b"\n" + (b"x" * 99 + b"\n") * 1999)
        readings = [len(follower.read()) for _ in range(5)]
        assert readings[0] < 700
        assert sum(readings) == 2000
