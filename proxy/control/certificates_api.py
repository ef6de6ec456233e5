"""The admin API's endpoints for certificates: those of Fly's Machines API, and a few of ours for the whole node.

Here names are brought into one form, bodies and queries read, lists cut into pages; what is done is `Certificates`'
(domains.py). See docs/admin-api.md.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Protocol

from aiohttp import web

from proxy.control.answers import ApiError, Json, json_answer, large_json_answer, query_number, read_body

CHALLENGES = ("tls-alpn-01", "http-01", "dns-01")
IMPORT_PATH_END = "/certificates/custom"
MAX_IMPORT_BYTES = 128 * 1024  # a chain of 64 KiB and a key of 16 KiB, written as JSON, and as much again
PAGE = 50
LONGEST_PAGE = 500
Rows = list[Json]  # where a method `list` hides the other
_STATUS = {"not_found": 404, "conflict": 409, "invalid": 422, "unavailable": 503}


class DomainRefused(Exception):
    """Why something cannot be done with a name: `code` is not_found, conflict, invalid or unavailable.

    `faults` are objects with code, message and remedy, where there is more to say than `text` does.
    """

    def __init__(self, code: str, text: str, faults: Sequence[Json] = ()) -> None:
        super().__init__(text)
        self.code = code
        self.faults = list(faults)

    @property
    def status(self) -> int:
        return _STATUS[self.code]

    @property
    def body(self) -> Json:
        return {"error": str(self), "status": self.code, "faults": self.faults}


class Certificates(Protocol):
    """The names of all apps and their certificates. Names come in lower-case A-labels, perhaps with `*.` before them.

    A summary has the keys of Fly's and `app`; a detail those of Fly's and `app`, `challenge`, `next_try_at` and `order`
    ({step, since} or None). All raise DomainRefused.
    """

    async def list(self, app: str | None) -> Rows:
        """Summaries, of all apps if None, in no order."""

    def get(self, app: str, hostname: str) -> Json:
        """Detail."""

    async def add(self, app: str, hostname: str, challenge: str | None) -> Json:
        """Detail; nothing new where the app has the name already."""

    async def import_custom(self, app: str, hostname: str, fullchain: bytes, key: bytes) -> Json:
        """Detail."""

    async def check(self, app: str, hostname: str) -> Json:
        """Detail and `dns_records`, and `findings`: {code, severity, message, remedy, records, remove}."""

    async def renew(self, app: str, hostname: str) -> Json:
        """Detail; a new managed certificate is ordered at once, the present one is shown meanwhile."""

    async def remove(self, app: str, hostname: str, kind: str | None) -> Json | None:
        """The name with all it has (None), or its "custom" or "acme" certificate: then what is left, a detail."""

    async def forecast(self) -> Rows:
        """Soonest first: {hostname, app, source, expires_at, renew_at, next_action, will_fail, reason}."""

    async def roll_account_key(self) -> Json:
        """The account."""

    def account(self) -> Json: ...


class CertificatesApi:
    """Hands out routes for api.py's application, whose guard answers what is raised here."""

    def __init__(
        self, certificates: Certificates, normalise: Callable[[str], str], has_app: Callable[[str], bool]
    ) -> None:
        """`normalise` brings a name into its one form, and raises ValueError that says what is wrong with it."""
        self._certificates = certificates
        self._normalise = normalise
        self._has_app = has_app

    def routes(self) -> list[web.RouteDef]:
        mine = "/v1/apps/{app}/certificates"
        one = mine + "/{hostname}"
        return [
            web.get(mine, self._list_of_app),
            web.post(mine + "/acme", self._add),
            web.post(mine + "/custom", self._import),
            web.get(one, self._get),
            web.post(one + "/check", self._check),
            web.post(one + "/renew", self._renew),
            web.delete(one, self._remove),
            web.delete(one + "/acme", self._remove_acme),
            web.delete(one + "/custom", self._remove_custom),
            web.get("/v1/certificates", self._list_of_node),
            web.get("/v1/certificates/forecast", self._forecast),
            web.get("/v1/certificates/account", self._account),
            web.post("/v1/certificates/account/rollover", self._roll_over),
        ]

    # --- lists

    async def _list_of_app(self, request: web.Request) -> web.Response:
        return await self._page(request, await self._certificates.list(self._app(request)))

    async def _list_of_node(self, request: web.Request) -> web.Response:
        """All apps' names; with `hostname` that one alone, which is how to find the app it belongs to."""
        found = await self._certificates.list(None)
        if (wanted := request.query.get("hostname")) is not None:
            name = self._name(wanted)
            found = [one for one in found if one["hostname"] == name]
        return await self._page(request, found)

    async def _page(self, request: web.Request, found: list[Json]) -> web.Response:
        limit = int(query_number(request, "limit", PAGE, 1, LONGEST_PAGE))
        after = _cursor_name(request.query.get("cursor", ""))
        return await large_json_answer(
            await asyncio.to_thread(_page_of, found, request.query.get("filter", ""), after, limit)
        )

    # --- one name

    async def _get(self, request: web.Request) -> web.Response:
        return json_answer(self._certificates.get(self._app(request), self._hostname(request)))

    async def _add(self, request: web.Request) -> web.Response:
        app = self._app(request)
        body = await read_body(request, required=True)
        name = self._name(body.get("hostname"))
        challenge = body.get("challenge")
        if challenge is not None and challenge not in CHALLENGES:
            raise DomainRefused("invalid", f"challenge: expected one of {', '.join(CHALLENGES)}, got {challenge!r:.40}")
        if name.startswith("*.") and challenge not in (None, "dns-01"):
            raise DomainRefused("invalid", f"challenge: a wildcard can be proven by dns-01 only, not by {challenge}")
        return json_answer(await self._certificates.add(app, name, challenge), 201)

    async def _import(self, request: web.Request) -> web.Response:
        app = self._app(request)
        body = await read_body(request, required=True, limit=MAX_IMPORT_BYTES)
        name = self._name(body.get("hostname"))
        chain, key = _pem(body, "fullchain"), _pem(body, "private_key")
        return json_answer(await self._certificates.import_custom(app, name, chain, key), 201)

    async def _check(self, request: web.Request) -> web.Response:
        return json_answer(await self._certificates.check(self._app(request), self._hostname(request)))

    async def _renew(self, request: web.Request) -> web.Response:
        return json_answer(await self._certificates.renew(self._app(request), self._hostname(request)), 202)

    async def _remove(self, request: web.Request) -> web.Response:
        await self._certificates.remove(self._app(request), self._hostname(request), None)
        return web.Response(status=204)

    async def _remove_acme(self, request: web.Request) -> web.Response:
        return await self._remove_kind(request, "acme")

    async def _remove_custom(self, request: web.Request) -> web.Response:
        return await self._remove_kind(request, "custom")

    async def _remove_kind(self, request: web.Request, kind: str) -> web.Response:
        left = await self._certificates.remove(self._app(request), self._hostname(request), kind)
        return web.Response(status=204) if left is None else json_answer(left)

    # --- the node

    async def _forecast(self, request: web.Request) -> web.Response:
        return await large_json_answer({"certificates": await self._certificates.forecast()})

    async def _account(self, request: web.Request) -> web.Response:
        return json_answer(self._certificates.account())

    async def _roll_over(self, request: web.Request) -> web.Response:
        return json_answer(await self._certificates.roll_account_key())

    # --- what was asked for

    def _app(self, request: web.Request) -> str:
        name = request.match_info["app"]
        if not self._has_app(name):
            raise ApiError(404, "not_found", f"app {name} not found")
        return name

    def _hostname(self, request: web.Request) -> str:
        return self._name(request.match_info["hostname"])

    def _name(self, text: object) -> str:
        if not isinstance(text, str) or not text.strip():
            raise DomainRefused("invalid", "hostname: expected a host name, as in shop.example.com")
        try:
            return self._normalise(text)
        except ValueError as error:
            raise DomainRefused("invalid", f"hostname: {error}") from error


