from __future__ import annotations

import pytest

from certs.errors import NameRefusedError
from certs.names import custom_domain


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Shop.Example.COM.", "shop.example.com"),
        (" shop.example.com\n", "shop.example.com"),
        ("*.example.com", "*.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("*.BÜCHER.example", "*.xn--bcher-kva.example"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("web.apps.localhost", "web.apps.localhost"),
        ("*.example.co.uk", "*.example.co.uk"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
    ],
)
def test_a_name_is_brought_into_its_one_form(text: str, name: str) -> None:
    assert custom_domain(text) == name and custom_domain(name) == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("192.0.2.1", "IP address"),
        ("[2001:db8::1]", "IP address"),
        ("*.192.0.2.1", "IP address"),
        ("300.300.300.300", "ends in a number"),
        ("localhost", "one part only"),
        ("*.com", "strangers"),
        ("*.co.uk", "below 'co.uk'"),
        ("*.github.io", "strangers"),
        ("*", "is not a host name"),
        ("a.*.example.com", "is not a host name"),
        ("*.*.example.com", "is not a host name"),
        ("my_shop.example.com", "'my_shop' is not"),
        ("-a.example", "'-a' is not"),
        ("a..example", "'' is not"),
        ("a" * 64 + ".example", "1 to 63"),
        (".".join(["a" * 60] * 5), "253 at most"),
        ("a b.example", "'a b' is not"),
        ("shop.example.com/path", "'com/path' is not"),
        ("https://shop.example.com", "is not"),
        ("shop.example.com:443", "is not"),
        ("xn--a.example", "no internationalised label"),
        ("shop.exa\x00mple.com", "is not"),
        ("shop.\ud800.example", "not an internationalised host name"),
        ("", "is not"),
    ],
)
def test_what_is_no_domain_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(NameRefusedError) as refused:
        custom_domain(text)
    assert says in str(refused.value) and len(str(refused.value)) < 400
