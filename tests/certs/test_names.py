from __future__ import annotations

import pytest

from certs.errors import NameRefusedError
from certs.names import covers, is_private, is_public_suffix, normalise, registered_domain


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Shop.Example.COM.", "shop.example.com"),
        (" *.Example.com ", "*.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("*.bücher.example", "*.xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
    ],
)
def test_a_name_has_one_form(text: str, name: str) -> None:
    assert normalise(text) == name == normalise(name)


@pytest.mark.parametrize(
    "text",
    ["", ".", "192.0.2.1", "[2001:db8::1]", "2001:db8::1", "a..example", "-a.example", "a_b.example",
     "a" * 64 + ".example", "x." * 130 + "example", "a b.example", "a.*.example",
     "*", "a/b.example", "a.example:443", "a\0.example"],
)  # fmt: skip
def test_what_is_no_host_name_is_refused(text: str) -> None:
    with pytest.raises(NameRefusedError):
        normalise(text)


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("shop.example.com", "example.com"),
        ("example.com", "example.com"),
        ("a.b.example.co.uk", "example.co.uk"),
        ("*.example.co.uk", "example.co.uk"),
        ("co.uk", "co.uk"),
        ("x.github.io", "x.github.io"),
    ],
)
def test_the_registered_domain_is_what_a_registrar_sold(name: str, domain: str) -> None:
    assert registered_domain(name) == domain


def test_suffixes_and_private_names_are_known() -> None:
    assert is_public_suffix("co.uk") and is_public_suffix("*.com") and not is_public_suffix("example.com")
    assert is_private("web") and is_private("web.apps.localhost") and is_private("a.home.arpa")
    assert not is_private("shop.example.com")


def test_a_wildcard_covers_one_label() -> None:
    assert covers("*.example.com", "a.example.com") and covers("a.example.com", "a.example.com")
    assert not covers("*.example.com", "a.b.example.com") and not covers("*.example.com", "example.com")