def status_word(summary: Json) -> str:
    """How a name stands, in one word, as Fly's list has it (spec: flyctl `certs list`)."""
    if summary.get("has_custom_certificate"):
        return "verified" if summary.get("configured") else "not_verified"
    if summary.get("configured"):
        return "issued"
    proven = any(summary.get(f"acme_{way}_configured") for way in ("dns", "alpn", "http"))
    return "issuing" if proven else "not_verified"


def _page_of(found: list[Json], wanted: str, after: str, limit: int) -> Json:
    """Runs in a thread: there may be tens of thousands."""
    wanted = wanted.strip().lower()
    matching = sorted((one for one in found if wanted in one["hostname"]), key=lambda one: str(one["hostname"]))
    counts = {"verified": 0, "issued": 0, "issuing": 0, "not_verified": 0}
    for one in matching:
        counts[status_word(one)] += 1
    rest = [one for one in matching if one["hostname"] > after]
    page: Json = {"certificates": rest[:limit], "total_count": len(matching), "counts": counts}
    if len(rest) > limit:
        page["next_cursor"] = base64.urlsafe_b64encode(rest[limit - 1]["hostname"].encode()).decode()
    return page


def _cursor_name(cursor: str) -> str:
    """The name after which a page begins: a cursor stays good while names come and go."""
    try:
        return base64.urlsafe_b64decode(cursor.encode("ascii")).decode("ascii")
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_argument", "cursor: expected the next_cursor of an earlier answer") from None


def _pem(body: Json, key: str) -> bytes:
    text = body.get(key)
    if not isinstance(text, str):
        raise DomainRefused("invalid", f"{key}: expected PEM, as text")
    try:
        return text.encode("utf-8", "surrogateescape")  # the CLI sends what is no text so, to be told what it is
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")
