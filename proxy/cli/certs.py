"""`wakefront certs`: domains and their certificates, and what a customer is to put into DNS.

Each takes the Api of the node, and the host name as the user wrote it; the app is found from that name where it is
not given. Records are printed as lines of a zone file, ready to paste. What is wrong with a domain the node says
(`check`); here it is only shown.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from proxy.cli.failure import USAGE, CliError
from proxy.cli.node import Api, ApiError, app_path, did_you_mean, list_apps
from proxy.cli.output import age, print_json, say, table, waiting

FIRST = 50  # names that `list` shows where nothing else is said
_PAGE = 500
_MAX_FILE_BYTES = 64 * 1024  # of a chain, as the node takes it
_CHECK_TIMEOUT_S = 60.0
_TTL_S = 300  # of the records we propose: short enough to mend a mistake
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.1, 1.0  # between two looks at a name that is waited for
_TXT_BYTES = 255  # of one string in a TXT record (RFC 1035 §3.3.14)

Detail = dict[str, Any]  # Any: JSON, as the API has it


class Domain(NamedTuple):
    app: str
    name: str

    @property
    def path(self) -> str:
        return f"{app_path(self.app)}/certificates/{quote(self.name, safe='')}"


# --- commands


def add(api: Api, name: str, app: str | None, challenge: str | None, wait_s: float, as_json: bool) -> None:
    app = app or _app_of(api, name) or _only_app(api)
    detail = _ask_to(
        f"add {name}", api, f"{app_path(app)}/certificates/acme", {"hostname": name, "challenge": challenge}
    )
    domain = Domain(app, str(detail["hostname"]))
    if not as_json:
        say(f"Certificate created for {domain.name} (app {app})")
    if wait_s > 0:
        detail = _wait(api, domain, detail, wait_s, as_json)
    if as_json:
        print_json(detail)
    elif not detail["configured"]:
        _say_next_steps(domain, detail)
    elif wait_s <= 0:
        say("It has its certificate already.")


def check(api: Api, name: str, app: str | None, as_json: bool) -> bool:
    """Have the node look at DNS now, and tell what it found. Whether the name has a certificate that is in force."""
    domain = _find(api, name, app)
    with waiting(f"looking at {domain.name}", quiet=as_json):
        detail = _ask_to(f"check {name}", api, f"{domain.path}/check", timeout_s=_CHECK_TIMEOUT_S)
    if as_json:
        print_json(detail)
        return bool(detail["configured"])
    domain = Domain(domain.app, detail["hostname"])
    _say_rows(domain, detail)
    if (records := detail.get("dns_records")) is not None:
        _say_dns(records)
    findings = detail.get("findings") or []
    for finding in findings:
        _say_finding(finding)
    _say_errors(detail, [str(finding["message"]) for finding in findings])
    if detail["configured"]:
        say("\nCertificate is verified and active")
    elif not any(finding.get("records") for finding in findings):
        say(f"\nWhat to put into DNS: {_command('setup', domain.name)}")
    return bool(detail["configured"])


def show(api: Api, name: str, app: str | None, as_json: bool) -> None:
    """What the node knows of a name already; nothing is looked up."""
    domain, detail = _get(api, _find(api, name, app))
    if as_json:
        print_json(detail)
        return
    _say_rows(domain, detail)
    _say_errors(detail)
    if not detail["configured"]:
        say(f"\nWhat is in the way: {_command('check', domain.name)}")


def list_certificates(api: Api, app: str | None, wanted: str, show_all: bool, as_json: bool) -> None:
    """The first fifty names, or all; as JSON all."""
    path = f"{app_path(app)}/certificates" if app is not None else "/v1/certificates"
    everything = show_all or as_json
    found: list[Detail] = []
    total = 0
    for page in _pages(api, path, {"filter": wanted, "limit": _PAGE if everything else FIRST}):
        found += page["certificates"]
        total = page["total_count"]
        if not everything:
            break
    if as_json:
        print_json([{"name": one["hostname"], **one} for one in found])
        return
    if not found:
        which = f" that have {wanted!r} in them" if wanted else ""
        say(f"There are no certificates for names{which}: add one with `wakefront certs add HOSTNAME`.")
        return
    rows = [(one["hostname"], _source(one), _status(one), one["app"]) for one in found]
    table(("hostname", "source", "status", "app"), rows)
    if total > len(found):
        say(f"The first {len(found)} of {total:,}: --all shows the rest, --filter TEXT those with a text in them.")


def setup(api: Api, name: str, app: str | None, as_json: bool) -> None:
    domain, detail = _get(api, _find(api, name, app))
    if as_json:
        print_json(
            {
                "hostname": domain.name, "app": domain.app, "is_apex": _is_apex(domain.name),
                "dns_requirements": detail["dns_requirements"], "status": detail["status"],
            }
        )  # fmt: skip
        return
    _say_setup(domain, detail)


def import_certificate(api: Api, name: str, app: str | None, fullchain: str, private_key: str, as_json: bool) -> None:
    chain = _read(fullchain, "--fullchain")
    key = chain if fullchain == private_key == "-" else _read(private_key, "--private-key")
    app = app or _app_of(api, name) or _only_app(api)
    body = {"hostname": name, "fullchain": _as_text(chain), "private_key": _as_text(key)}
    detail = _ask_to(f"take the certificate for {name}", api, f"{app_path(app)}/certificates/custom", body)
    if as_json:
        print_json(detail)
        return
    domain = Domain(app, str(detail["hostname"]))
    say(f"Certificate uploaded for {domain.name} (app {app})")
    for warning in detail.get("warnings") or []:
        say(f"warning: {_printable(warning['message'])}\n  {_printable(warning['remedy'])}")
    if detail["status"] == "active":
        say("It is active.")
        return
    say("It is shown to clients once the domain is proven to be yours. Add to its DNS:\n")
    say(_line(*_ownership(detail)))
    say(f"\nthen: {_command('check', domain.name)}")


def renew(api: Api, name: str, app: str | None, wait_s: float, as_json: bool) -> None:
    domain, before = _get(api, _find(api, name, app))
    detail = _ask_to(f"renew {name}", api, f"{domain.path}/renew")
    deadline = time.monotonic() + wait_s
    with waiting(f"waiting for a new certificate of {domain.name}", quiet=as_json):
        while wait_s > 0 and _serials(detail) == _serials(before):
            if time.monotonic() >= deadline:
                raise CliError(
                    f"{domain.name} has its old certificate after {wait_s:g} s ({_progress(detail)}); the node goes on "
                    f"trying. See `{_command('show', domain.name)}`."
                )
            time.sleep(_FIRST_LOOK_S)
            domain, detail = _get(api, domain)
    if as_json:
        print_json(detail)
    else:
        say(f"{domain.name}: {'renewed' if wait_s > 0 else 'a new certificate is ordered'}")


def _serials(detail: Detail) -> list[Any]:
    return [one.get("serial") for one in detail["certificates"] if one.get("source") == "fly"]


def remove(api: Api, name: str, app: str | None, kind: str | None, yes: bool, as_json: bool) -> None:
    """`kind`: "custom", "acme", or None for the name and all it has."""
    domain, _ = _get(api, _find(api, name, app))
    what = {None: "and all its certificates", "custom": "'s imported certificate", "acme": "'s managed certificate"}[
        kind
    ]
    if not yes:
        _confirm(f"Remove {domain.name}{' ' if kind is None else ''}{what} from app {domain.app}?", as_json)
    path = domain.path + (f"/{kind}" if kind else "")
    try:
        left = api.delete(path, timeout_s=30.0)
    except ApiError as error:
        raise _refused(error, f"remove {name}") from None
    if as_json:
        print_json({"hostname": domain.name, "app": domain.app, "removed": kind or "all", "left": left})
        return
    if kind is None:
        say(f"Certificate for {domain.name} removed from app {domain.app}")
        return
    rest = ", ".join(_block_title(one) for one in left["certificates"]) if left else ""
    say(f"{domain.name}{what} is removed; it has {f'still: {rest}' if rest else 'none now'}")


def forecast(api: Api, as_json: bool) -> None:
    """What will be renewed when, soonest first, and what will not."""
    found = api.get("/v1/certificates/forecast", timeout_s=30.0)["certificates"]
    if as_json:
        print_json([{"name": one["hostname"], **one} for one in found])
        return
    if not found:
        say("There is nothing to renew: no name has a certificate yet.")
        return
    rows = [
        (
            one["hostname"], one["app"], _SOURCES.get(one["source"], one["source"]), _in(one["expires_at"]),
            _in(one.get("next_at") or one["renew_at"]),
            _printable(f"WILL FAIL: {one['reason']}" if one["will_fail"] else one["next_action"]),
        )
        for one in found
    ]  # fmt: skip
    table(("hostname", "app", "source", "expires", "next step", "what"), rows)
    if failing := [one["hostname"] for one in found if one["will_fail"]]:
        say(f"{len(failing)} of {len(found)} will fail as it is: `{_command('check', failing[0])}`.")


def account(api: Api, roll_key: bool, as_json: bool) -> None:
    try:
        facts = api.post("/v1/certificates/account/rollover") if roll_key else api.get("/v1/certificates/account")
    except ApiError as error:
        raise _refused(error, "roll the account's key over" if roll_key else "show the account") from None
    if as_json:
        print_json(facts)
        return
    if roll_key:
        say("The account has a new key; the CA accepts the old one no more.")
    _say_pairs([(key.removesuffix("_s").replace("_", " "), _account_value(key, value)) for key, value in facts.items()])


# --- finding


def _find(api: Api, name: str, app: str | None) -> Domain:
    if app is not None:
        return Domain(app, name)
    found = _app_of(api, name)
    if found is None:
        known = [one["hostname"] for one in api.get("/v1/certificates", {"limit": _PAGE})["certificates"]]
        hint = did_you_mean(name, known) if known else "."
        raise CliError(f"No app here has the name {name}{hint} Add it with `{_command('add', name)}`.")
    return Domain(found, name)


def _app_of(api: Api, name: str) -> str | None:
    """The app that has this name already."""
    try:
        found = api.get("/v1/certificates", {"hostname": name})["certificates"]
    except ApiError as error:
        raise _refused(error, f"find {name}") from None
    return str(found[0]["app"]) if found else None


def _only_app(api: Api) -> str:
    names = [str(one["name"]) for one in list_apps(api)]
    if len(names) == 1:
        return names[0]
    raise CliError(
        f"Which app is it for? Name it with --app: {', '.join(sorted(names)[:8])}{', …' if len(names) > 8 else ''}."
        if names
        else "This node has no apps yet: add an [[apps]] to its config.toml, then `wakefront reload`.",
        USAGE,
    )


def _get(api: Api, domain: Domain) -> tuple[Domain, Detail]:
    """With the name in the node's form, whatever the user wrote."""
    try:
        detail: Detail = api.get(domain.path)
    except ApiError as error:
        raise _refused(error, f"find {domain.name}") from None
    return Domain(domain.app, str(detail["hostname"])), detail


