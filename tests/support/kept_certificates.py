"""`Certificates` of certificates_api.py in memory: names are issued for when a test says so."""

from __future__ import annotations

from certs.custom import CustomRefusedError, judge_custom
from proxy.control.answers import Json
from proxy.control.certificates_api import DomainRefused, Rows


def _iso(day: int) -> str:
    return f"2026-11-{day:02}T00:00:00Z"


class KeptCertificates:
    """As domains.py tells it, but that nothing is asked of a CA or of DNS."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.names: dict[str, Json] = {}
        self.now = now
        self.findings: dict[str, list[Json]] = {}
        self.account_keys = 1
        self.offline = ""  # why nothing can be done now
        self.calls: list[tuple[str, ...]] = []
        self.more_apps: set[str] = set()
        self.addresses = (["192.0.2.10"], ["2001:db8::10"])
        self.delegation = "k7.acme.example.net"
        self.issue_after: dict[str, int] = {}  # how often a name is asked for before it has its certificate

    def put(self, hostname: str, app: str = "web", **more: object) -> Json:
        self.names[hostname] = {
            "hostname": hostname, "app": app, "status": "pending_validation", "dns_provider": "",
            "acme_dns_configured": False, "acme_alpn_configured": False, "acme_http_configured": False,
            "ownership_txt_configured": False, "configured": False, "acme_requested": True,
            "has_custom_certificate": False, "has_fly_certificate": False, "created_at": _iso(1),
            "updated_at": _iso(2), **more,
        }  # fmt: skip
        return self.names[hostname]

    def issue(self, hostname: str) -> None:
        self.names[hostname] |= {"configured": True, "has_fly_certificate": True, "status": "active"}

    async def list(self, app: str | None) -> Rows:
        return [one for one in self.names.values() if app in (None, one["app"])]

    def _find(self, app: str, hostname: str) -> Json:
        found = self.names.get(hostname)
        if found is None or found["app"] != app:
            raise DomainRefused("not_found", f"app {app} has no {hostname}")
        return found

    def get(self, app: str, hostname: str) -> Json:
        one = self._find(app, hostname)
        if hostname in self.issue_after:
            self.issue_after[hostname] -= 1
            if self.issue_after[hostname] <= 0:
                self.issue(hostname)
        return self._detail(one)

    def _detail(self, one: Json) -> Json:
        host, wild = one["hostname"].removeprefix("*."), one["hostname"].startswith("*.")
        target = self.delegation and f"{host}.{self.delegation}"
        certificates = []
        if one["has_custom_certificate"]:
            certificates.append(_certificate("custom", "Example CA") | {"status": one.get("custom_status", "active")})
        if one["has_fly_certificate"]:
            certificates.append(_certificate("fly", "Pebble Intermediate"))
        shared = (
            "hostname",
            "app",
            "status",
            "dns_provider",
            "configured",
            "acme_requested",
            "created_at",
            "updated_at",
        )
        return {
            **{key: one[key] for key in shared},
            "rate_limited_until": one.get("rate_limited_until"), "certificates": certificates,
            "validation": {
                "dns_configured": one["acme_dns_configured"], "alpn_configured": one["acme_alpn_configured"],
                "http_configured": one["acme_http_configured"], "ownership_txt_configured": False,
            },
            "dns_requirements": {
                "a": self.addresses[0], "aaaa": self.addresses[1], "cname": f"{one['app']}.apps.example.net",
                "acme_challenge": {"name": f"_acme-challenge.{host}", "target": target},
                "ownership": {"name": f"_fly-ownership.{host}", "app_value": "app-k7", "org_value": "org-k1"},
            },
            "validation_errors": one.get("validation_errors", []),
            "challenge": "dns-01" if wild else one.get("challenge"),
            "next_try_at": one.get("next_try_at"), "order": one.get("order"),
        }  # fmt: skip

    async def add(self, app: str, hostname: str, challenge: str | None) -> Json:
        self.calls.append(("add", app, hostname, challenge or ""))
        if self.offline:
            raise DomainRefused("unavailable", self.offline)
        if hostname in self.names and self.names[hostname]["app"] != app:
            raise DomainRefused("conflict", f"{hostname} belongs to app {self.names[hostname]['app']}")
        one = self.names.get(hostname) or self.put(hostname, app, challenge=challenge)
        return self._detail(one)

    async def import_custom(self, app: str, hostname: str, fullchain: bytes, key: bytes) -> Json:
        try:
            judged = judge_custom(hostname, fullchain, key, self.now)
        except CustomRefusedError as error:
            faults = [{"code": one.code, "message": one.message, "remedy": one.remedy} for one in error.faults]
            raise DomainRefused("invalid", "the certificate cannot be used", faults) from error
        self.calls.append(("import", app, judged.certificate.name))
        one = self.names.get(hostname) or self.put(hostname, app, acme_requested=False)
        one["has_custom_certificate"] = True
        one |= {"status": "active", "configured": True} if one.get("owned", True) else {"status": "pending_ownership"}
        warnings = [{"code": each.code, "message": each.message, "remedy": each.remedy} for each in judged.warnings]
        return {**self._detail(one), "warnings": warnings}

    async def check(self, app: str, hostname: str) -> Json:
        one = self._find(app, hostname)
        records = {
            "a": ["203.0.113.9"], "aaaa": [], "cname": "", "resolved_addresses": ["203.0.113.9"],
            "soa": "ns1.example.net.", "acme_challenge_cname": "", "ownership_txt": "",
        }  # fmt: skip
        return {**self._detail(one), "dns_records": records, "findings": self.findings.get(hostname, [])}

    async def renew(self, app: str, hostname: str) -> Json:
        return self.get(app, hostname)

    async def remove(self, app: str, hostname: str, kind: str | None) -> Json | None:
        one = self._find(app, hostname)
        self.calls.append(("remove", app, hostname, kind or ""))
        if kind is None:
            del self.names[hostname]
            return None
        if kind == "custom":
            one |= {"has_custom_certificate": False, "configured": one["has_fly_certificate"]}
        else:
            one |= {"has_fly_certificate": False, "acme_requested": False, "configured": one["has_custom_certificate"]}
        return self._detail(one)

    async def forecast(self) -> Rows:
        return [
            {
                "hostname": "late.example.com", "app": "web", "source": "custom", "expires_at": _iso(25),
                "renew_at": None, "next_action": "import the next one", "will_fail": True, "reason": "nobody renews it",
            },
            {
                "hostname": "good.example.com", "app": "web", "source": "acme", "expires_at": _iso(30),
                "renew_at": _iso(28), "next_action": "renew", "will_fail": False, "reason": "",
            },
        ]  # fmt: skip

    async def roll_account_key(self) -> Json:
        self.account_keys += 1
        return self.account()

    def account(self) -> Json:
        return {
            "directory": "https://acme.example/dir", "uri": "https://acme.example/acct/1", "status": "valid",
            "contact": ["mailto:ops@example.net"], "key_thumbprint": f"key-{self.account_keys}", "created_at": _iso(1),
        }  # fmt: skip


def _certificate(source: str, issuer: str) -> Json:
    return {
        "source": source, "status": "active", "created_at": _iso(3), "expires_at": "2027-02-20T00:00:00Z",
        "issuer": issuer,
        "issued": [{"type": "ecdsa", "expires_at": "2027-02-20T00:00:00Z", "certificate_authority": "pebble"}],
    }  # fmt: skip
