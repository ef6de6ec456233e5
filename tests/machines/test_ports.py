"""Ports for machines without a network of their own."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from proxy.machines.driver import DriverError
from proxy.machines.ports import choose_port, ephemeral_range


def _range(tmp_path: Path, low: int, high: int) -> str:
    file = tmp_path / "range"
    file.write_text(f"{low}\t{high}\n")
    return str(file)


def test_the_port_can_be_listened_on_and_lies_outside_the_ephemeral_range() -> None:
    port = choose_port(set(), random.Random(1))
    low, high = ephemeral_range()
    assert not low <= port <= high
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("low", "high", "allowed"),
    [(32768, 60999, {*range(20000, 32768), *range(61000, 65536)}), (1024, 65530, set(range(65531, 65536)))],
)
def test_both_sides_of_the_range_serve(tmp_path: Path, low: int, high: int, allowed: set[int]) -> None:
    file = _range(tmp_path, low, high)
    chosen = {choose_port(set(), random.Random(seed), file) for seed in range(50)}
    assert chosen <= allowed
    assert len(chosen) > 3


def test_taken_ports_are_not_given_again(tmp_path: Path) -> None:
    file = _range(tmp_path, 1024, 65530)
    taken: set[int] = set()
    for _ in range(3):
        taken.add(choose_port(taken, random.Random(7), file))
    assert len(taken) == 3


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_port_somebody_listens_on_is_passed_over(tmp_path: Path, host: str) -> None:
    free = choose_port(set(), random.Random(3))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if free < 65535:
        file = tmp_path / "range"
        file.write_text(f"1024 {free - 1}\n")  # leaves `free` and what is above
    with socket.create_server((host, free), family=family):
        others = set(range(free + 1, 65536))
        with pytest.raises(DriverError, match="no free TCP port"):
            choose_port(others, random.Random(3), str(file))


def test_none_left_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"0 ports of 20000-65535 .*\(1024-65535\).*sysctl"):
        choose_port(set(), random.Random(1), _range(tmp_path, 1024, 65535))