def _ask_to(do: str, api: Api, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60.0) -> Detail:
    try:
        detail: Detail = api.post(path, body, timeout_s=timeout_s)
    except ApiError as error:
        raise _refused(error, do) from None
    return detail


def _refused(error: ApiError, do: str) -> CliError:
    """The node's refusal as a sentence, with all faults where it lists them."""
    body = error.body
    if error.status in (401, 403) or not isinstance(body, dict) or not body.get("error"):
        return error
    faults = body.get("faults") or []
    if faults:
        shown = "\n".join(f"  {_printable(one['message'])}\n    {_printable(one['remedy'])}" for one in faults)
        return CliError(f"Cannot {do}:\n{shown}")
    text = _printable(str(body["error"])).removeprefix("hostname: ")
    if error.status == 404:
        return CliError(f"Cannot {do}: {text}. `wakefront certs list` shows what there is.")
    if error.status == 413:
        return CliError(f"Cannot {do}: the files are too large ({text}).", USAGE)
    return CliError(f"Cannot {do}: {text}.", USAGE if error.status == 422 else 1)


def _pages(api: Api, path: str, query: dict[str, Any]) -> Iterator[Detail]:
    cursor = ""
    while True:
        try:
            page = api.get(path, {**query, **({"cursor": cursor} if cursor else {})}, timeout_s=30.0)
        except ApiError as error:
            raise _refused(error, "list certificates") from None
        yield page
        if not (cursor := page.get("next_cursor") or ""):
            return


