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

EXPLAINED = {  # docs/threat-model.md, "What testssl.sh says"
    "cert_chain_of_trust", "cert_revocation", "DNS_CAArecord", "HSTS", "security_headers", "secure_renego",
    "sessionresumption_ticket", "engine_problem",
}  # fmt: skip
PASSED = {"OK", "INFO"}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif("WAKEFRONT_SOAK" not in os.environ, reason="a minute long: ./run soak")
@pytest.mark.skipif(shutil.which("testssl") is None, reason="testssl.sh is not installed")
def test_every_finding_of_testssl_is_explained(node: AttackedNode, attack: Begin, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    url = f"https://{node.host('web')}:{node.https_port}/"
    command = ["testssl", "--quiet", "--warnings", "batch", "--color", "0", "--ip", "127.0.0.1"]
    with attack("TLS", "testssl.sh", node, growth_mib=64) as run:
        subprocess.run(
            [*command, "--jsonfile", str(found), url],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=380, check=False,
        )  # fmt: skip
        findings = json.loads(found.read_text())
        for one in findings:
            run.case(one["id"])
        assert len(findings) > 100 and any(one["id"] == "TLS1_3" for one in findings), "it came to its end"
        worse = {one["id"]: one["finding"] for one in findings if one["severity"] not in PASSED}
        assert set(worse) <= EXPLAINED, worse
        run.note(f"{len(worse)} findings, all explained")
