from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from certs import InternalCA, PackReader, PackWriter, Seal, SealedFolder
from proxy.edge.certificates import Certificates
from proxy.errors import Code, ProxyError

SECRET = bytes(range(32))


class Setup:
    """A certificate file with its writer, and a worker's view of it."""

    def __init__(self, folder: Path, **settings: int) -> None:
        self.now = 100.0
        self.asked: list[str] = []
        self.answers: list[tuple[ssl.SSLContext | None, Code | None]] = []
        self.ca = InternalCA(SealedFolder(folder / "certs", Seal(SECRET)), folder / "certs" / "ca.pem", time.time)
        self.writer = PackWriter(folder / "certificates", SECRET)
        self.reader = PackReader(folder / "certificates", SECRET)
        self.certificates = Certificates(self.reader, self.asked.append, lambda: self.now, **settings)  # type: ignore[arg-type]

    def issue(self, name: str) -> None:
        certificate = self.ca.issue(name)
        self.writer.append(name, certificate.chain_pem, certificate.key_pem)

    def need(self, name: str) -> Any:
        def waiter(context: ssl.SSLContext | None, error: ProxyError | None) -> None:
            self.answers.append((context, None if error is None else error.code))

        self.certificates.need(name, waiter)
        return waiter

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.close()


def test_a_known_name_needs_no_waiting_and_its_context_is_kept(setup: Setup) -> None:
    setup.issue("a.example")
    assert setup.certificates.find("a.example") is None
    setup.certificates.refresh()
    context = setup.certificates.find("a.example")
    assert context is not None
    assert setup.certificates.find("a.example") is context


def test_names_under_one_wildcard_share_a_context(setup: Setup) -> None:
    setup.issue("*.b.example")
    setup.certificates.refresh()
    assert setup.certificates.find("x.b.example") is setup.certificates.find("y.b.example") is not None


def test_all_waiters_are_answered_by_one_question(setup: Setup) -> None:
    for _ in range(3):
        setup.need("a.example")
    assert setup.asked == ["a.example"] and setup.certificates.waiting == 3
    setup.issue("a.example")
    setup.certificates.ready("a.example", None)
    assert [code for _, code in setup.answers] == [None] * 3
    assert len({context for context, _ in setup.answers}) == 1 and setup.answers[0][0] is not None
    assert setup.certificates.waiting == 0


def test_a_record_that_another_worker_asked_for_is_found_without_asking(setup: Setup) -> None:
    setup.issue("a.example")
    setup.need("a.example")
    assert setup.asked == [] and setup.answers[0][0] is not None


def test_a_refusal_is_remembered_for_a_second(setup: Setup) -> None:
    setup.need("a.example")
    setup.certificates.ready("a.example", "not ours")
    setup.need("a.example")
    assert [code for _, code in setup.answers] == [Code.TLS_NO_CERTIFICATE] * 2
    assert setup.asked == ["a.example"]
    setup.now += 1.0
    setup.need("a.example")
    assert setup.asked == ["a.example"] * 2


def test_an_announcement_without_a_record_is_an_error_not_a_hang(setup: Setup) -> None:
    setup.need("a.example")
    setup.certificates.ready("a.example", None)
    assert setup.answers == [(None, Code.TLS_INTERNAL)]


def test_one_who_leaves_is_not_called_and_the_others_are(setup: Setup) -> None:
    gone = setup.need("a.example")
    setup.need("a.example")
    setup.certificates.forget("a.example", gone)
    setup.certificates.forget("a.example", gone)
    assert setup.certificates.waiting == 1
    setup.issue("a.example")
    setup.certificates.ready("a.example", None)
    assert len(setup.answers) == 1


def test_waiters_are_bounded(tmp_path: Path) -> None:
    setup = Setup(tmp_path, max_waiters=2)
    for name in ("a.example", "b.example", "c.example"):
        setup.need(name)
    assert setup.asked == ["a.example", "b.example"]
    assert setup.answers == [(None, Code.TLS_INTERNAL)]
    setup.close()


def test_after_a_reconnect_everything_waited_for_is_asked_again(setup: Setup) -> None:
    setup.need("a.example")
    setup.need("b.example")
    setup.certificates.ask_again()
    assert setup.asked == ["a.example", "b.example"] * 2


def test_a_renewed_record_replaces_the_context_even_if_the_announcement_was_lost(setup: Setup) -> None:
    setup.issue("a.example")
    setup.certificates.refresh()
    before = setup.certificates.find("a.example")
    setup.issue("a.example")
    assert setup.certificates.find("a.example") is before
    setup.certificates.refresh()
    assert setup.certificates.find("a.example") not in (None, before)


def test_a_record_refreshed_by_someone_else_still_counts_when_it_is_announced(setup: Setup) -> None:
    setup.issue("a.example")
    setup.certificates.refresh()
    before = setup.certificates.find("a.example")
    setup.issue("a.example")
    setup.reader.refresh()
    setup.certificates.ready("a.example", None)
    assert setup.certificates.find("a.example") not in (None, before)


def test_only_the_last_used_contexts_are_kept(tmp_path: Path) -> None:
    setup = Setup(tmp_path, capacity=2)
    for name in ("a.example", "b.example", "c.example"):
        setup.issue(name)
    setup.certificates.refresh()
    first = setup.certificates.find("a.example")
    second = setup.certificates.find("b.example")
    assert setup.certificates.find("a.example") is first
    setup.certificates.find("c.example")
    assert setup.certificates.find("a.example") is first
    assert setup.certificates.find("b.example") is not second
    setup.close()


def test_an_unusable_record_is_an_internal_error(setup: Setup) -> None:
    setup.writer.append("a.example", b"no chain", b"no key")
    setup.certificates.refresh()
    with pytest.raises(ProxyError) as caught:
        setup.certificates.find("a.example")
    assert caught.value.code is Code.TLS_INTERNAL


def test_a_client_that_names_no_host_has_no_certificate(setup: Setup) -> None:
    with pytest.raises(ProxyError) as caught:
        setup.certificates.find(None)
    assert caught.value.code is Code.TLS_NO_CERTIFICATE