# --- waiting


def _wait(api: Api, domain: Domain, detail: Detail, wait_s: float, as_json: bool) -> Detail:
    """Until the certificate is there, saying each step. Raises CliError with the reason where it does not come."""
    began = time.monotonic()
    pause, told = _FIRST_LOOK_S, ""
    with waiting(f"waiting for the certificate of {domain.name}", quiet=as_json):
        while not detail["configured"]:
            if not as_json and (step := _progress(detail)) != told:
                say(f"  {time.monotonic() - began:5.1f} s  {step}")
                told = step
            left = wait_s - (time.monotonic() - began)
            if left <= 0:
                raise CliError(
                    f"{domain.name} has no certificate after {wait_s:g} s ({_progress(detail)}); the node goes on "
                    f"trying. See `{_command('check', domain.name)}`."
                )
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LONGEST_LOOK_S)
            domain, detail = _get(api, domain)
    if not as_json:
        say(f"  {time.monotonic() - began:5.1f} s  issued by {_issuers(detail)}")
    return detail


def _progress(detail: Detail) -> str:
    """The step that its order is at, else the last failure, else that nothing was begun."""
    if order := detail.get("order"):
        return f"order {_STEPS.get(order['step'], order['step'])}"
    if errors := detail.get("validation_errors"):
        return _printable(errors[-1]["message"]).rstrip(".")
    return "waiting its turn"


