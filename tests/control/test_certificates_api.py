"""The endpoints of certificates over real TCP; what is behind them is kept in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import pytest_asyncio

from certs.names import custom_domain
from proxy.control.api import Api
from proxy.control.certificates_api import MAX_IMPORT_BYTES, CertificatesApi
from proxy.metrics import Metrics
from tests.certs.test_custom import CA, KEY, LEAF
from tests.control.rig import Rig, an_app
from tests.control.test_api import Client, Node
from tests.support.kept_certificates import KeptCertificates

BASE = "/v1/apps/web/certificates"
HOST = "shop.example.com"


@pytest.fixture
def kept() -> KeptCertificates:
    return KeptCertificates()


@pytest_asyncio.fixture
async def client(rig: Rig, kept: KeptCertificates) -> AsyncIterator[Client]:
    await rig.load(an_app(), an_app("other"))
    node = Node(rig)
    api = Api(node, rig.apps, rig.fleet, rig.store, Metrics(rig.memory, node), rig.clock, str(rig.folder))
    api.certificates = CertificatesApi(kept, custom_domain, lambda name: rig.apps.get(name) is not None)
    await api.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        yield Client(rig, node, api, session)
    await api.close()


async def post(client: Client, path: str, body: Any) -> tuple[int, Any]:
    return await client.ask("POST", path, data=body if isinstance(body, str) else json.dumps(body))


async def test_all_need_the_token(client: Client) -> None:
    for path in (BASE, f"{BASE}/{HOST}", "/v1/certificates", "/v1/certificates/forecast", "/v1/certificates/account"):
        assert (await client.ask("GET", path, token=None))[0] == 401
    for path in (f"{BASE}/acme", f"{BASE}/custom", "/v1/certificates/account/rollover"):
        assert (await client.ask("POST", path, token=None))[0] == 401
    assert (await client.ask("DELETE", f"{BASE}/{HOST}", token=None))[0] == 401


async def test_a_name_is_added_once_shown_checked_and_removed(client: Client, kept: KeptCertificates) -> None:
    for _ in range(2):
        status, detail = await post(client, f"{BASE}/acme", {"hostname": "Shop.Example.COM."})
        assert status == 201 and detail["hostname"] == HOST and detail["status"] == "pending_validation"
    assert list(kept.names) == [HOST]
    assert (await client.ask("GET", f"{BASE}/{HOST}"))[1] == detail
    assert detail["dns_requirements"]["acme_challenge"]["name"] == f"_acme-challenge.{HOST}"
    status, checked = await client.ask("POST", f"{BASE}/{HOST}/check")
    assert status == 200 and checked["dns_records"]["a"] == ["203.0.113.9"] and checked["findings"] == []
    assert await client.ask("DELETE", f"{BASE}/{HOST}") == (204, "")
    assert (await client.ask("GET", f"{BASE}/{HOST}"))[0] == 404


async def test_a_wildcard_is_named_with_or_without_escape(client: Client, kept: KeptCertificates) -> None:
    assert (await post(client, f"{BASE}/acme", {"hostname": "*.example.com", "challenge": "dns-01"}))[0] == 201
    for name in ("%2A.example.com", "*.example.com", quote("*.EXAMPLE.com")):
        status, detail = await client.ask("GET", f"{BASE}/{name}")
        assert status == 200 and detail["hostname"] == "*.example.com"
    assert (await client.ask("DELETE", f"{BASE}/%2a.example.com"))[0] == 204


async def test_an_international_name_is_kept_in_a_labels(client: Client, kept: KeptCertificates) -> None:
    assert (await post(client, f"{BASE}/acme", {"hostname": "bücher.example"}))[0] == 201
    assert (await client.ask("GET", f"{BASE}/{quote('bücher.example')}"))[1]["hostname"] == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "expected a host name"),
        ({"hostname": 7}, "expected a host name"),
        ({"hostname": "  "}, "expected a host name"),
        ({"hostname": "192.0.2.1"}, "IP address"),
        ({"hostname": "*.co.uk"}, "strangers"),
        ({"hostname": "my_shop.example.com"}, "my_shop"),
        ({"hostname": "a" * 300 + ".example"}, "253 at most"),
        ({"hostname": "shop.\x00.example"}, "is not"),
        ({"hostname": HOST, "challenge": "dns-02"}, "expected one of tls-alpn-01"),
        ({"hostname": HOST, "challenge": ["x"]}, "expected one of tls-alpn-01"),
        ({"hostname": "*.example.com", "challenge": "http-01"}, "wildcard"),
    ],
)
async def test_a_name_or_challenge_that_cannot_be_is_422_with_the_reason(
    client: Client, kept: KeptCertificates, body: Any, says: str
) -> None:
    status, answer = await post(client, f"{BASE}/acme", body)
    assert (status, answer["status"]) == (422, "invalid") and says in answer["error"]
    assert kept.calls == []


@pytest.mark.parametrize("body", ["", "junk", "[]", "[" * 60_000])
async def test_a_body_that_is_no_object_is_400(client: Client, body: str) -> None:
    for way in ("acme", "custom"):
        assert (await post(client, f"{BASE}/{way}", body))[0] == 400


async def test_what_is_not_there_is_404_and_what_is_anothers_409(client: Client, kept: KeptCertificates) -> None:
    kept.put(HOST, "other")
    status, answer = await post(client, f"{BASE}/acme", {"hostname": HOST})
    assert (status, answer["status"]) == (409, "conflict") and "other" in answer["error"]
    assert (await client.ask("GET", f"{BASE}/{HOST}"))[0] == 404
    assert (await client.ask("POST", f"{BASE}/{HOST}/check"))[0] == 404
    assert (await client.ask("DELETE", f"{BASE}/{HOST}"))[0] == 404
    for path in ("", "/x.example.com"):
        status, answer = await client.ask("GET", f"/v1/apps/nope/certificates{path}")
        assert status == 404 and answer["error"] == "app nope not found"
    assert (await post(client, "/v1/apps/nope/certificates/acme", {"hostname": HOST}))[0] == 404
    assert HOST in kept.names


async def test_what_cannot_be_done_now_is_503_with_the_reason(client: Client, kept: KeptCertificates) -> None:
    kept.offline = "the store is not open yet"
    status, answer = await post(client, f"{BASE}/acme", {"hostname": HOST})
    assert status == 503 and answer["error"] == kept.offline


# --- import


def custom(chain: bytes = LEAF + CA, key: bytes = KEY, host: str = HOST) -> dict[str, str]:
    return {"hostname": host, "fullchain": chain.decode(), "private_key": key.decode()}


async def test_a_certificate_is_imported_and_one_kind_is_taken_away(client: Client, kept: KeptCertificates) -> None:
    status, detail = await post(client, f"{BASE}/custom", custom())
    assert status == 201 and [one["source"] for one in detail["certificates"]] == ["custom"]
    assert "PRIVATE KEY" not in json.dumps(detail)
    kept.issue(HOST)
    status, left = await client.ask("DELETE", f"{BASE}/{HOST}/custom")
    assert status == 200 and [one["source"] for one in left["certificates"]] == ["fly"]
    status, left = await client.ask("DELETE", f"{BASE}/{HOST}/acme")
    assert status == 200 and left["certificates"] == [] and left["acme_requested"] is False


async def test_an_import_with_faults_is_422_with_all_of_them(client: Client, kept: KeptCertificates) -> None:
    status, answer = await post(client, f"{BASE}/custom", custom(LEAF, b"", "other.example"))
    assert status == 422 and [one["code"] for one in answer["faults"]] == ["no_key", "wrong_host"]
    assert all(one["message"] and one["remedy"] for one in answer["faults"])
    for body in ({"hostname": HOST}, {**custom(), "private_key": 9}, {**custom(), "fullchain": None}):
        status, answer = await post(client, f"{BASE}/custom", body)
        assert status == 422 and "expected PEM" in answer["error"]
    status, answer = await post(client, f"{BASE}/custom", json.dumps({**custom(), "fullchain": "\ud800"}))
    assert status == 422 and answer["faults"][0]["code"] == "no_pem"
    assert kept.names == {}


@pytest.mark.parametrize(("size", "status", "says"), [(80_000, 422, "65,536"), (1_000_000, 413, "131072 bytes")])
async def test_a_chain_that_is_too_long_is_refused_with_the_limit(
    client: Client, kept: KeptCertificates, size: int, status: int, says: str
) -> None:
    got, answer = await post(client, f"{BASE}/custom", custom(b"x" * size))
    assert got == status and says in answer["error"] + str(answer.get("faults"))
    assert kept.names == {}


async def test_a_body_without_a_length_is_bounded_too(client: Client) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b" " * 1024

    assert (await client.ask("POST", f"{BASE}/custom", data=endless()))[0] == 413
    assert (await client.ask("POST", f"{BASE}/acme", data=endless()))[0] == 413

    async def between() -> AsyncIterator[bytes]:
        for _ in range(MAX_IMPORT_BYTES // 1024 - 10):
            yield b" " * 1024

    assert (await client.ask("POST", f"{BASE}/acme", data=between()))[0] == 413


# --- lists


async def test_a_list_comes_in_pages_that_stay_whole_while_names_come_and_go(
    client: Client, kept: KeptCertificates
) -> None:
    for number in range(120):
        kept.put(f"n{number:03}.example.com", "web" if number % 2 else "other")
    seen: list[str] = []
    cursor = ""
    while True:
        _, page = await client.ask("GET", f"{BASE}?limit=25" + (f"&cursor={cursor}" if cursor else ""))
        seen += [one["hostname"] for one in page["certificates"]]
        kept.names.pop("n001.example.com", None)  # of the first page
        if not (cursor := page.get("next_cursor", "")):
            break
    assert seen == [f"n{number:03}.example.com" for number in range(1, 120, 2)]
    _, page = await client.ask("GET", BASE)
    assert len(page["certificates"]) == 50 and page["total_count"] == 59
    _, page = await client.ask("GET", "/v1/certificates?limit=9999")
    assert page["total_count"] == 119 and len(page["certificates"]) == 119 and "next_cursor" not in page


async def test_a_list_is_filtered_and_counts_how_names_stand(client: Client, kept: KeptCertificates) -> None:
    kept.put("a.example.com")
    kept.put("b.example.com", acme_alpn_configured=True)
    kept.put("c.example.com", configured=True)
    kept.put("d.example.com", configured=True, has_custom_certificate=True)
    kept.put("e.example.com", has_custom_certificate=True)
    kept.put("f.example.net", "other")
    _, page = await client.ask("GET", "/v1/certificates?filter=.EXAMPLE.com")
    assert page["total_count"] == 5
    assert page["counts"] == {"verified": 1, "issued": 1, "issuing": 1, "not_verified": 2}
    _, page = await client.ask("GET", "/v1/certificates?hostname=F.example.net.")
    assert [(one["hostname"], one["app"]) for one in page["certificates"]] == [("f.example.net", "other")]
    assert (await client.ask("GET", "/v1/certificates?hostname=x.example"))[1]["total_count"] == 0


@pytest.mark.parametrize("query", ["limit=many", "limit=nan", "cursor=%FF", "cursor=abc", "cursor=w4Q%3D"])
async def test_a_page_that_cannot_be_is_400(client: Client, query: str) -> None:
    assert (await client.ask("GET", f"{BASE}?{query}"))[0] == 400


# --- the node


async def test_forecast_and_account_are_told_and_the_key_is_rolled(client: Client, kept: KeptCertificates) -> None:
    _, forecast = await client.ask("GET", "/v1/certificates/forecast")
    assert [one["will_fail"] for one in forecast["certificates"]] == [True, False]
    assert (await client.ask("GET", "/v1/certificates/account"))[1]["key_thumbprint"] == "key-1"
    assert (await post(client, "/v1/certificates/account/rollover", ""))[1]["key_thumbprint"] == "key-2"
    assert (await client.ask("GET", "/v1/certificates/account/rollover"))[0] == 405


async def test_a_node_without_certificates_has_no_such_paths(rig: Rig) -> None:
    await rig.load(an_app())
    node = Node(rig)
    api = Api(node, rig.apps, rig.fleet, rig.store, Metrics(rig.memory, node), rig.clock, str(rig.folder))
    await api.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        assert (await Client(rig, node, api, session).ask("GET", BASE))[0] == 404
    await api.close()
