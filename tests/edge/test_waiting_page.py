"""edge/waiting_page.py: who is shown the page, and that it is one any browser and screen reader can take."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.navigation import wants_page
from proxy.edge.waiting_page import (
    REFRESH_MAX_S,
    choose_language,
    page_language,
    waiting_fields,
    waiting_page,
)
from tests.wire.http1_support import read_requests

LANGUAGES = ("en", "de", "es", "fr", "nl")
VOID = {"meta", "br", "link", "img", "input", "hr"}
FIREFOX = b"text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order; attributes once each."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.declaration = ""
        self.feed(data.decode())
        self.close()
        assert self.open == [] and self.rawdata == ""

    def handle_decl(self, decl: str) -> None:
        self.declaration = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_has_what_people_browsers_and_screen_readers_need(language: str) -> None:
    page = Page(waiting_page("shop", 3, language))
    assert page.declaration == "doctype html"
    assert page.attributes("html") == [{"lang": language}]
    assert "shop" in page.texts["title"] and page.texts["h1"] == page.texts["title"]
    metas = page.attributes("meta")
    assert metas[0] == {"charset": "utf-8"}
    assert {"http-equiv": "refresh", "content": "3"} in metas
    assert {"name": "robots", "content": "noindex"} in metas
    assert any(meta.get("name") == "viewport" for meta in metas)
    assert {"role": "status"} in page.attributes("div")
    assert page.attributes("a") == [{"href": ""}] and page.texts["a"]
    assert "3 s" in page.texts["p"]
    assert "prefers-color-scheme:dark" in page.texts["style"]
    order = [tag for tag, _ in page.elements]
    assert order.index("html") < order.index("head") < order.index("title") < order.index("body") < order.index("main")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_loads_nothing_and_runs_nothing(language: str) -> None:
    data = waiting_page("shop", 3, language)
    page = Page(data)
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "div", "h1", "p", "a"}
    assert {tag for tag, _ in page.elements} <= allowed
    assert not any(name.startswith("on") or name in ("src", "style") for _, found in page.elements for name in found)
    assert b"url(" not in data and b"@import" not in data and b"http:" not in data and b"https:" not in data
    policy = dict(waiting_fields(3, language))[b"content-security-policy"].decode()
    digest = base64.b64encode(hashlib.sha256(page.texts["style"].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


@given(st.text(max_size=40), st.integers(), st.text(max_size=8))
def test_no_name_escapes_into_markup(name: str, seconds: int, language: str) -> None:
    page = Page(waiting_page(name, seconds, language))
    plain = Page(waiting_page("shop", 3))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert page.attributes("html")[0]["lang"] in LANGUAGES


def test_markup_and_braces_in_a_name_are_text() -> None:
    name = "<script>alert('x')</script>\"&amp;{seconds}"
    data = waiting_page(name, 3)
    assert b"<script" not in data
    assert Page(data).texts["h1"] == f"{name} is starting"


@pytest.mark.parametrize(("asked", "seconds"), [(-5, 1), (0, 1), (1, 1), (60, 60), (10**9, REFRESH_MAX_S)])
def test_page_and_field_name_the_same_bounded_delay(asked: int, seconds: int) -> None:
    refresh = [meta for meta in Page(waiting_page("shop", asked)).attributes("meta") if "http-equiv" in meta]
    assert refresh[0]["content"] == str(seconds)
    assert dict(waiting_fields(asked))[b"retry-after"] == str(seconds).encode()


def test_the_answer_is_not_kept_not_indexed_and_html() -> None:
    fields = dict(waiting_fields(2, "de"))
    assert fields[b"content-type"] == b"text/html; charset=utf-8"
    assert fields[b"content-language"] == b"de" and dict(waiting_fields(2, "xx"))[b"content-language"] == b"en"
    assert fields[b"cache-control"] == b"no-store"
    assert fields[b"x-robots-tag"] == b"noindex"
    assert fields[b"x-content-type-options"] == b"nosniff"
    assert all(re.fullmatch(rb"[ -~]+", value) and name == name.lower() for name, value in waiting_fields(2))


@pytest.mark.parametrize(
    ("method", "accept", "mode", "dest", "with_", "wanted"),
    [
        (b"GET", FIREFOX, b"navigate", b"document", b"", True),
        (b"GET", FIREFOX, b"navigate", b"iframe", b"", True),
        (b"GET", FIREFOX, b"", b"", b"", True),  # no Sec-Fetch over plain HTTP
        (b"GET", b"TEXT/HTML", b"", b"", b"", True),
        (b"GET", b"application/xhtml+xml", b"", b"", b"", True),
        (b"HEAD", FIREFOX, b"navigate", b"document", b"", False),
        (b"POST", FIREFOX, b"navigate", b"document", b"", False),
        (b"GET", FIREFOX, b"cors", b"empty", b"", False),  # fetch()
        (b"GET", FIREFOX, b"same-origin", b"", b"", False),
        (b"GET", FIREFOX, b"websocket", b"websocket", b"", False),
        (b"GET", FIREFOX, b"no-cors", b"image", b"", False),
        (b"GET", FIREFOX, b"navigate", b"embed", b"", False),
        (b"GET", FIREFOX, b"", b"", b"XMLHttpRequest", False),
        (b"GET", b"*/*", b"", b"", b"", False),  # curl
        (b"GET", b"", b"", b"", b"", False),
        (b"GET", b"application/json, text/plain, */*", b"", b"", b"", False),
        (b"GET", b"text/event-stream", b"", b"", b"", False),
        (b"GET", b"text/html;q=0, */*", b"", b"", b"", False),
        (b"GET", b"text/html;q=0.000", b"", b"", b"", False),
        (b"GET", b"text/html;q=nan", b"", b"", b"", False),
        (b"GET", b"text/html; level=1; q=0.4", b"", b"", b"", True),
        (b"GET", b"text/htmlx", b"", b"", b"", False),
    ],
)
def test_only_a_browsers_navigation_is_shown_the_page(
    method: bytes, accept: bytes, mode: bytes, dest: bytes, with_: bytes, wanted: bool
) -> None:
    assert wants_page(method, accept, mode, dest, with_) is wanted


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        (b"", "en"),
        (b"de", "de"),
        (b"DE-at, de;q=0.9, en;q=0.8", "de"),
        (b"en;q=0.3, fr-CA;q=0.7", "fr"),
        (b"ja, nl;q=0.5", "nl"),
        (b"fr;q=0, es;q=0.1", "es"),
        (b"ja, zh;q=0.9", "en"),
        (b"*", "en"),
        (b"es, de", "es"),
        (b"de;q=nan, \xff, ;;,", "en"),
    ],
)
def test_the_page_speaks_the_language_that_is_liked_best(accepted: bytes, language: str) -> None:
    assert choose_language(accepted) == language


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_any_accept_fields_are_taken(accept: bytes, languages: bytes) -> None:
    wants_page(b"GET", accept)
    assert choose_language(languages) in LANGUAGES


@pytest.mark.parametrize(
    ("line", "fields", "language"),
    [
        (b"GET / HTTP/1.1", [b"Accept: " + FIREFOX, b"Sec-Fetch-Mode: navigate", b"Accept-Language: de"], "de"),
        (b"GET / HTTP/1.1", [b"ACCEPT: image/png", b"accept: text/html"], "en"),
        (b"GET / HTTP/1.1", [b"Accept: " + FIREFOX, b"Sec-Fetch-Mode: cors"], None),
        (b"GET / HTTP/1.1", [b"Accept: */*", b"User-Agent: curl/8.0"], None),
        (b"GET / HTTP/1.1", [b"Accept: " + FIREFOX, b"Content-Length: 5"], None),
        (b"HEAD / HTTP/1.1", [b"Accept: " + FIREFOX], None),
        (
            b"GET / HTTP/1.1",
            [
                b"Accept: " + FIREFOX, b"Connection: upgrade", b"Upgrade: websocket",
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13",
            ],
            None,
        ),
    ],
)  # fmt: skip
def test_a_request_on_the_wire_is_shown_the_page_or_not(line: bytes, fields: list[bytes], language: str | None) -> None:
    seen = read_requests(b"\r\n".join([line, b"Host: shop.test", *fields, b"", b""]))
    assert len(seen.heads) == 1
    assert page_language(seen.heads[0]) == language