_STEPS = {
    "begun": "begun", "ordering": "sent to the CA", "ordered": "taken by the CA",
    "proving": "waits for the CA to look at the domain", "finalizing": "waits for the CA to sign", "issued": "issued",
}  # fmt: skip


# --- showing a name

_SOURCES = {"custom": "Custom", "fly": "Managed", "acme": "Managed", "internal": "Internal"}


def _source(summary: Detail) -> str:
    if summary.get("has_custom_certificate"):
        return "Custom"
    return "Managed" if summary.get("has_fly_certificate") else "-"


def _status(one: Detail) -> str:
    """In flyctl's words, of a summary or a detail (spec: `certs list`)."""
    if one.get("has_custom_certificate") or any(each["source"] == "custom" for each in one.get("certificates") or ()):
        return "Verified" if one.get("configured") else "Not verified"
    if one.get("configured"):
        return "Issued"
    ways = [one.get(f"acme_{way}_configured") for way in ("dns", "alpn", "http")]
    ways += [(one.get("validation") or {}).get(f"{way}_configured") for way in ("dns", "alpn", "http")]
    return "Issuing..." if any(ways) else "Not verified"


def _certificate_status(one: Detail) -> str:
    if one["status"] in ("pending_ownership", "expired"):
        return "Expired" if one["status"] == "expired" else "Not verified"
    if one["source"] == "custom":
        return "Verified" if one["status"] == "active" else "Not verified"
    return "Issued" if one["status"] == "active" else "Issuing..."


def _block_title(certificate: Detail) -> str:
    return f"{_SOURCES.get(certificate['source'], 'Managed')} Certificate"


def _say_rows(domain: Domain, detail: Detail) -> None:
    certificates = detail["certificates"]
    in_blocks = any(one["source"] == "custom" for one in certificates)
    head = [
        ("Hostname", detail["hostname"]),
        ("App", domain.app),
        ("Added to App", _when(detail.get("created_at"))),
        *_order_rows(detail),
    ]
    if not in_blocks:
        _say_pairs([("Status", _status(detail)), *head, *(_certificate_rows(certificates[0]) if certificates else [])])
        return
    _say_pairs(head)
    for one in sorted(certificates, key=lambda each: each["source"] != "custom"):
        say(f"\n{_block_title(one)}")
        _say_pairs([("Status", _certificate_status(one)), *_certificate_rows(one)])


def _order_rows(detail: Detail) -> list[tuple[str, str]]:
    """What is under way, and when it goes on; nothing where nothing is."""
    rows = []
    if order := detail.get("order"):
        since = f", since {_when(order['since'])}" if order.get("since") else ""
        rows.append(("Order", f"{_STEPS.get(order['step'], order['step'])}{since}"))
    if detail.get("challenge"):
        rows.append(("Challenge", detail["challenge"]))
    for title, key in (("Rate limited until", "rate_limited_until"), ("Next try", "next_try_at")):
        if detail.get(key):
            rows.append((title, _when(detail[key])))
    return rows


def _certificate_rows(one: Detail) -> list[tuple[str, str]]:
    issued = one.get("issued") or []
    authorities = sorted({each["certificate_authority"] for each in issued if each.get("certificate_authority")})
    return [
        ("Certificate Authority", ", ".join(authorities) or "–"),
        ("Issuer", one.get("issuer") or "–"),
        ("Issued", ", ".join(each["type"] for each in issued) or "–"),
        ("Expires", _when(one.get("expires_at"))),
    ]


