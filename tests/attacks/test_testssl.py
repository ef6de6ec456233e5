"""testssl.sh against the node: whatever it finds is one of those that docs/threat-model.md explains.

It takes a minute, so it runs in ./run soak only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode
from tests.support.pebble import pebble
from tests.support.processes import wait_for
from tests.system.test_custom_domains import certs_section

EXPLAINED = {  # docs/threat-model.md, "What testssl.sh says"
    "cert_chain_of_trust", "cert_revocation", "DNS_CAArecord", "HSTS", "security_headers", "secure_renego",
    "sessionresumption_ticket", "engine_problem",
}  # fmt: skip
PASSED = {"OK", "INFO"}


# Of Pebble's certificates: they live for years, and name no place that tells of revocation.
EXPLAINED_OF_PEBBLE = {
    f"{one} <cert#{number}>" for one in ("cert_revocation", "cert_validityPeriod", "DNS_CAArecord") for number in (1, 2)
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif("WAKEFRONT_SOAK" not in os.environ, reason="a minute long: ./run soak"),
    pytest.mark.skipif(shutil.which("testssl") is None, reason="testssl.sh is not installed"),
]


def findings_of(url: str, into: Path, *more: str) -> list[dict[str, str]]:
    """All that testssl.sh says of an address on this host."""
    command = ["testssl", "--quiet", "--warnings", "batch", "--color", "0", "--ip", "127.0.0.1", *more]
    subprocess.run(
        [*command, "--jsonfile", str(into), url],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=480,
        check=False,
    )
    findings: list[dict[str, str]] = json.loads(into.read_text())
    assert len(findings) > 100 and any(one["id"] == "TLS1_3" for one in findings), "it came to its end"
    return findings


def test_every_finding_of_testssl_is_explained(node: AttackedNode, attack: Begin, tmp_path: Path) -> None:
    url = f"https://{node.host('web')}:{node.https_port}/"
    with attack("TLS", "testssl.sh", node, growth_mib=64) as run:
        findings = findings_of(url, tmp_path / "found.json")
        for one in findings:
            run.case(one["id"])
        worse = {one["id"]: one["finding"] for one in findings if one["severity"] not in PASSED}
        assert set(worse) <= EXPLAINED, worse
        run.note(f"{len(worse)} findings, all explained")


def test_every_finding_of_testssl_is_explained_with_certificates_of_a_ca(tmp_path: Path, attack: Begin) -> None:
    """ECDSA and RSA of the same name, as ACME gave them."""
    node = AttackedNode(tmp_path / "node")
    with pebble(tmp_path / "ca", node.http_port, node.https_port) as ca:
        certs = certs_section(ca, 'key_types = ["ecdsa", "rsa"]')
        node.config.write_text(node.config.read_text() + certs)
        with node:
            path = "/v1/apps/web/certificates"
            node.api("POST", f"{path}/acme", {"hostname": "shop.example.com"})
            wait_for(
                lambda: "rsa" in json.dumps(node.api("GET", f"{path}/shop.example.com")[1]["certificates"]), 30, "RSA"
            )
            url = f"https://shop.example.com:{node.https_port}/"
            with attack("TLS", "testssl.sh, of a CA, ECDSA and RSA", node, growth_mib=64) as run:
                (tmp_path / "root.pem").write_bytes(ca.roots())
                findings = findings_of(url, tmp_path / "found.json", "--add-ca", str(tmp_path / "root.pem"))
                for one in findings:
                    run.case(one["id"])
                worse = {one["id"]: one["finding"] for one in findings if one["severity"] not in PASSED}
                assert set(worse) <= EXPLAINED | EXPLAINED_OF_PEBBLE, worse
                run.note(f"{len(worse)} findings, all explained")
