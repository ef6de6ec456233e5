"""machines/posix_spawn.py: what a child gets of our descriptors, and what not."""

from __future__ import annotations

import os
from pathlib import Path

from proxy.machines import posix_spawn


def listing(tmp_path: Path, closed: list[int], output: int) -> str:
    """What a program that lists its descriptors writes."""
    with open(os.devnull) as null:
        pid = posix_spawn.spawn(
            "/bin/ls",
            ["ls", "-l", "/proc/self/fd"],
            {},
            str(tmp_path),
            {0: null.fileno(), 1: output, 2: output},
            closed,
        )
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    os.lseek(output, 0, os.SEEK_SET)
    return os.read(output, 65_536).decode()


def test_a_child_has_what_it_was_given_though_its_number_was_to_be_closed(tmp_path: Path) -> None:
    """Which descriptors were inherited is found out once; a number may be another file's by the time of a start."""
    with (tmp_path / "output").open("w+b") as output:
        assert "output" in listing(tmp_path, [output.fileno()], output.fileno())


def test_a_child_has_no_descriptor_that_is_closed_for_it(tmp_path: Path) -> None:
    inherited = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        with (tmp_path / "output").open("w+b") as output, (tmp_path / "again").open("w+b") as again:
            assert f" -> {tmp_path}\n" in listing(tmp_path, [], output.fileno())
            assert f" -> {tmp_path}\n" not in listing(tmp_path, [inherited], again.fileno())
    finally:
        os.close(inherited)
