"""The admin API's endpoints for the fleet that this node belongs to: invites, and the nodes that it knows.

What is done is `Membership`'s; a node by itself answers 409 and says how to become one of several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from proxy.control.answers import ApiError, Json, json_answer, read_body
from proxy.control.membership import DEFAULT_VALID_S, InviteRow, Membership, MembershipRefused
from proxy.control.peers import Peers
from proxy.wire.joining import NodeRow
from proxy.wire.toml_table import parse_duration_s

_STATUS = {"not_found": 404, "invalid": 400, "unavailable": 503}
_CODE = {"not_found": "not_found", "invalid": "invalid_argument", "unavailable": "unavailable"}


class MembershipApi:
    """Hands out routes for api.py's application, whose guard answers what is raised here."""

    def __init__(
        self, membership: Callable[[], Membership | str], peers: Callable[[], Peers | str], now: Callable[[], float]
    ) -> None:
        """`membership` and `peers` say why, where there are none; `now` gives unix seconds."""
        self._membership = membership
        self._peers = peers
        self._now = now

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/node/invites", self._invite),
            web.get("/v1/node/invites", self._invites),
            web.delete("/v1/node/invites/{id}", self._revoke),
            web.get("/v1/node/members", self._members),
            web.get("/v1/nodes", self._nodes),
            web.get("/v1/regions", self._regions),
            web.post("/v1/node/drain", self._drain),
            web.post("/v1/node/undrain", self._undrain),
        ]

    async def _nodes(self, request: web.Request) -> web.Response:
        return json_answer({"nodes": self._met().to_json()})

    async def _regions(self, request: web.Request) -> web.Response:
        return json_answer({"regions": self._met().regions_json()})

    async def _drain(self, request: web.Request) -> web.Response:
        self._met().drain(True)
        return json_answer({"ok": True, "draining": True})

    async def _undrain(self, request: web.Request) -> web.Response:
        self._met().drain(False)
        return json_answer({"ok": True, "draining": False})

    def _met(self) -> Peers:
        peers = self._peers()
        if isinstance(peers, str):
            raise ApiError(409, "failed_precondition", peers)
        return peers

    async def _invite(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        membership = self._opened()
        valid = body.get("valid", DEFAULT_VALID_S)
        if (valid_s := parse_duration_s(valid, 1.0)) is None:
            raise ApiError(400, "invalid_argument", f'valid: expected a duration such as "15m", got {valid!r:.40}')
        try:
            issued = await membership.invite(valid_s, _text(body, "address"), _text(body, "replace"))
        except MembershipRefused as error:
            raise _as_api_error(error) from error
        shown = _invite_json(issued.row, self._now())
        return json_answer({**shown, "address": issued.address, "token": issued.token}, 201)

    async def _invites(self, request: web.Request) -> web.Response:
        now = self._now()
        return json_answer({"invites": [_invite_json(one, now) for one in self._opened().invites()]})

    async def _revoke(self, request: web.Request) -> web.Response:
        try:
            await self._opened().revoke(request.match_info["id"])
        except MembershipRefused as error:
            raise _as_api_error(error) from error
        return web.Response(status=204)

    async def _members(self, request: web.Request) -> web.Response:
        membership = self._opened()
        return json_answer({**membership.status(), "members": [_node_json(one) for one in membership.nodes]})

    def _opened(self) -> Membership:
        membership = self._membership()
        if isinstance(membership, str):
            raise ApiError(409, "failed_precondition", membership)
        return membership


def _text(body: Json, key: str) -> str:
    value: Any = body.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ApiError(400, "invalid_argument", f"{key}: expected a string")
    return value


def _as_api_error(error: MembershipRefused) -> ApiError:
    return ApiError(_STATUS[error.code], _CODE[error.code], str(error))


def _invite_json(row: InviteRow, now: float) -> Json:
    return {
        "id": row.id, "state": row.state(now), "created_at": row.created_at, "expires_at": row.expires_at,
        "replace": row.replace or None, "used_at": row.used_at or None, "used_by": row.used_by or None,
    }  # fmt: skip


def _node_json(row: NodeRow) -> Json:
    return {
        "id": row.name, "name": row.name, "region": row.region, "backhaul": row.backhaul or None, "key": row.key,
        "joined_at": row.joined_at,
    }  # fmt: skip