def _issuers(detail: Detail) -> str:
    return ", ".join(sorted({one.get("issuer") or "an unnamed CA" for one in detail["certificates"]})) or "the node"


def _say_dns(records: Detail) -> None:
    """What DNS shows now, as far as it shows anything."""
    shown = [
        # of a SOA record, the server's name alone
        (title, ", ".join(value) if isinstance(value, list) else str(value).split(" ")[0].rstrip("."))
        for key, title in _DNS_TITLES.items()
        if (value := records.get(key))
    ]
    say("\nDNS shows now" if shown else "\nDNS shows nothing for this name")
    _say_pairs([(f"  {title}", value) for title, value in shown])


_DNS_TITLES = {
    "a": "A", "aaaa": "AAAA", "cname": "CNAME", "resolved_addresses": "leads to", "soa": "zone served by",
    "acme_challenge_cname": "_acme-challenge", "ownership_txt": "ownership TXT",
}  # fmt: skip


def _say_finding(finding: Detail) -> None:
    """Cause, remedy, and the records as lines to paste."""
    word = {"error": "Problem", "warning": "Warning"}.get(str(finding.get("severity")), "Note")
    say(f"\n{word}: {_printable(finding['message'])}")
    if finding.get("remedy"):
        say(f"  {_printable(finding['remedy'])}")
    for title, key in (("Set", "records"), ("Remove", "remove")):
        if records := finding.get(key):
            say(f"  {title}:")
            for one in records:
                say(f"    {_line(one['type'], one['name'], one['value'])}")


def _say_errors(detail: Detail, told: Sequence[str] = ()) -> None:
    """What the last try failed with, but for what has been `told` already."""
    for error in detail.get("validation_errors") or []:
        if any(error["message"].startswith(message) for message in told):
            continue
        at = f" ({_in(error['timestamp'])})" if error.get("timestamp") else ""
        say(f"\nThe last try failed{at}: {_printable(error['message'])}")
        if error.get("remediation"):
            say(f"  {_printable(error['remediation'])}")


# --- DNS, as a zone file has it


def _line(kind: str, name: str, value: str) -> str:
    """One record in master-file form (RFC 1035 §5.1), names absolute."""
    if kind == "TXT":
        value = _quoted(value)
    elif kind in ("CNAME", "NS", "ALIAS") and value:
        value = value.rstrip(".") + "."
    return _printable(f"{name.rstrip('.')}.  {_TTL_S}  IN  {kind}  {value}")


def _quoted(text: str) -> str:
    if text.startswith('"'):
        return text  # it is in that form already
    data = text.encode()
    parts = [data[at : at + _TXT_BYTES].decode("utf-8", "replace") for at in range(0, len(data), _TXT_BYTES)] or [""]
    return " ".join('"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"' for part in parts)


def _ownership(detail: Detail) -> tuple[str, str, str]:
    ownership = detail["dns_requirements"]["ownership"]
    return "TXT", ownership["name"], ownership["app_value"]


def _address_lines(name: str, needs: Detail) -> list[str]:
    return [
        *(_line("A", name, address) for address in needs["a"]),
        *(_line("AAAA", name, address) for address in needs["aaaa"]),
    ]


def _is_apex(name: str) -> bool:
    """Whether a registrar sold exactly this name: its zone begins here, so that no CNAME can stand at it."""
    from publicsuffixlist import PublicSuffixList

    return bool(PublicSuffixList().privatesuffix(name) == name)


_NO_ADDRESSES = (
    "warning: the node does not know the addresses that clients reach it at: set `addresses` in [certs] of its "
    "config.toml, then `wakefront reload`."
)


def _say_next_steps(domain: Domain, detail: Detail) -> None:
    """After `add`: the shortest way, and where there is more."""
    needs = detail["dns_requirements"]
    name = domain.name
    if name.startswith("*."):
        challenge = needs["acme_challenge"]
        say("\nTo prove the domain, and to send its traffic here, add to its DNS:\n")
        if challenge.get("target"):
            say(f"  {_line('CNAME', challenge['name'], challenge['target'])}")
        say(f"  {_line(*_ownership(detail))}")
        say(f"  {_line('CNAME', name, needs['cname'])}")
    elif lines := _address_lines(name, needs):
        say("\nTo send its traffic here, add to its DNS:\n")
        for line in lines:
            say(f"  {line}")
    else:
        say("\n" + _NO_ADDRESSES)
    if not name.startswith("*.") and _is_apex(name):
        say(f"\nVisitors may also type www.{name}: wakefront certs add www.{name} --app {domain.app}")
    say(f"\nThe certificate is fetched by itself once DNS leads here. See how it stands: {_command('check', name)}")
    say(f"Other ways to set up DNS: {_command('setup', name)}")


