"""`wakefront certs …` against the real admin API, with names kept in memory."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import dns.rdatatype
import dns.zone
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from certs.custom import MAX_CHAIN_BYTES
from certs.names import custom_domain
from proxy.cli import certs as words_of_certs
from proxy.control import certificates_api
from proxy.control.api import Api
from proxy.control.certificates_api import CertificatesApi
from proxy.metrics import Metrics
from tests.certs.test_custom import CA, KEY, LEAF, leaf
from tests.cli.conftest import Outcome, Run
from tests.cli.scripted_admin import write_config
from tests.control.rig import Rig, an_app
from tests.control.test_api import Node
from tests.support.kept_certificates import KeptCertificates

Words = Callable[..., Awaitable[Outcome]]
HOST = "shop.example.com"
ROOT = Path(__file__).resolve().parents[2]


@pytest_asyncio.fixture
async def kept(tmp_path: Path) -> AsyncIterator[KeptCertificates]:
    """A node with one app, web, whose admin API ./config.toml names."""
    folder = tmp_path / "data"
    folder.mkdir()
    rig, kept = Rig(folder), KeptCertificates()
    await rig.load(an_app())
    api = Api(Node(rig), rig.apps, rig.fleet, rig.store, Metrics(rig.memory, Node(rig)), rig.clock, str(folder))
    api.certificates = CertificatesApi(kept, custom_domain, lambda name: name == "web" or name in kept.more_apps)
    await api.start("127.0.0.1", 0)
    assert api.address is not None
    write_config(tmp_path, api.address[1], None)
    yield kept
    await api.close()
    await rig.close()


@pytest.fixture
def words(run: Run) -> Words:
    async def words(*words: str) -> Outcome:
        return await asyncio.to_thread(run, "certs", *words)

    return words


def records(out: str) -> list[tuple[str, str, str]]:
    """Name, type and value of each record line, as a DNS server would read what is pasted."""
    lines = [line.strip() for line in out.splitlines() if "  IN  " in line]
    zone = dns.zone.from_text("\n".join(lines), origin=".", relativize=False, check_origin=False)
    return sorted(
        (name.to_text(), dns.rdatatype.to_text(data.rdtype), data.to_text()) for name, _, data in zone.iterate_rdatas()
    )


def test_limits_and_counts_are_the_nodes() -> None:
    assert words_of_certs.FIRST == certificates_api.PAGE
    assert words_of_certs._PAGE == certificates_api.LONGEST_PAGE
    assert words_of_certs._MAX_FILE_BYTES == MAX_CHAIN_BYTES


# --- add


async def test_add_says_what_to_put_into_dns_and_how_to_go_on(kept: KeptCertificates, words: Words) -> None:
    done = await words("add", "Shop.Example.com")
    assert done.code == 0 and done.out.startswith("Certificate created for shop.example.com (app web)\n")
    assert records(done.out) == [
        ("shop.example.com.", "A", "192.0.2.10"),
        ("shop.example.com.", "AAAA", "2001:db8::10"),
    ]
    assert "wakefront certs check shop.example.com" in done.out and "certs setup" in done.out
    assert "www." not in done.out
    assert kept.calls == [("add", "web", HOST, "")]


async def test_add_of_an_apex_speaks_of_www_and_of_a_wildcard_of_the_cname(
    kept: KeptCertificates, words: Words
) -> None:
    assert "www.example.co.uk" in (await words("add", "example.co.uk")).out
    out = (await words("add", "*.example.com", "--challenge", "dns-01")).out
    assert records(out) == [
        ("*.example.com.", "CNAME", "web.apps.example.net."),
        ("_acme-challenge.example.com.", "CNAME", "example.com.k7.acme.example.net."),
        ("_fly-ownership.example.com.", "TXT", '"app-k7"'),
    ]
    assert "certs check '*.example.com'" in out  # a shell would look for files
    assert kept.calls[-1] == ("add", "web", "*.example.com", "dns-01")


@pytest.mark.slow
async def test_a_name_may_be_written_in_any_form(kept: KeptCertificates, words: Words) -> None:
    assert "created for xn--bcher-kva.example" in (await words("add", "Bücher.example")).out
    assert "created for *.example.com" in (await words("add", "*.Example.com.")).out
    for written, name in (("BÜCHER.example.", "xn--bcher-kva.example"), ("*.EXAMPLE.com", "*.example.com")):
        for more in ((), ("-a", "web")):
            assert f"Hostname     = {name}\n" in (await words("show", written, *more)).out
            assert name in (await words("setup", written, *more)).out
        assert (await words("remove", written, "-y")).out == f"Certificate for {name} removed from app web\n"


async def test_add_warns_where_the_node_does_not_know_its_addresses(kept: KeptCertificates, words: Words) -> None:
    kept.addresses = ([], [])
    out = (await words("add", HOST)).out
    assert "warning" in out and "addresses" in out and "[certs]" in out and records(out) == []


async def test_add_again_is_no_error_and_json_is_the_nodes_answer(kept: KeptCertificates, words: Words) -> None:
    await words("add", HOST)
    kept.issue(HOST)
    assert "already" in (await words("add", HOST)).out
    detail = (await words("add", HOST, "--json")).json
    assert detail["hostname"] == HOST and detail["configured"] is True and detail["app"] == "web"


@pytest.mark.slow
async def test_add_waits_and_says_each_step(kept: KeptCertificates, words: Words) -> None:
    kept.put(HOST, order={"step": "proving", "since": 1.0})
    kept.issue_after[HOST] = 3
    done = await words("add", HOST, "--wait", "10")
    assert done.code == 0 and "waits for the CA to look at the domain" in done.out
    assert "issued by Pebble Intermediate" in done.out and "IN  A" not in done.out
    kept.put("b.example.com")
    kept.issue_after["b.example.com"] = 2
    assert (await words("add", "b.example.com", "--wait", "10", "--json")).json["configured"] is True


@pytest.mark.slow
async def test_add_that_waits_in_vain_ends_with_the_reason(kept: KeptCertificates, words: Words) -> None:
    error = {"code": "dns", "message": "DNS leads\x1b[2J elsewhere.", "remediation": "Change it.", "timestamp": 1.0}
    kept.put(HOST, validation_errors=[error])
    ended = await words("add", HOST, "--wait", "0.3")
    assert ended.code == 1 and "no certificate after 0.3 s" in ended.err and "certs check" in ended.err
    assert "DNS leads?[2J elsewhere" in ended.err and "\x1b" not in ended.out


@pytest.mark.slow
async def test_the_app_is_the_one_that_has_the_name_or_the_only_one(
    kept: KeptCertificates, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.more_apps.add("other")
    kept.put(HOST, "other")
    assert (await words("show", HOST, "--json")).json["app"] == "other"
    assert "(app other)" in (await words("add", HOST)).out
    refused = await words("add", HOST, "--app", "web")
    assert refused.code == 1 and "belongs to app other" in refused.err
    monkeypatch.setattr(words_of_certs, "list_apps", lambda api: [{"name": "web"}, {"name": "other"}])
    refused = await words("add", "new.example.com")
    assert refused.code == 2 and "--app: other, web" in refused.err
    assert (await words("add", "new.example.com", "-a", "other")).code == 0
    refused = await words("add", HOST, "-a", "nope")
    assert refused.code == 1 and "app nope not found" in refused.err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("192.0.2.1", "IP address"),
        ("*.com", "strangers"),
        ("my_shop.example.com", "my_shop"),
        ("localhost", "one part"),
    ],
)
async def test_a_name_that_is_none_is_refused_with_the_reason(
    kept: KeptCertificates, words: Words, name: str, says: str
) -> None:
    for command in ("add", "check", "show", "setup", "remove"):
        ended = await words(command, name)
        assert ended.code == 2 and says in ended.err and ended.out == "", command
    assert kept.calls == []


@pytest.mark.parametrize("command", ["add", "check", "show", "setup", "remove"])
async def test_an_empty_name_means_none(kept: KeptCertificates, words: Words, command: str) -> None:
    assert (await words(command, "")).code == 2


@pytest.mark.slow
async def test_a_name_nobody_added_is_said_so_with_the_one_that_was_meant(kept: KeptCertificates, words: Words) -> None:
    kept.put(HOST)
    for command in ("check", "show", "setup", "remove"):
        ended = await words(command, "shpo.example.com")
        assert ended.code == 1 and f"did you mean {HOST}?" in ended.err and "certs add" in ended.err
        ended = await words(command, "shpo.example.com", "-a", "web")
        assert ended.code == 1 and "has no shpo.example.com" in ended.err


# --- check and show


async def test_check_of_a_good_name_shows_its_rows_and_ends_with_0(kept: KeptCertificates, words: Words) -> None:
    kept.put(HOST)
    kept.issue(HOST)
    done = await words("check", HOST)
    rows = dict(line.split(" = ") for line in done.out.splitlines() if " = " in line)
    rows = {title.strip(): value for title, value in rows.items()}
    assert rows["Status"] == "Issued" and rows["Hostname"] == HOST and rows["Certificate Authority"] == "pebble"
    assert rows["Issuer"] == "Pebble Intermediate" and rows["Issued"] == "ecdsa"
    assert rows["Added to App"].startswith("2026-11-01") and rows["Expires"].startswith("2027-02-20 00:00 UTC")
    assert rows["A"] == "203.0.113.9"
    assert done.code == 0 and done.out.endswith("Certificate is verified and active\n")


async def test_check_tells_causes_remedies_and_records_to_paste_and_ends_with_1(
    kept: KeptCertificates, words: Words
) -> None:
    kept.put(HOST)
    kept.findings[HOST] = [
        {
            "code": "wrong_address", "severity": "error", "message": f"{HOST} leads to 203.0.113.9, not here.",
            "remedy": "Change its A record.", "records": [{"type": "A", "name": HOST, "value": "192.0.2.10"}],
            "remove": [{"type": "AAAA", "name": HOST, "value": "2001:db8::bad"}],
        },
        {
            "code": "caa", "severity": "error", "message": "CAA of example.com permits only other.example.",
            "remedy": "Permit the CA.",
            "records": [{"type": "CAA", "name": "example.com", "value": '0 issue "letsencrypt.org"'}], "remove": [],
        },
        {
            "code": "ownership", "severity": "warning", "message": "A CDN stands before it.", "remedy": "Prove it.",
            "records": [{"type": "TXT", "name": f"_fly-ownership.{HOST}", "value": 'app-k7;a"b\\c' + "x" * 300}],
            "remove": [],
        },
        {"code": "seen", "severity": "info", "message": "Nothing\x07 more.", "remedy": "", "records": []},
    ]  # fmt: skip
    ended = await words("check", HOST)
    assert ended.code == 1 and "Problem: shop.example.com leads to 203.0.113.9" in ended.out
    assert "Warning: A CDN" in ended.out and "Note: Nothing? more." in ended.out and "Change its A record." in ended.out
    long = '"app-k7;a\\"b\\\\c' + "x" * 243 + '" "' + "x" * 57 + '"'
    assert records(ended.out) == [
        ("_fly-ownership.shop.example.com.", "TXT", long),
        ("example.com.", "CAA", '0 issue "letsencrypt.org"'),
        ("shop.example.com.", "A", "192.0.2.10"),
        ("shop.example.com.", "AAAA", "2001:db8::bad"),
    ]
    assert ended.out.index("Set:") < ended.out.index("192.0.2.10") < ended.out.index("Remove:") < ended.out.index("bad")
    told = {"code": "not_pointed", "message": f"{HOST} leads to 203.0.113.9, not here. Change it.", "remediation": "."}
    other = {"code": "caa", "message": "The CA says no.", "remediation": "Ask it."}
    kept.names[HOST]["validation_errors"] = [told, other]
    out = (await words("check", HOST)).out
    assert out.count("203.0.113.9, not here") == 1 and "The last try failed: The CA says no." in out
    as_json = await words("check", HOST, "--json")
    assert as_json.code == 1 and as_json.json["findings"][0]["code"] == "wrong_address"


async def test_both_certificates_have_a_block_of_their_own(kept: KeptCertificates, words: Words) -> None:
    kept.put(HOST, has_custom_certificate=True)
    kept.issue(HOST)
    out = (await words("show", HOST)).out
    custom, managed = out.index("Custom Certificate"), out.index("Managed Certificate")
    assert custom < managed and "Verified" in out[custom:managed] and "Issued " in out[managed:]


async def test_show_looks_nothing_up_and_tells_of_the_order_and_the_last_failure(
    kept: KeptCertificates, words: Words
) -> None:
    error = {
        "code": "caa",
        "message": "CAA forbids it.",
        "remediation": "Change CAA.",
        "timestamp": "2026-11-03T00:00:00Z",
    }
    kept.put(HOST, validation_errors=[error], order={"step": "finalizing", "since": 1.0}, next_try_at=4e9,
             rate_limited_until="2026-12-01T00:00:00Z", acme_alpn_configured=True)  # fmt: skip
    out = (await words("show", HOST)).out
    assert "Issuing..." in out and "waits for the CA to sign" in out and "Next try" in out
    assert "The last try failed (" in out and "CAA forbids it." in out and "Change CAA." in out
    assert "2026-12-01" in out and "certs check" in out and "DNS shows" not in out


async def test_a_custom_certificate_that_is_not_proven_or_has_expired_is_said_so(
    kept: KeptCertificates, words: Words
) -> None:
    for status, word in (("pending_ownership", "Not verified"), ("expired", "Expired")):
        kept.put(HOST, has_custom_certificate=True, custom_status=status)
        ended = await words("check", HOST)
        assert ended.code == 1
        rows = [line.split(" = ")[1] for line in ended.out.splitlines() if line.startswith("Status")]
        assert rows == [word]


# --- list


async def test_list_has_flyctls_columns_and_words(kept: KeptCertificates, words: Words) -> None:
    assert "certs add" in (await words("list")).out and (await words("list", "--json")).json == []
    kept.put("a.example.com")
    kept.put("b.example.com", acme_http_configured=True)
    kept.put("c.example.com", configured=True, has_fly_certificate=True)
    kept.put("d.example.com", configured=True, has_custom_certificate=True)
    lines = (await words("list")).out.splitlines()
    assert lines[0].split() == ["hostname", "source", "status", "app"]
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[2:]]
    assert rows == [
        ["a.example.com", "-", "Not verified", "web"],
        ["b.example.com", "-", "Issuing...", "web"],
        ["c.example.com", "Managed", "Issued", "web"],
        ["d.example.com", "Custom", "Verified", "web"],
    ]
    assert [one["name"] for one in (await words("list", "--json", "--filter", "B.ex")).json] == ["b.example.com"]
    assert "that have 'zzz'" in (await words("list", "--filter", "zzz")).out
    assert "app nope not found" in (await words("list", "-a", "nope")).err


@pytest.mark.slow
async def test_list_shows_fifty_and_says_how_to_see_more(kept: KeptCertificates, words: Words) -> None:
    for number in range(1200):
        kept.put(f"n{number:04}.example.com")
    out = (await words("list")).out
    assert out.count(".example.com") == 50 and "The first 50 of 1,200: --all" in out
    assert (await words("list", "--all", "-a", "web")).out.count(".example.com") == 1200
    assert len((await words("list", "--json")).json) == 1200


# --- setup


async def test_setup_shows_every_way_as_records(kept: KeptCertificates, words: Words) -> None:
    kept.put(HOST)
    out = (await words("setup", HOST)).out
    by_address, by_name, rest = out.partition("Option 2")[0], out.partition("Option 2")[2], out.partition("ACME")[2]
    assert records(by_address) == [
        ("shop.example.com.", "A", "192.0.2.10"),
        ("shop.example.com.", "AAAA", "2001:db8::10"),
    ]
    assert ("shop.example.com.", "CNAME", "web.apps.example.net.") in records(by_name)
    assert records(rest) == [
        ("_acme-challenge.shop.example.com.", "CNAME", "shop.example.com.k7.acme.example.net."),
        ("_fly-ownership.shop.example.com.", "TXT", '"app-k7"'),
    ]
    facts = (await words("setup", HOST, "--json")).json
    assert facts["is_apex"] is False and facts["dns_requirements"]["a"] == ["192.0.2.10"]


async def test_setup_of_an_apex_offers_no_cname_at_it(kept: KeptCertificates, words: Words) -> None:
    kept.put("example.co.uk")
    out = (await words("setup", "example.co.uk")).out
    assert "not possible" in out and "ALIAS" in out
    assert ("example.co.uk.", "CNAME") not in [one[:2] for one in records(out)]


async def test_setup_of_a_wildcard_without_dns_01_warns(kept: KeptCertificates, words: Words) -> None:
    kept.put("*.example.com")
    kept.delegation = ""
    out = (await words("setup", "*.example.com")).out
    assert "[certs.dns]" in out and "_acme-challenge" not in out


# --- import


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "chain.pem").write_bytes(LEAF + CA)
    (tmp_path / "key.pem").write_bytes(KEY)
    return "chain.pem", "key.pem"


async def test_a_certificate_is_imported_from_files(
    kept: KeptCertificates, words: Words, files: tuple[str, str]
) -> None:
    done = await words("import", HOST, "--fullchain", files[0], "--private-key", files[1])
    assert done.code == 0 and "Certificate uploaded for shop.example.com (app web)" in done.out
    assert "It is active." in done.out and kept.calls == [("import", "web", HOST)]
    again = await words("import", HOST, "--fullchain", files[0], "--private-key", files[1], "--json")
    assert [one["source"] for one in again.json["certificates"]] == ["custom"] and "PRIVATE" not in again.out


async def test_an_import_that_waits_for_ownership_says_which_record(
    kept: KeptCertificates, words: Words, files: tuple[str, str]
) -> None:
    kept.put(HOST, owned=False)
    out = (await words("import", HOST, "--fullchain", files[0], "--private-key", files[1])).out
    assert records(out) == [("_fly-ownership.shop.example.com.", "TXT", '"app-k7"')] and "certs check" in out


async def test_an_import_with_warnings_is_done_and_they_are_told(
    kept: KeptCertificates, words: Words, tmp_path: Path, files: tuple[str, str]
) -> None:
    (tmp_path / "alone.pem").write_bytes(leaf(ends=3))
    done = await words("import", HOST, "--fullchain", "alone.pem", "--private-key", files[1])
    assert done.code == 0 and "warning: The certificate expires" in done.out
    assert "warning: The certificate of its issuer, Test Intermediate" in done.out


async def test_an_import_from_standard_input_takes_chain_and_key_in_one(
    kept: KeptCertificates, words: Words, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for data, chain, key in ((KEY, files[0], "-"), (LEAF + CA, "-", files[1]), (KEY + LEAF + CA, "-", "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert (await words("import", HOST, "--fullchain", chain, "--private-key", key)).code == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 1_000_000)))
    ended = await words("import", HOST, "--fullchain", "-", "--private-key", "-")
    assert ended.code == 2 and "131,072 bytes" in ended.err


async def test_all_faults_of_an_import_are_told_with_what_to_do(
    kept: KeptCertificates, words: Words, tmp_path: Path, files: tuple[str, str]
) -> None:
    ended = await words("import", "other.example", "--fullchain", files[0], "--private-key", files[0])
    assert ended.code == 1 and ended.out == ""
    assert "is not for other.example but for shop.example.com" in ended.err and "there is a certificate" in ended.err
    der = x509.load_pem_x509_certificate(LEAF).public_bytes(serialization.Encoding.DER)
    (tmp_path / "cert.der").write_bytes(der)
    ended = await words("import", HOST, "--fullchain", "cert.der", "--private-key", files[1])
    assert ended.code == 1 and "openssl x509 -inform DER" in ended.err
    (tmp_path / "wide.pem").write_bytes(LEAF.decode().encode("utf-16"))
    ended = await words("import", HOST, "--fullchain", "wide.pem", "--private-key", files[1])
    assert ended.code == 1 and "is not PEM" in ended.err
    assert kept.names == {}


@pytest.mark.parametrize(("content", "says"), [(None, "No such file"), (b"x" * 1_000_000, "more than 65,536 bytes")])
async def test_a_file_that_is_not_there_or_too_large_is_named(
    kept: KeptCertificates, words: Words, tmp_path: Path, files: tuple[str, str], content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "other.pem").write_bytes(content)
    for option, other in (("--fullchain", "--private-key"), ("--private-key", "--fullchain")):
        ended = await words("import", HOST, option, "other.pem", other, files[other == "--private-key"])
        assert ended.code == 2 and f"{option}: " in ended.err and "other.pem" in ended.err and says in ended.err
    ended = await words("import", HOST, "--fullchain", ".", "--private-key", files[1])
    assert ended.code == 2 and "Is a directory" in ended.err


# --- remove


async def test_remove_asks_and_takes_no_silence_for_a_yes(
    kept: KeptCertificates, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.put(HOST)
    ended = await words("remove", "Shop.example.com.", "-a", "web")
    assert ended.code == 2 and "--yes" in ended.err
    for answer, code in (("", 1), ("n\n", 1), ("perhaps\n", 1), ("Y\n", 0)):
        monkeypatch.setattr(sys, "stdin", _Terminal(answer))
        ended = await words("remove", "Shop.example.com.", "-a", "web")
        assert ended.code == code and "Remove shop.example.com and all its certificates from app web?" in ended.err
        assert (HOST in kept.names) == (code == 1)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_remove_of_one_kind_says_what_is_left(kept: KeptCertificates, words: Words) -> None:
    kept.put(HOST, has_custom_certificate=True)
    kept.issue(HOST)
    done = await words("remove", HOST, "--custom", "-y")
    assert done.code == 0 and "it has still: Managed Certificate" in done.out
    done = await words("remove", HOST, "--acme", "-y")
    assert "it has none now" in done.out
    assert (await words("remove", HOST, "--acme", "--custom", "-y")).code == 2
    assert (await words("remove", HOST, "-y", "--json")).json == {
        "hostname": HOST, "app": "web", "removed": "all", "left": None
    }  # fmt: skip
    assert (await words("delete", HOST, "-y")).code == 1


# --- the node


async def test_forecast_names_what_will_fail_and_why(kept: KeptCertificates, words: Words) -> None:
    out = (await words("forecast")).out
    assert out.index("late.example.com") < out.index("good.example.com") and "WILL FAIL: nobody renews it" in out
    assert "1 of 2 will fail" in out and "certs check late.example.com" in out
    assert (await words("forecast", "--json")).json[0]["name"] == "late.example.com"


async def test_the_account_is_shown_and_its_key_rolled(kept: KeptCertificates, words: Words) -> None:
    out = (await words("account")).out
    assert "https://acme.example/dir" in out and "mailto:ops@example.net" in out and "key-1" in out
    assert "new key" in (await words("account", "--roll-key")).out and kept.account_keys == 2
    facts: Any = (await words("account", "--json")).json
    assert facts["key_thumbprint"] == "key-2"


async def test_what_cannot_be_done_now_is_said(kept: KeptCertificates, words: Words) -> None:
    kept.offline = "the store is not open yet"
    ended = await words("add", HOST)
    assert ended.code == 1 and "Cannot add shop.example.com: the store is not open yet." in ended.err


async def test_a_shell_completes_the_names_there_are(kept: KeptCertificates, tmp_path: Path) -> None:
    kept.put(HOST)
    kept.put("other.example.net")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_WAKEFRONT_COMPLETE": "complete_bash"}
    environment |= {"COMP_WORDS": "wakefront certs check sh", "COMP_CWORD": "3"}
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "proxy"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert HOST in done.stdout and "other.example.net" not in done.stdout


def test_these_commands_load_none_of_what_the_node_runs() -> None:
    code = (
        "import sys, proxy.cli.main, proxy.cli.certs\n"
        "print([name for name in ('aiohttp', 'cryptography', 'publicsuffixlist', 'certs') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
