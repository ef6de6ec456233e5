"""What is told of a domain, by what has happened to it."""

from __future__ import annotations

import pytest

from certs.domain import Domain, Origin, Trouble
from certs.errors import Failure
from proxy.control.certificates_api import status_word
from proxy.control.domain_json import detail_json, summary_json

NOW = 1_800_000_000.0
WAYS = ("acme_dns_configured", "acme_alpn_configured", "acme_http_configured")


def domain(name: str = "shop.example.com", failure: Failure | None = None, **more: object) -> Domain:
    trouble = Trouble(failure, "why", "", 1, NOW, NOW, NOW + 60) if failure is not None else None
    one = Domain(name, "shop", Origin.ADDED, NOW, NOW, trouble=trouble)
    for key, value in more.items():
        setattr(one, key, value)
    return one


def ways(one: Domain, is_under_way: bool = False) -> list[bool]:
    summary = summary_json(one, NOW, is_under_way)
    return [summary[way] for way in WAYS]


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        (None, "not_verified"),
        (Failure.NOT_POINTED, "not_verified"),
        (Failure.VALIDATION, "not_verified"),
        (Failure.REFUSED, "not_verified"),
        (Failure.NETWORK, "issuing"),
        (Failure.SERVER, "issuing"),
        (Failure.RATE_LIMITED, "issuing"),
    ],
)
def test_a_name_is_being_issued_for_once_dns_was_found_to_lead_here(failure: Failure | None, word: str) -> None:
    assert status_word(summary_json(domain(failure=failure), NOW)) == word
    assert status_word(summary_json(domain(failure=failure), NOW, is_under_way=True)) == "issuing"


def test_the_ways_told_are_those_that_can_prove_the_name() -> None:
    assert ways(domain()) == [False, False, False]
    assert ways(domain(), True) == [False, True, True]
    assert ways(domain(avoid=("tls-alpn-01",)), True) == [False, False, True]
    assert ways(domain(challenge="http-01"), True) == [False, False, True]
    assert ways(domain(challenge="dns-01"), True) == [True, False, False]
    assert ways(domain("*.example.com"), True) == [True, False, False]


def test_summary_and_detail_agree() -> None:
    one = domain(failure=Failure.SERVER)
    detail = detail_json(one, NOW, {})
    assert [detail["validation"][way.removeprefix("acme_")] for way in WAYS] == ways(one)
    assert detail["validation_errors"][0]["message"] == "why" and detail["next_try_at"].startswith("2027-01-15")
