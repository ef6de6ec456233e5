from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certs import CertificateError, PackInUseError, PackReader, PackWriter

SECRET = bytes(range(32))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "certificates"


def write(path: Path, *records: tuple[str, bytes, bytes]) -> None:
    writer = PackWriter(path, SECRET)
    for record in records:
        writer.append(*record)
    writer.close()


def test_what_is_appended_is_read_by_exact_name_then_wildcard(path: Path) -> None:
    write(path, ("a.example", b"chain", b"key"), ("*.b.example", b"wild", b"wkey"), ("x.b.example", b"own", b"okey"))
    reader = PackReader(path, SECRET)
    assert reader.get("a.example") == (b"chain", b"key")
    assert reader.get("x.b.example") == (b"own", b"okey")
    assert reader.get("y.b.example") == (b"wild", b"wkey")
    assert reader.match("y.b.example") == "*.b.example"
    for name in ("b.example", "z.y.b.example", "other", ""):
        assert reader.get(name) is None
    reader.close()


def test_a_reader_may_come_before_the_file_and_follows_what_is_appended(path: Path) -> None:
    reader = PackReader(path, SECRET)
    assert reader.refresh() == set()
    writer = PackWriter(path, SECRET)
    assert writer.append("a", b"1", b"k")
    assert reader.get("a") is None
    assert reader.refresh() == {"a"}
    assert writer.append("b", b"2", b"k") and writer.append("a", b"3", b"k")
    assert reader.refresh() == {"a", "b"}
    assert reader.refresh() == set()
    assert reader.get("a") == (b"3", b"k")
    assert "a" in writer and len(writer) == len(reader) == 2
    writer.close()
    reader.close()


def test_the_same_certificate_again_is_not_written(path: Path) -> None:
    write(path, ("a", b"chain", b"key"))
    size = path.stat().st_size
    writer = PackWriter(path, SECRET)
    assert not writer.append("a", b"chain", b"key")
    assert path.stat().st_size == size
    writer.close()


def test_keys_are_not_readable_in_the_file_and_it_is_private(path: Path) -> None:
    write(path, ("a", b"the chain", b"the private key"))
    content = path.read_bytes()
    assert b"the chain" not in content and b"private" not in content
    assert path.stat().st_mode & 0o777 == 0o600


def test_another_secret_or_an_altered_record_is_an_error_not_a_certificate(path: Path) -> None:
    write(path, ("a", b"chain", b"key"))
    reader = PackReader(path, bytes(32))
    with pytest.raises(CertificateError):
        reader.get("a")
    reader.close()


def test_a_second_writer_is_refused_while_the_first_lives(path: Path) -> None:
    first = PackWriter(path, SECRET)
    with pytest.raises(PackInUseError):
        PackWriter(path, SECRET)
    first.close()
    PackWriter(path, SECRET).close()


@given(cut=st.integers(0, 400), garbage=st.binary(max_size=40))
@settings(max_examples=120, deadline=None)
def test_a_torn_tail_costs_only_the_torn_record_and_is_written_over(
    tmp_path_factory: pytest.TempPathFactory, cut: int, garbage: bytes
) -> None:
    path = tmp_path_factory.mktemp("pack") / "certificates"
    write(path, ("a", b"chain a", b"key a"))
    whole = path.stat().st_size
    write(path, ("b", b"chain b", b"key b"))
    both = path.read_bytes()
    cut = min(whole + cut, len(both) - 1)
    path.write_bytes(both[:cut] + garbage)
    early = PackReader(path, SECRET)
    if cut < whole + 8 or garbage != both[cut : cut + len(garbage)]:
        assert early.get("a") == (b"chain a", b"key a")
    write(path, ("c", b"chain c", b"key c"))
    early.refresh()
    late = PackReader(path, SECRET)
    for reader in (early, late):
        assert reader.get("a") == (b"chain a", b"key a")
        assert reader.get("c") == (b"chain c", b"key c")
        reader.close()


def test_an_append_seen_in_the_middle_is_read_when_it_is_whole(path: Path) -> None:
    write(path, ("a", b"1", b"k"))
    before = path.stat().st_size
    write(path, ("b", b"2", b"k"))
    content = path.read_bytes()
    for at in range(before, len(content)):
        path.write_bytes(content[:at])
        reader = PackReader(path, SECRET)
        assert len(reader) == 1
        with path.open("ab") as file:
            file.write(content[at:])
        assert reader.refresh() == {"b"}
        assert reader.get("b") == (b"2", b"k")
        reader.close()


