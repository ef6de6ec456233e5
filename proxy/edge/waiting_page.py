"""What a person sees while an app starts: a page that asks again by itself, for apps that want it.

The page needs no script and loads nothing; it is read by screen readers as a status, follows the colours of the
system, and offers a link to whoever does not want to wait for the refresh. When it is shown instead of holding the
request is the exchange's to decide; `wants_page` says for which requests it can be: a browser's navigations, never
what a program asks for.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from html import escape

from proxy.decide.navigation import wants_page, weighed
from proxy.wire.http1 import Headers, RequestHead

STATUS = 503
REFRESH_MAX_S = 3600

_STYLE = (
    ":root{color-scheme:light dark}"
    "body{margin:0;min-height:100vh;display:grid;place-items:center;font:1.125rem/1.5 system-ui,sans-serif;"
    "color:#1b1b1b;background:#fafafa}"
    "main{max-width:32rem;padding:2rem}h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}"
    "a{color:#0b57d0}a:focus-visible{outline:3px solid;outline-offset:3px}"
    "@media(prefers-color-scheme:dark){body{color:#ececec;background:#161616}a{color:#a8c7fa}}"
)
# Nothing but this very style: a page shown under an app's own name must be of no use to anyone else.
_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-"
    + b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)

# title and heading; what happens; the link. {app} and {seconds} are put in.
_TEXTS = {
    "en": (
        "{app} is starting",
        "This page asks again by itself, next in {seconds} s. You do not have to do anything.",
        "Try again now",
    ),
    "de": (
        "{app} wird gestartet",
        "Diese Seite fragt von selbst wieder nach, das nächste Mal in {seconds} s. Sie müssen nichts tun.",
        "Jetzt erneut versuchen",
    ),
    "es": (
        "{app} se está iniciando",
        "Esta página vuelve a intentarlo por sí sola, la próxima vez en {seconds} s. No tiene que hacer nada.",
        "Reintentar ahora",
    ),
    "fr": (
        "{app} démarre",
        "Cette page réessaie d’elle-même, la prochaine fois dans {seconds} s. Vous n’avez rien à faire.",
        "Réessayer maintenant",
    ),
    "nl": (
        "{app} wordt gestart",
        "Deze pagina probeert het vanzelf opnieuw, de volgende keer over {seconds} s. U hoeft niets te doen.",
        "Nu opnieuw proberen",
    ),
}
DEFAULT_LANGUAGE = "en"


def waiting_page(app_name: str, retry_after_s: int, language: str = DEFAULT_LANGUAGE) -> bytes:
    """The page, in a language of ours or else in English. It asks again after `retry_after_s`, at least 1 s."""
    code = language if language in _TEXTS else DEFAULT_LANGUAGE
    seconds = _refresh(retry_after_s)
    title, text, link = (part.format(app=app_name, seconds=seconds) for part in _TEXTS[code])
    heading = escape(title)
    page = (
        f'<!doctype html>\n<html lang="{code}">\n<head>\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="robots" content="noindex">\n'
        f'<meta http-equiv="refresh" content="{seconds}">\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n<main>\n<div role="status">\n<h1>{heading}</h1>\n<p>{escape(text)}</p>\n</div>\n'
        f'<p><a href="">{escape(link)}</a></p>\n</main>\n</body>\n</html>\n'
    )
    return page.encode("utf-8", "replace")


def waiting_fields(retry_after_s: int, language: str = DEFAULT_LANGUAGE) -> tuple[tuple[bytes, bytes], ...]:
    """The response fields that go with the page, beside STATUS."""
    code = language if language in _TEXTS else DEFAULT_LANGUAGE
    return (
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-language", code.encode()),
        (b"content-security-policy", _POLICY.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"x-robots-tag", b"noindex"),
        (b"cache-control", b"no-store"),
        (b"retry-after", b"%d" % _refresh(retry_after_s)),
    )


def _refresh(retry_after_s: int) -> int:
    return min(max(1, retry_after_s), REFRESH_MAX_S)


def page_language(head: RequestHead) -> str | None:
    """The language of the page that this request may be answered with; None if it is not one to show a page to."""
    if head.method != b"GET" or head.upgrade is not None or head.length != 0:
        return None
    fields = head.fields
    wanted = wants_page(
        head.method,
        _field(fields, b"accept"),
        _field(fields, b"sec-fetch-mode"),
        _field(fields, b"sec-fetch-dest"),
        _field(fields, b"x-requested-with"),
    )
    return choose_language(_field(fields, b"accept-language")) if wanted else None


def _field(fields: Headers, name: bytes) -> bytes:
    """The value of a field, several lines of it joined as RFC 9110 §5.3 has it; empty without one."""
    return b", ".join(value for found, value in fields if found.lower() == name)


def choose_language(accept_language: bytes) -> str:
    """The language of ours that a browser likes best, by its primary subtag; English if it names none of them."""
    best, best_weight = DEFAULT_LANGUAGE, 0.0
    for tag, weight in weighed(accept_language):
        code = tag.partition(b"-")[0].decode("latin-1")
        if code in _TEXTS and weight > best_weight:
            best, best_weight = code, weight
    return best
