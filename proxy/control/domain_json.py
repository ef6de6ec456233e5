"""What the admin API tells of a domain: Fly's certificate objects (machines.md §6.6), and a forecast of our own."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from typing import Any

from certs.diagnosis import Diagnosis
from certs.domain import Domain, Held, Source
from certs.errors import Failure
from certs.look import Look

Json = dict[str, Any]  # Any: JSON


def status_of(domain: Domain, now: float) -> str:
    """active | pending_ownership | pending_validation."""
    if domain.served(now) is not None:
        return "active"
    return "pending_ownership" if domain.needs_proof else "pending_validation"


def _is_ready(domain: Domain, is_under_way: bool) -> bool:
    """Whether DNS is as the CA wants it, as far as is known: an order is begun only once it leads here."""
    failure = domain.trouble.failure if domain.trouble is not None else None
    return Source.ACME in domain.held or is_under_way or failure in _BEYOND_DNS


def summary_json(domain: Domain, now: float, is_under_way: bool = False) -> Json:
    """`is_under_way`: whether an order for it is."""
    ours = Source.ACME in domain.held
    ready = _is_ready(domain, is_under_way)
    by_dns = domain.challenge == "dns-01" or domain.name.startswith("*.")
    able = {
        way: ready and not by_dns and domain.challenge in ("", way) and way not in domain.avoid
        for way in ("tls-alpn-01", "http-01")
    }
    return {
        "hostname": domain.name,
        "app": domain.app,
        "status": status_of(domain, now),
        "dns_provider": None,
        "acme_dns_configured": ready and by_dns,
        "acme_alpn_configured": able["tls-alpn-01"],
        "acme_http_configured": able["http-01"],
        "ownership_txt_configured": bool(domain.proven_at),
        "configured": domain.served(now) is not None,
        "acme_requested": domain.is_acme_wanted,
        "has_custom_certificate": Source.CUSTOM in domain.held,
        "has_fly_certificate": ours or Source.RSA in domain.held,
        "origin": domain.origin,
        "created_at": iso(domain.added_at),
        "updated_at": iso(domain.updated_at),
    }


def detail_json(domain: Domain, now: float, requirements: Json, is_under_way: bool = False) -> Json:
    summary = summary_json(domain, now, is_under_way)
    trouble = domain.trouble
    errors = []
    if trouble is not None:
        errors.append(
            {
                "code": trouble.problem or trouble.failure.value,
                "message": trouble.detail,
                "remediation": _REMEDIES[trouble.failure],
                "timestamp": iso(trouble.at),
            }
        )
    limited = trouble is not None and trouble.failure is Failure.RATE_LIMITED
    return {
        "hostname": domain.name,
        "app": domain.app,
        "configured": summary["configured"],
        "acme_requested": domain.is_acme_wanted,
        "status": summary["status"],
        "dns_provider": None,
        "rate_limited_until": iso(trouble.next_try_at) if trouble is not None and limited else None,
        "certificates": _certificates(domain, now),
        "validation": {
            "dns_configured": summary["acme_dns_configured"],
            "alpn_configured": summary["acme_alpn_configured"],
            "http_configured": summary["acme_http_configured"],
            "ownership_txt_configured": summary["ownership_txt_configured"],
        },
        "dns_requirements": requirements,
        "validation_errors": errors,
        "origin": domain.origin,
        "challenge": domain.challenge or None,
        "next_try_at": iso(trouble.next_try_at) if trouble is not None else None,
        "created_at": summary["created_at"],
        "updated_at": summary["updated_at"],
    }


def internal_json(fault: str | None) -> Json:
    """What is other of a name whose certificate is the node's own CA's."""
    return {
        "configured": fault is None,
        "status": "active" if fault is None else "pending_validation",
        "certificates": [
            {"source": "internal", "status": "active", "created_at": None, "expires_at": None, "issuer": "internal CA",
             "issued": []}
        ] if fault is None else [],
        "validation_errors": [] if fault is None else [
            {"code": "internal", "message": fault, "remediation": "See the log of control.", "timestamp": None}
        ],
    }  # fmt: skip


def _certificates(domain: Domain, now: float) -> list[Json]:
    found = []
    if (custom := domain.held.get(Source.CUSTOM)) is not None:
        status = "expired" if custom.expires_at <= now else "active" if domain.proven_at else "pending_ownership"
        found.append(_one("custom", status, [custom]))
    ours = [held for source in (Source.ACME, Source.RSA) if (held := domain.held.get(source)) is not None]
    if ours:
        found.append(_one("fly", "active" if any(one.expires_at > now for one in ours) else "expired", ours))
    return found


def _one(source: str, status: str, held: list[Held]) -> Json:
    return {
        "source": source,
        "status": status,
        "created_at": iso(held[0].obtained_at),
        "expires_at": iso(min(one.expires_at for one in held)),
        "issuer": held[0].issuer,
        "issued": [
            {"type": one.key, "expires_at": iso(one.expires_at), "certificate_authority": one.issuer} for one in held
        ],
        "renew_at": iso(min((one.renew_at for one in held if one.renew_at), default=0.0)),
        "serial": held[0].serial,
    }


def forecast_json(domain: Domain, now: float, ordered: Collection[Source]) -> Json:
    """What happens to it next, and whether its certificate will end before there is another."""
    trouble, source = domain.trouble, domain.served(now)
    held = domain.held[source] if source is not None else None
    ours = [one for kind, one in domain.held.items() if kind is not Source.CUSTOM]
    renew_at = min((one.renew_at for one in ours), default=0.0)
    next_at = domain.next_at(now, ordered)
    will_fail, reason, action = False, "", "renew"
    if trouble is not None:
        action = "try again"
        will_fail = trouble.failure in _LASTING or held is None or trouble.next_try_at >= held.expires_at
        reason = trouble.detail
    elif not ours and domain.is_acme_wanted:
        action = "issue"
    elif source is Source.CUSTOM and held is not None:
        action = "none: imported"
        if not domain.is_acme_wanted or not ours:
            will_fail, reason = True, "imported certificates are not renewed here: import the next one before it ends"
    elif not domain.is_acme_wanted:
        action, will_fail, reason = "none", held is not None, "no certificate is asked for any more"
    elif ours and ours[0].ask_ari_at:
        action = "renew, as the CA suggests"
    return {
        "hostname": domain.name,
        "app": domain.app,
        "source": {Source.CUSTOM: "custom", None: None}.get(source, "fly"),
        "expires_at": iso(held.expires_at) if held is not None else None,
        "renew_at": iso(renew_at),
        "next_at": iso(next_at) if next_at != float("inf") else None,
        "next_action": action,
        "will_fail": will_fail,
        "reason": reason,
        "failures_in_a_row": trouble.in_a_row if trouble is not None else 0,
    }


def check_json(look: Look, diagnosis: Diagnosis) -> Json:
    return {
        "dns_provider": diagnosis.is_proxied_by,
        "dns_records": {
            "a": list(look.a.values),
            "aaaa": list(look.aaaa.values),
            "cname": [look.cname] if look.cname else [],
            "resolved_addresses": list(look.addresses),
            "soa": look.soa or None,
            "acme_challenge_cname": look.challenge.chain[-1] if look.challenge.chain else None,
            "ownership_txt": list(look.ownership.values),
        },
        "findings": [
            {
                "code": one.code,
                "severity": one.severity,
                "message": one.message,
                "remedy": one.remedy,
                "records": [
                    {"type": record.type, "name": record.name, "value": record.value} for record in one.records
                ],
                "remove": [{"type": record.type, "name": record.name, "value": record.value} for record in one.remove],
            }
            for one in diagnosis.findings
        ],
        "proven_by": diagnosis.ownership_proven_by,
    }


# What an order may fail with once DNS was found to lead here.
_BEYOND_DNS = frozenset(
    {Failure.NETWORK, Failure.SERVER, Failure.RATE_LIMITED, Failure.STUCK, Failure.WRONG_CERTIFICATE}
)
_LASTING = frozenset({Failure.REFUSED, Failure.NOT_POINTED, Failure.ACCOUNT})
_REMEDIES = {
    Failure.NETWORK: "Check that this node reaches the CA (acme_directory of [certs]). It is tried again by itself.",
    Failure.SERVER: "Nothing to do: the CA has trouble. It is tried again by itself.",
    Failure.RATE_LIMITED: "Nothing to do but wait: it is tried again when the limit allows.",
    Failure.VALIDATION: "`wakefront certs check` says what is wrong in DNS or on the way here.",
    Failure.REFUSED: "The CA does not issue for this name: read what it says. `wakefront certs check` asks again.",
    Failure.ACCOUNT: "See acme_email, acme_eab_kid and acme_directory of [certs].",
    Failure.STUCK: "Nothing to do: the order is gone on with by itself.",
    Failure.WRONG_CERTIFICATE: "Nothing to do here: tell the CA if it goes on.",
    Failure.DNS_HOOK: "See [certs.dns] and what the hook says.",
    Failure.NOT_POINTED: "Add the record. It is noticed within seconds at first, later within an hour, or by `check`.",
    Failure.STORAGE: "See free space and rights of data_dir.",
}


def iso(at: float) -> str | None:
    if not at:
        return None
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