def test_a_disk_full_append_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = PackWriter(path, SECRET)
    writer.append("a", b"1", b"k")
    size = path.stat().st_size
    real = os.pwrite
    calls = []

    def full(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(fd, data[:5], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        writer.append("b", b"2", b"k")
    monkeypatch.undo()
    assert path.stat().st_size == size
    assert writer.append("b", b"2", b"k")
    writer.close()
    reader = PackReader(path, SECRET)
    assert reader.get("b") == (b"2", b"k")
    reader.close()


def test_a_mostly_stale_file_is_compacted_and_open_readers_follow(path: Path) -> None:
    writer = PackWriter(path, SECRET)
    writer.append("b", b"stays", b"k")
    writer.append("gone", b"goes", b"k")
    for turn in range(40):
        writer.append("a", b"%d" % turn + bytes(20_000), b"k")
    reader = PackReader(path, SECRET)
    large = path.stat().st_size
    writer.remove("gone")
    for turn in range(40, 100):
        writer.append("a", b"%d" % turn + bytes(20_000), b"k")
    assert path.stat().st_size < 1 << 20 and large > 40 * 20_000
    assert reader.get("b") == (b"stays", b"k")  # the old file is still open
    writer.append("c", b"new", b"k")
    writer.append("b", b"changed", b"k")
    assert reader.refresh() == {"a", "b", "c", "gone"}
    assert reader.get("gone") is None
    assert reader.get("a") == (b"99" + bytes(20_000), b"k")
    assert reader.get("b") == (b"changed", b"k")
    writer.close()
    reader.close()


def test_a_name_that_was_removed_is_gone_for_readers_and_the_next_writer(path: Path) -> None:
    writer = PackWriter(path, SECRET)
    writer.append("a.example", b"1", b"k")
    writer.append("b.example", b"2", b"k")
    reader = PackReader(path, SECRET)
    assert writer.remove("a.example") and not writer.remove("a.example")
    assert reader.refresh() == {"a.example"}
    assert reader.get("a.example") is None and reader.get("b.example") == (b"2", b"k")
    writer.close()
    writer = PackWriter(path, SECRET)
    assert "a.example" not in writer and writer.append("a.example", b"1", b"k")
    assert reader.refresh() == {"a.example"}
    writer.close()
    reader.close()


def test_what_a_client_calls_itself_never_names_a_record_of_another_kind(path: Path) -> None:
    write(
        path,
        ("http-01/token", b"authorization", b""),
        ("rsa/a.example", b"1", b"k"),
        ("self-signed/b.example", b"2", b"k"),
    )
    reader = PackReader(path, SECRET)
    assert reader.match("http-01/token") is None and reader.get("rsa/a.example") is None
    assert reader.exact("http-01/token") == (b"authorization", b"")
    assert reader.get("b.example") == (b"2", b"k")
    write(path, ("*.example", b"3", b"k"))
    reader.refresh()
    assert reader.get("b.example") == (b"3", b"k")  # what is trusted comes before what is not
    reader.close()


def test_an_equal_chain_with_another_key_is_another_record(path: Path) -> None:
    writer = PackWriter(path, SECRET)
    assert writer.append("a", b"chain", b"one") and not writer.append("a", b"chain", b"one")
    assert writer.append("a", b"chain", b"two")
    writer.close()


def test_a_file_that_cannot_be_compacted_goes_on_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = PackWriter(path, SECRET)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for turn in range(200):
        writer.append("a", b"%d" % turn + bytes(20_000), b"k")
    monkeypatch.undo()
    assert path.stat().st_size > 3 << 20
    reader = PackReader(path, SECRET)
    assert reader.get("a") == (b"199" + bytes(20_000), b"k")
    for turn in range(100):
        writer.append("a", b"%d" % turn + bytes(20_000), b"k")
    assert path.stat().st_size < 2 << 20
    reader.refresh()
    assert reader.get("a") == (b"99" + bytes(20_000), b"k")
    writer.close()
    reader.close()


def test_a_file_of_another_kind_is_replaced(path: Path) -> None:
    path.write_bytes(b"something else entirely")
    reader = PackReader(path, SECRET)
    assert len(reader) == 0
    write(path, ("a", b"1", b"k"))
    reader.refresh()
    assert reader.get("a") == (b"1", b"k")
    reader.close()


def test_a_record_too_large_is_refused_before_it_is_written(path: Path) -> None:
    writer = PackWriter(path, SECRET)
    with pytest.raises(CertificateError, match="1048576"):
        writer.append("a", bytes(2_000_000), b"k")
    assert writer.append("a", b"1", b"k")
    writer.close()


@pytest.mark.slow
def test_ten_thousand_names_are_indexed_in_half_a_second(path: Path) -> None:
    writer = PackWriter(path, SECRET)
    chain, key = os.urandom(1500), os.urandom(250)
    for number in range(10_000):
        writer.append(f"app-{number}.example.com", b"%d" % number + chain, key)
    writer.close()
    times = []
    for _ in range(3):
        begin = time.process_time()
        reader = PackReader(path, SECRET)
        times.append(time.process_time() - begin)
        assert len(reader) == 10_000
        assert reader.get("app-9999.example.com") == (b"9999" + chain, key)
        reader.close()
    assert min(times) < 0.5
