"""`wakefront check` as a user runs it: what it prints, and the status it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import check
from proxy.cli.check import report, report_fly_toml, run_check
from proxy.config import Host, load
from proxy.machines.driver import DriverError

CONFIG = """\
[listen]
80 = ["127.0.0.1:8080"]
443 = ["127.0.0.1:8443"]

[[apps]]
fly_toml = "shop.toml"
command = ["python3", "server.py"]
[apps.env]
TOKEN = "hush-hush"
"""

FLY = """\
app = "shop"
org = "mine"

[env]
MODE = "plain"

[http_service]
internal_port = 4000
force_https = true
auto_stop_machines = "suspend"

[http_service.concurrency]
type = "requests"
hard_limit = 100

[[http_service.checks]]
path = "/up"
interval = "30s"

[mounts]
source = "data"
destination = "/data"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "shop.toml").write_text(FLY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    status = run_check(*arguments, True)
    return status, json.loads(capsys.readouterr().out)


def as_text(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    status = run_check(*arguments, False)
    return status, capsys.readouterr().out


def test_json_is_the_normalised_form_of_every_app(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = as_json(capsys, "config.toml", [])
    assert (status, found["ok"]) == (0, True)
    assert found["listen"]["admin"] == "127.0.0.1:8081"
    (app,) = found["apps"]
    assert (app["name"], app["hostnames"]) == ("shop", ["shop.apps.localhost"])
    assert app["fly_toml"] == str(folder / "shop.toml")
    assert app["groups"] == [
        {
            "name": "app",
            "command": ["python3", "server.py"],
            "count": 1,
            "internal_ports": [4000],
            "mounts": [{"source": "data", "destination": "/data", "processes": ["app"]}],
            "restart": "on-failure",
            "restart_retries": 10,
            "memory_mb": 256,
        }
    ]
    (service,) = app["services"]
    assert service["internal_port"] == 4000
    assert [port["start"] for port in service["ports"]] == [80, 443]
    assert (service["concurrency_type"], service["soft_limit"], service["hard_limit"]) == ("requests", 20, 100)
    assert service["checks"][0]["interval_s"] == 30.0
    assert app["keys"]["unknown"] == [{"key": "org", "did_you_mean": None}]
    assert "http_service.internal_port" in app["keys"]["used"]
    assert "http_service.checks[0].path" in app["keys"]["used"]
    assert all(one["reason"] for one in app["keys"]["kept"])


def test_values_of_environments_of_config_toml_are_not_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = as_json(capsys, "config.toml", [])
    assert found["apps"][0]["env"] == ["MODE", "TOKEN"]
    assert "hush" not in json.dumps(found)
    assert "hush" not in as_text(capsys, "config.toml", [])[1]


def test_each_fault_has_file_line_key_value_and_expectation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "shop.toml").write_text(FLY.replace("4000", "400000").replace("app =", "ap ="))
    (folder / "config.toml").write_text(CONFIG.replace("command", "comand"))
    status, found = as_json(capsys, "config.toml", [])
    assert (status, found["ok"]) == (2, False)
    faults = {fault["key"]: fault for fault in found["faults"]}
    assert faults["http_service.internal_port"] == {
        "severity": "error",
        "file": str(folder / "shop.toml"),
        "line": 8,
        "source": "internal_port = 400000",
        "key": "http_service.internal_port",
        "value": "400000",
        "expectation": "not in 1-65535",
        "did_you_mean": None,
    }
    assert faults["apps[0].comand"]["did_you_mean"] == "command"
    assert (faults["ap"]["severity"], faults["ap"]["did_you_mean"]) == ("warning", "app")
    assert faults["apps[0].name"]["line"] == 5


def test_people_read_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = as_text(capsys, "config.toml", [])
    assert status == 0
    for part in (
        "shop  shop.apps.localhost",
        "tcp 80 http (to https), 443 http+tls → 4000 (app)",
        "requests, soft limit 20, hard limit 100; autostop suspend, autostart on, at least 0 running",
        "http GET /up every 30 s",
        "1 × app: python3 server.py",
        "data at /data",
        "1000 requests a worker, each 10 s at most",
        "shop.toml:2: org",
        "1 app: 0 errors",
    ):
        assert part in text, text


SETTINGS = """\
balance = "peak-ewma"
count = 2
sticky = { name = "s", ttl = "1h" }
queue_timeout = "2s"
max_queued = 1
organization = "acme"
replay_sources = ["personal"]
replay_memory = 2048
keep_bodies = true
restart_on_failing_checks = "90s"
autostop_interval = "1m"
autostop_at_once = 3
busy = "/busy"
warm_hours = ["mon-wed 8:00-18:30 Europe/Amsterdam"]
access = { allow = ["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/16", "10.5.0.0/16"], \
deny = ["10.1.1.0/24"], requests_per_second = 2.5, connections = 1, handshakes_per_second = 4, max_body = 10 }
wake_rules = { ignore_paths = ["/wp-*"], starts_per_source = 0.5, starts = 4, waiting_page = true }
[apps.env]
"""


def test_settings_of_an_app_are_shown_where_they_are_not_the_default(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.toml").write_text(CONFIG.replace("[apps.env]\n", SETTINGS.replace("\\\n", "")))
    status, text = as_text(capsys, "config.toml", [])
    assert status == 0, text
    for line in (
        "balance   peak-ewma",
        "queue     1 request a worker, each 2 s at most",
        "sticky    cookie s for 3600 s",
        "access    allow 10.1.0.0/16, 10.2.0.0/16, 10.3.0.0/16, 10.4.0.0/16 and 1 more; deny 10.1.1.0/24; "
        "2.5 requests a second, 20 at once; 1 connection; 4 handshakes a second; bodies of 10 bytes at most",
        "wake      not by paths /wp-*; 0.5 starts a second by one source; 4 starts a second by all sources; "
        "waiting page",
        "replay    organization acme; from personal too; 2048 bytes in memory; bodies kept from the first request on",
        "autostop  every 60 s; 3 at once; unless /busy says busy; "
        "one is kept in mon,tue,wed 08:00-18:30 Europe/Amsterdam",
        "restart   after 90 s of failing checks",
    ):
        assert f"    {line}\n" in text, text


def test_json_has_every_setting_set_or_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (app,) = as_json(capsys, "config.toml", [])[1]["apps"]
    assert (app["balance"], app["sticky"], app["organization"], app["replay_sources"]) == ("fly", None, "personal", [])
    assert app["keep_bodies"] is False and app["restart_on_failing_checks_s"] == 0.0
    assert app["autostop"] == {"interval_s": None, "at_once": 1, "busy": None, "warm_hours": []}
    assert app["access"]["allow"] == [] and app["access"]["requests_per_s"] is None
    assert app["wake_rules"]["waiting_page"] is False and app["wake_rules"]["starts_per_s"] is None
    assert (app["limits"]["queue_timeout_s"], app["limits"]["max_queued"]) == (10.0, 1000)
    quiet = as_text(capsys, "config.toml", [])[1]
    assert not any(f"    {name:9} " in quiet for name in ("balance", "sticky", "access", "wake", "replay", "restart"))


def test_faults_are_shown_with_their_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.toml").write_text(CONFIG.replace("fly_toml =", "fly_tmol ="))
    status, text = as_text(capsys, "config.toml", [])
    assert status == 2
    assert 'error: config.toml:6: apps[0].fly_tmol = "shop.toml"\n    | fly_tmol = "shop.toml"\n' in text
    assert "(did you mean fly_toml?)" in text


def test_a_config_that_is_not_toml_still_makes_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.toml").write_text("[node\n")
    status, found = as_json(capsys, "config.toml", [])
    assert (status, found["config"], len(found["faults"])) == (2, str(folder / "config.toml"), 1)
    assert "config.toml:1" in as_text(capsys, "config.toml", [])[1]


def test_a_config_that_is_not_there_is_a_fault(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = as_text(capsys, "missing.toml", [])
    assert status == 2
    assert "No such file" in text


def test_bare_fly_toml_files_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.toml").write_text("[http_service]\ninternal_port = 0\n")
    status, text = as_text(capsys, None, ["shop.toml", "bad.toml"])
    assert status == 2
    assert "2 files, 1 valid, 1 invalid: 1 error, 1 warning" in text
    status, found = as_json(capsys, None, ["shop.toml"])
    assert (status, found["summary"]) == (0, {"files": 1, "valid": 1, "invalid": 0})
    assert found["fly_tomls"][0]["app"] == "shop"


def test_no_file_prints_control_characters_to_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "evil.toml").write_text('"\\u001b[31m" = "\\u001b[2J"\nx = \x1b[0m\n')
    _, broken = as_text(capsys, None, ["evil.toml"])
    (folder / "evil.toml").write_text('app = "a\\u001b[2J"\n"\\u001b[31m" = "\\u001b[2J"\n')
    _, unknown = as_text(capsys, None, ["evil.toml"])
    assert "\x1b" not in broken + unknown


def test_what_the_host_does_not_permit_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_account(user: str) -> tuple[int, int, list[int]]:
        raise DriverError(f"user {user!r}: there is no such account")

    monkeypatch.setattr(check.volumes, "mount_support", lambda mounts: ["not permitted"] if list(mounts) else [])
    monkeypatch.setattr(check.volumes, "network_support", lambda: "no network namespaces")
    monkeypatch.setattr(check.volumes, "account", no_account)
    text = CONFIG.replace("[apps.env]", 'network = "namespace"\nuser = "ghost"\n[apps.env]')
    (folder / "config.toml").write_text(text)
    found = report(load("config.toml", Host("host", 0, 1)))
    said = {fault["key"]: fault["expectation"] for fault in found["faults"] if fault["severity"] == "warning"}
    assert found["ok"]
    assert "FLY_VOLUME_<NAME>" in said["apps[0].fly_toml"]
    assert "no network namespaces" in said["apps[0].network"]
    assert "no such account" in said["apps[0].user"]


def test_a_reading_of_a_fly_toml_can_be_read_again_by_json(folder: Path) -> None:
    found = report_fly_toml("shop.toml")
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_the_installed_command_ends_with_the_status(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(check.__file__).parents[2])}
    run = [sys.executable, "-m", "proxy", "check"]
    good = subprocess.run([*run, "--config", "config.toml", "--json"], capture_output=True, env=environment, timeout=30)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["apps"][0]["name"] == "shop"
    (folder / "config.toml").write_text("[node]\nworkers = -1\n")
    bad = subprocess.run([*run, "--config", "config.toml"], capture_output=True, env=environment, timeout=30)
    assert bad.returncode == 2  # as `serve` ends
    assert b"node.workers = -1" in bad.stdout