def _say_setup(domain: Domain, detail: Detail) -> None:
    needs, name = detail["dns_requirements"], domain.name
    challenge = needs.get("acme_challenge") or {}
    say(f"DNS for {name} (app {domain.app})")
    say("\nOption 1: by address")
    for line in _address_lines(name, needs):
        say(f"  {line}")
    if not needs["a"] and not needs["aaaa"]:
        say(f"  {_NO_ADDRESSES}")
    if _is_apex(name):
        say(f"\nOption 2: by name is not possible with a CNAME: {name} is the top of its zone (RFC 1034 §3.6.2)")
        say(f"  Where your DNS provider has ALIAS, ANAME or CNAME flattening, use that with {needs['cname']}")
    else:
        say("\nOption 2: by name; it follows when the addresses change")
        say(f"  {_line('CNAME', name, needs['cname'])}")
    if challenge.get("target"):
        when = "needed for a wildcard" if name.startswith("*.") else "to have the certificate before traffic moves here"
        say(f"\nACME challenge: {when}")
        say(f"  {_line('CNAME', challenge['name'], challenge['target'])}")
    elif name.startswith("*."):
        say("\nA wildcard is proven by DNS-01: [certs.dns] of the node's config.toml says how TXT records are set")
    say("\nOwnership: needed for a wildcard, behind a CDN, and for an imported certificate before traffic moves here")
    say(f"  {_line(*_ownership(detail))}")
    say(f"\nThen: {_command('check', name)}")


# --- small things


def _read(where: str, option: str) -> bytes:
    """A file, or with "-" standard input; at most as much as the node takes."""
    try:
        if where == "-":
            data = sys.stdin.buffer.read(_MAX_FILE_BYTES * 2 + 1)
            limit = _MAX_FILE_BYTES * 2  # it may be chain and key
        else:
            with Path(where).open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
            limit = _MAX_FILE_BYTES
    except (OSError, ValueError) as error:
        raise CliError(f"{option}: cannot read {where}: {getattr(error, 'strerror', None) or error}.", USAGE) from error
    if len(data) > limit:
        raise CliError(
            f"{option}: {where} has more than {limit:,} bytes: give the certificate and its intermediates only.", USAGE
        )
    return data


def _as_text(data: bytes) -> str:
    """Any bytes, so that the node can say what they are: those that are no text as lone surrogates (PEP 383)."""
    return data.decode("utf-8", "surrogateescape")


def _confirm(question: str, as_json: bool) -> None:
    if as_json or not sys.stdin.isatty():
        raise CliError("This removes something, and nobody is there to ask: say --yes.", USAGE)
    print(f"{question} [y/N] ", end="", flush=True, file=sys.stderr)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CliError("Nothing was removed.")


def _command(verb: str, name: str) -> str:
    """To be pasted into a shell, which must not expand a wildcard."""
    return f"wakefront certs {verb} {shlex.quote(name)}"


def _say_pairs(pairs: list[tuple[str, str]]) -> None:
    width = max((len(title) for title, _ in pairs), default=0)
    for title, value in pairs:
        say(f"{title:<{width}} = {_printable(value)}")


def _account_value(key: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(one) for one in value) or "–"
    if key.endswith("_s") and value is not None:
        return f"{value} s"
    return _when(value) if key.endswith("_at") and value is not None else "–" if value is None else str(value)


def _printable(text: str) -> str:
    """What came from DNS, a CA or a certificate may not write into this terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _unix(value: object) -> float | None:
    """Of a time as the API has it: ISO 8601, or unix seconds."""
    if isinstance(value, int | float):
        return float(value)
    try:
        at = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _when(value: object) -> str:
    unix = _unix(value)
    if unix is None:
        return "–"
    return f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d %H:%M} UTC ({_in(value)})"


def _in(value: object) -> str:
    unix = _unix(value)
    if unix is None:
        return "–"
    left = unix - time.time()
    return f"in {age(left)}" if left >= 0 else f"{age(-left)} ago"
