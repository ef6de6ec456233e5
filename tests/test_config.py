from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import config as config_module
from proxy.cli import check
from proxy.config import (
    AppConfig,
    ClusterSection,
    Host,
    LoadResult,
    NodeConfig,
    PeerSection,
    RegionSection,
    load,
    plan,
)
from proxy.control.plan import keep_plan, kept_plan, plan_of
from proxy.ipc import Settings
from proxy.model import (
    AccessRules,
    AppLimits,
    Balance,
    Endpoint,
    RegionCode,
    RestartPolicy,
    StickyCookie,
    WakeMode,
    WakeOn,
    WakeRules,
)
from proxy.process import BACKHAUL, ListenAddress, ServePlan
from proxy.wire.fly_keys import KEYS, USED

ROOT = Path(__file__).parent.parent
NOBODY = Host("host", 65534, 4)
ROOT_USER = Host("host", 0, 4)

FLY = """\
app = "shop"
primary_region = "fra"
kill_signal = "SIGTERM"
kill_timeout = "7s"

[env]
MODE = "plain"
LEVEL = 3

[processes]
web = "python3 web.py --port {port}"
worker = "python3 worker.py"

[http_service]
internal_port = 8080
processes = ["web"]

[[mounts]]
source = "data"
destination = "/data"
processes = ["worker"]

[[restart]]
policy = "always"
retries = 2
processes = ["worker"]
"""


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


class Node:
    """A folder with config.toml and fly.toml files to load."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "shop").mkdir()
        self.fly(FLY)

    def fly(self, text: str, name: str = "shop/fly.toml") -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def load(self, text: str, host: Host = NOBODY) -> LoadResult:
        (self.folder / "config.toml").write_text(text)
        return load(self.folder / "config.toml", host)

    def good(self, text: str, host: Host = NOBODY) -> NodeConfig:
        result = self.load(text, host)
        assert result.config is not None, [str(fault) for fault in result.errors]
        return result.config

    def app(self, extra: str = "", host: Host = NOBODY) -> AppConfig:
        return self.good(APP + extra, host).apps[0]

    def errors(self, text: str, host: Host = NOBODY) -> dict[str, str]:
        result = self.load(text, host)
        assert (result.config is None) == bool(result.errors)
        return {fault.key: fault.expectation for fault in result.errors}

    def warnings(self, text: str, host: Host = NOBODY) -> dict[str, str]:
        return {fault.key: fault.expectation for fault in self.load(text, host).warnings}


APP = '[[apps]]\nfly_toml = "shop/fly.toml"\n'
STATIC = '[[apps]]\nname = "old"\ndriver = "static"\n[[apps.machines]]\nid = "old-1"\naddress = "10.0.0.5:9000"\n'


# --- the node


def test_an_empty_file_is_a_node_with_defaults(node: Node) -> None:
    config = node.good("")
    assert config.node.name == "host"
    assert config.node.region == "local"
    assert config.node.domain == "apps.localhost"
    assert config.node.data_dir == str(node.folder / "wakefront-data")
    assert config.listen.public == (ListenAddress(80, "127.0.0.1", 8080), ListenAddress(443, "127.0.0.1", 8443))
    assert (config.listen.admin_host, config.listen.admin_port) == ("127.0.0.1", 8081)
    assert config.apps == ()


def test_limits_and_log_have_the_names_and_defaults_of_the_workers_settings(node: Node) -> None:
    worker = Settings(protocol=1, node="n", region="r", domain="d")
    config = node.good("")
    for section in (config.limits, config.log):
        for field in dataclasses.fields(section):
            if field.name != "access_log":  # control decides nothing here: "-" is the node's default
                assert getattr(section, field.name) == getattr(worker, field.name), field.name
    copied = {field.name for section in (config.limits, config.log) for field in dataclasses.fields(section)}
    assert set(Settings.__struct_fields__) == {"protocol", "node", "region", "domain", "on_demand"} | copied


def test_every_limit_can_be_set(node: Node) -> None:
    limits = node.good(
        "[limits]\nmax_head_bytes = 2048\nmax_headers = 7\nmax_target_bytes = 1024\nmax_connections = 9\n"
        'handshake_timeout = "1s"\nhead_timeout = 2\nidle_timeout = "3s"\ndrain_timeout = "0s"\n'
        "wake_hints_per_source = 0.5\nwake_hints = 8\nsource_connections = 10\nsource_connects = 11\n"
        'source_handshakes = 12\nexempt_sources = ["192.0.2.0/24"]\nmax_memory = "512mb"'
    ).limits
    assert dataclasses.astuple(limits) == (
        2048, 7, 1024, 9, 1.0, 2.0, 3.0, 0.0, 0.5, 8.0, 10, 11.0, 12.0, ("192.0.2.0/24",), 512 * 1024**2
    )  # fmt: skip
    assert node.good("[limits]\nexempt_sources = []").limits.exempt_sources == ()
    assert "limits.exempt_sources" in node.errors('[limits]\nexempt_sources = ["192.0.2.0/33"]')


def test_a_limit_of_memory_that_a_worker_meets_at_rest_is_a_warning(node: Node) -> None:
    for little in ('"20mb"', "1000"):
        assert "limits.max_memory" in node.warnings(f"[limits]\nmax_memory = {little}"), little
    for enough in ('"64mb"', "0"):
        assert "limits.max_memory" not in node.warnings(f"[limits]\nmax_memory = {enough}"), enough


def test_ports_are_bound_where_listen_says(node: Node) -> None:
    config = node.good('[listen]\n443 = ["127.0.0.1:8443", "[::1]:8443"]\n8080 = "localhost:0"\nadmin = "127.0.0.1:0"')
    assert config.listen.public == (
        ListenAddress(443, "127.0.0.1", 8443),
        ListenAddress(443, "::1", 8443),
        ListenAddress(8080, "127.0.0.1", 0),
    )
    assert config.public_ports == (443, 8080)
    assert config.listen.admin_port == 0


@pytest.mark.parametrize(
    "line", ['443 = ["8443"]', '443 = ["host:1"]', '443 = ["::1:8443"]', '443 = ["127.0.0.1:70000"]',
             '0 = ["127.0.0.1:1"]', '443 = 8443', 'admin = "8081"', 'admim = "127.0.0.1:8081"', '99999 = []'],
)  # fmt: skip
def test_a_wrong_listen_line_is_refused(node: Node, line: str) -> None:
    assert node.errors(f"[listen]\n{line}").keys() == {f"listen.{line.split(' ')[0]}"}


def test_one_address_is_not_bound_twice(node: Node) -> None:
    assert "8080 is bound for 80 already" in node.errors('[listen]\n80 = ["127.0.0.1:8080"]\n443 = ["127.0.0.1:8080"]')[
        "listen.443"
    ].replace("127.0.0.1:", "")
    assert "listen.80" in node.errors('[listen]\n80 = ["127.0.0.1:8081"]')


def test_an_admin_api_that_others_reach_is_a_warning(node: Node) -> None:
    assert "listen.admin" in node.warnings('[listen]\nadmin = "0.0.0.0:8081"')


def test_acme_needs_no_more_than_the_word(node: Node) -> None:
    certs = node.good('[certs]\nissuer = "acme"\nacme_email = "ops@example.com"').certs
    assert (certs.issuer, certs.acme_directory) == ("acme", "https://acme-v02.api.letsencrypt.org/directory")
    assert (certs.key_types, certs.challenges, certs.dns) == (("ecdsa",), ("tls-alpn-01", "http-01"), None)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('issuer = "letsencrypt"', "issuer"),
        ('acme_directory = "http://ca.example/dir"', "acme_directory"),
        ('acme_email = "nobody"', "acme_email"),
        ('acme_ca_file = "none.pem"', "acme_ca_file"),
        ('acme_eab_kid = "kid"', "acme_eab_kid"),
        ('key_types = ["rsa"]', "key_types"),
        ('challenges = ["http-02"]', "challenges"),
        ('challenges = ["dns-01"]', "challenges"),
        ('addresses = ["edge.example.net"]', "addresses"),
        ('dns_servers = ["192.0.2.1"]', "dns_servers"),
        ('dns_delegation = "acme.example.net"', "dns_delegation"),
        ('[certs.dns]\nhook = "exec"', "dns.command"),
        ('[certs.dns]\nhook = "rfc2136"', "dns.server"),
        ('[certs.dns]\ncommand = "set-txt"', "dns.hook"),
        ('[certs.dns]\nhook = "rfc2136"\nserver = "192.0.2.1:53"\nkey_name = "k"', "dns.key_secret"),
    ],
)
def test_what_certs_cannot_be_is_refused_with_its_key(node: Node, text: str, key: str) -> None:
    assert node.errors(f"[certs]\n{text}\n").keys() == {f"certs.{key}"}


def test_secrets_of_certs_are_not_repeated_in_faults(node: Node) -> None:
    (fault,) = node.load('[certs]\nacme_eab_hmac_key = "s3cret"').errors
    assert fault.path == ("certs", "acme_eab_hmac_key")
    assert "s3cret" not in str(fault) and "s3cret" not in repr(node.load('[certs]\nacme_eab_hmac_key = "s3cret"').draft)


def test_on_demand_needs_somebody_who_permits(node: Node) -> None:
    assert node.errors(STATIC + "[apps.on_demand]\n").keys() == {"apps[0].on_demand.ask"}
    assert node.errors(STATIC + '[apps.on_demand]\nask = "localhost:9000"').keys() == {"apps[0].on_demand.ask"}
    assert node.errors(STATIC + '[apps.on_demand]\nallow = ["*.com"]').keys() == {"apps[0].on_demand.allow"}
    (app,) = node.good(STATIC + '[apps.on_demand]\nallow = ["*.Kunden.example"]\nask_timeout = "500ms"').apps
    assert app.on_demand is not None
    assert (app.on_demand.allow, app.on_demand.ask_timeout_s) == (("*.kunden.example",), 0.5)


def test_a_key_of_a_later_version_is_kept_without_effect(node: Node) -> None:
    config = node.good('[listen]\ndns = "127.0.0.1:53"\n')
    assert {key.key for key in config.keys} == {"listen.dns"}
    assert all(key.reason for key in config.keys)
    assert config.listen.public[0].public_port == 80


# --- the fleet

BACKHAUL_AT = '[listen]\nbackhaul = "10.0.0.5:7443"\n'
PEER = '[[peers]]\nname = "b"\nregion = "fra"\nbackhaul = "10.0.0.6:7443"\n'


def test_a_node_of_a_fleet_says_where_the_others_reach_it_and_where_they_are(node: Node) -> None:
    config = node.good(
        BACKHAUL_AT + "[regions.ams]\nlatitude = 52.3\nlongitude = 4\n"
        + PEER + '[[peers]]\nname = "c-2"\nregion = "ams"\nbackhaul = "C.Example:7000"\n'
        + '[cluster]\nembedded = true\nlisten = "10.0.0.5:6222"\nroutes = ["10.0.0.6:6222", "c.example:6222"]\n'
    )  # fmt: skip
    assert config.is_fleet
    assert config.listen.backhaul == ListenAddress(BACKHAUL, "10.0.0.5", 7443)
    assert config.regions == (RegionSection(RegionCode("ams"), 52.3, 4.0),)
    assert config.peers == (
        PeerSection("b", RegionCode("fra"), "10.0.0.6", 7443), PeerSection("c-2", RegionCode("ams"), "c.example", 7000)
    )  # fmt: skip
    assert config.cluster == ClusterSection(
        embedded=True, listen="10.0.0.5:6222", routes=("10.0.0.6:6222", "c.example:6222")
    )
    made = plan_of(config)
    assert (made.backhaul, made.regions) == (config.listen.backhaul, config.regions)
    assert (made.peers, made.cluster) == (config.peers, config.cluster)


def test_a_node_by_itself_has_no_backhaul(node: Node) -> None:
    config = node.good("")
    assert (config.is_fleet, config.listen.backhaul, config.peers, config.cluster) == (False, None, (), None)
    assert plan(config, "config.toml", NOBODY).backhaul is None


def test_the_supervisor_binds_the_backhaul_as_it_binds_public_ports(node: Node) -> None:
    config = node.good(BACKHAUL_AT + '80 = ["127.0.0.1:8080"]\n')
    made = ServePlan.from_json(plan(config, "config.toml", NOBODY).to_json())
    assert made.listen == (ListenAddress(80, "127.0.0.1", 8080), ListenAddress(BACKHAUL, "10.0.0.5", 7443))
    assert made.backhaul == made.listen[1]
    assert config.public_ports == (80,)


@pytest.mark.parametrize("address", ["10.0.0.5", "node-a:7443", ":7443", "10.0.0.5:70000", "[::1", "::1:80"])
def test_a_backhaul_that_cannot_be_bound_is_refused(node: Node, address: str) -> None:
    assert node.errors(f'[listen]\nbackhaul = "{address}"\n').keys() == {"listen.backhaul"}


@pytest.mark.parametrize("other", ['80 = ["10.0.0.5:7443"]', 'admin = "10.0.0.5:7443"'])
def test_the_backhaul_shares_no_address(node: Node, other: str) -> None:
    assert "bound for" in node.errors(BACKHAUL_AT + other + "\n")["listen.backhaul"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("Node-A", "node-a"), ("a.example", "a"), ("a_b", "a-b"), ("a-", "a"), ("...", None), ("x" * 63 + "y", None)],
)
def test_a_node_of_a_fleet_is_named_as_a_certificate_can_name_it(node: Node, name: str, meant: str | None) -> None:
    host = Host(name, 65534, 4)
    (fault,) = node.load(BACKHAUL_AT, host).errors
    assert (fault.key, fault.did_you_mean) == ("node.name", meant)
    assert repr(name) in fault.expectation and "certificate" in fault.expectation
    assert node.load("", host).errors == ()
    assert node.errors(f'[node]\nname = "n"\n{BACKHAUL_AT}', host) == {}


@pytest.mark.parametrize("section", [PEER, "[cluster]\nembedded = true\n"])
def test_peers_and_clusters_need_a_backhaul(node: Node, section: str) -> None:
    (expectation,) = node.errors(section).values()
    assert "[listen]" in expectation and 'backhaul = "IP:PORT"' in expectation


@pytest.mark.parametrize(
    ("peers", "key"),
    [
        (PEER + PEER.replace("10.0.0.6", "10.0.0.7"), "peers[1].name"),
        (PEER + PEER.replace('"b"', '"c"'), "peers[1].backhaul"),
        (PEER.replace('"b"', '"host"'), "peers[0].name"),
        (PEER.replace('"b"', '"B"'), "peers[0].name"),
        (PEER.replace('"b"', '"b.c"'), "peers[0].name"),
        (PEER.replace("10.0.0.6", "10.0.0.5"), "peers[0].backhaul"),
        (PEER.replace("10.0.0.6", "0.0.0.0"), "peers[0].backhaul"),
        (PEER.replace("10.0.0.6", "1.2.3"), "peers[0].backhaul"),
        (PEER.replace("7443", "0"), "peers[0].backhaul"),
        (PEER.replace('"fra"', '"Fra"'), "peers[0].region"),
        (PEER.replace('region = "fra"\n', ""), "peers[0].region"),
        (PEER.replace('name = "b"\n', ""), "peers[0].name"),
        (PEER + "port = 1\n", "peers[0].port"),
    ],
)
def test_a_peer_is_another_node_with_a_name_and_an_address_of_its_own(node: Node, peers: str, key: str) -> None:
    assert node.errors(BACKHAUL_AT + peers).keys() == {key}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "urls"),
        ('urls = ["nats://a:1"]\nembedded = true\n', "embedded"),
        ('urls = ["http://a:1"]\n', "urls"),
        ('urls = ["nats://a:1"]\nlisten = "10.0.0.5:6222"\n', "listen"),
        ('urls = ["nats://a:1"]\nroutes = ["10.0.0.6:6222"]\n', "routes"),
        ('embedded = true\nlisten = "x"\n', "listen"),
        ('embedded = true\nroutes = ["10.0.0.6"]\n', "routes"),
        ('embedded = true\nca_file = "none.pem"\n', "ca_file"),
        ('embedded = true\ndomain = "a.b"\n', "domain"),
        ("embedded = true\nname = 1\n", "name"),
    ],
)
def test_a_cluster_is_servers_of_ones_own_or_one_started_here(node: Node, text: str, key: str) -> None:
    assert node.errors(f"{BACKHAUL_AT}[cluster]\n{text}").keys() == {f"cluster.{key}"}


def test_passwords_in_the_urls_of_a_cluster_are_not_repeated(node: Node) -> None:
    text = BACKHAUL_AT + '[cluster]\nurls = ["nats://me:s3cret@a:1", "http://me:s3cret@a:1"]\n'
    result = node.load(text)
    assert [fault.key for fault in result.errors] == ["cluster.urls"]
    assert "s3cret" not in str(result.errors) and "s3cret" not in repr(result.draft)
    assert "s3cret" not in str(check.report(result)["cluster"])


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("[regions.ams]\nlatitude = 91\nlongitude = 4\n", {"regions.ams.latitude"}),
        ("[regions.ams]\nlatitude = 52\nlongitude = -181.0\n", {"regions.ams.longitude"}),
        ("[regions.ams]\nlatitude = 52\n", {"regions.ams.longitude"}),
        ("[regions.ams]\n", {"regions.ams.latitude", "regions.ams.longitude"}),
        ("[regions.Ams]\nlatitude = 52\nlongitude = 4\n", {"regions.Ams"}),
        ("[regions.any]\nlatitude = 52\nlongitude = 4\n", {"regions.any"}),
    ],
)
def test_a_region_lies_somewhere_on_earth(node: Node, text: str, keys: set[str]) -> None:
    assert node.errors(text).keys() == keys


def test_the_access_log_is_a_file_beside_config_toml_or_none(node: Node) -> None:
    assert node.good('[log]\naccess = "access.log"').log.access_log == str(node.folder / "access.log")
    assert node.good('[log]\naccess = ""\nformat = "text"').log == config_module.LogSection("", "text")
    assert node.errors('[log]\naccess = "no/such/folder.log"').keys() == {"log.access"}


def test_the_plan_has_a_worker_a_core_unless_the_file_says_how_many(node: Node) -> None:
    text = '[node]\ndata_dir = "d"\n[limits]\ndrain_timeout = "4s"\n'
    made = plan(node.good(text), node.folder / "config.toml", NOBODY)
    assert (made.workers, made.drain_timeout_s, made.data_dir) == (4, 4.0, str(node.folder / "d"))
    assert made.config_path == str(node.folder / "config.toml")
    assert plan(node.good("[node]\nworkers = 2"), "config.toml", NOBODY).workers == 2


# --- apps


def test_an_app_is_its_fly_toml_and_what_config_toml_adds(node: Node) -> None:
    app = node.app(
        'hostnames = ["Shop.Example", "bücher.example."]\n'
        'wake_on = "request"\nwake_timeout = "9s"\nidle_timeout = "0"\nwake = "race"\n'
        'connect_timeout = "1s"\nfirst_byte_timeout = "0"\nstream_idle_timeout = 20\nmax_waiters = 5\n'
        'count = { web = 3, worker = 0 }\n[apps.env]\nMODE = "secret"\nTOKEN = "t"\n'
    )
    assert app.name == "shop"
    assert app.hostnames == ("shop.apps.localhost", "shop.example", "xn--bcher-kva.example")
    assert (app.wake_on, app.wake_timeout_s, app.idle_timeout_s) == (WakeOn.REQUEST, 9.0, 0.0)
    assert app.wake is WakeMode.RACE
    assert app.limits == AppLimits(1.0, None, 20.0, 5)
    assert dict(app.env) == {"MODE": "secret", "LEVEL": "3", "TOKEN": "t", "PRIMARY_REGION": "fra"}
    assert (app.kill_signal, app.kill_timeout_s, app.primary_region) == (15, 7.0, "fra")
    assert app.cwd == str(node.folder / "shop")
    web, worker = app.groups
    assert (web.name, web.count, web.internal_ports) == ("web", 3, (8080,))
    assert web.command == ("python3", "web.py", "--port", "{port}")
    assert (worker.count, worker.internal_ports, worker.mounts[0].source) == (0, (), "data")
    assert (worker.restart, worker.restart_retries) == (RestartPolicy.ALWAYS, 2)


def test_each_group_has_one_machine_unless_counted(node: Node) -> None:
    assert [group.count for group in node.app().groups] == [1, 1]
    assert [group.count for group in node.app("count = 2").groups] == [2, 2]


def test_a_command_of_config_toml_beats_the_fly_toml_for_the_default_group(node: Node) -> None:
    groups = node.app("command = \"python3 other.py 'two words'\"").groups
    assert groups[0].command == ("python3", "other.py", "two words")
    assert groups[1].command == ("python3", "worker.py")


def test_commands_may_be_given_group_by_group(node: Node) -> None:
    groups = node.app('command = { worker = ["python3", "w.py"] }').groups
    assert groups[0].command == ("python3", "web.py", "--port", "{port}")
    assert groups[1].command == ("python3", "w.py")
    assert "apps[0].command.wroker" in node.errors(APP + 'command = { wroker = "python3" }')


def test_a_command_is_asked_for_where_only_an_image_would_have_one(node: Node) -> None:
    node.fly('app = "image"\n[build]\nimage = "nginx"\n[http_service]')
    assert "command" in node.errors(APP)["apps[0].command"]
    assert node.errors(APP + "count = 0") == {}
    assert node.app('command = "python3"').groups[0].command == ("python3",)


def test_an_app_may_be_named_in_config_toml(node: Node) -> None:
    node.fly(FLY.replace('app = "shop"\n', ""))
    assert node.errors(APP).keys() == {"apps[0].name"}
    assert node.app('name = "other"').hostnames[0] == "other.apps.localhost"


@pytest.mark.parametrize("name", ["{{app}}", "<your-app>", "{APP_NAME}", "Shop", "a_b", "-x", "a" * 64, "../up"])
def test_placeholders_and_wrong_names_are_refused(node: Node, name: str) -> None:
    node.fly(FLY.replace('"shop"', f'"{name}"'))
    assert node.errors(APP).keys() == {"apps[0].fly_toml"}
    assert node.app('name = "good"').name == "good"


def test_two_apps_share_neither_name_nor_hostname_nor_machine(node: Node) -> None:
    node.fly('app = "b"\n[http_service]', "b/fly.toml")
    b = '[[apps]]\nfly_toml = "b/fly.toml"\ncommand = "python3"\n'
    assert node.errors(APP + APP).keys() == {"apps[1].name"}
    assert node.errors(APP + b + 'hostnames = ["shop.apps.localhost"]').keys() == {"apps[1].hostnames"}
    assert node.errors(APP + 'hostnames = ["x.example"]\n' + b + 'hostnames = ["X.example"]').keys() == {
        "apps[1].hostnames"
    }
    assert node.errors(STATIC + STATIC.replace('"old"', '"new"')).keys() == {"apps[1].machines"}


@pytest.mark.parametrize("hostname", ["*.example", "10.0.0.1", "a b", "", "x..y", "[::1]", "a" * 64 + ".example"])
def test_what_is_no_host_name_is_refused(node: Node, hostname: str) -> None:
    assert node.errors(APP + f'hostnames = ["{hostname}"]').keys() == {"apps[0].hostnames"}


def test_faults_of_a_fly_toml_come_with_its_own_file_and_line(node: Node) -> None:
    node.fly(FLY.replace("internal_port = 8080", "internal_port = 70000"))
    (fault,) = node.load(APP).errors
    assert (fault.file, fault.line, fault.key) == (
        str(node.folder / "shop/fly.toml"),
        FLY[: FLY.index("internal_port")].count("\n") + 1,
        "http_service.internal_port",
    )
    assert (fault.value, fault.source_line) == ("70000", "internal_port = 70000")


def test_a_faulty_app_does_not_hide_faults_of_the_next(node: Node) -> None:
    node.fly("app = ", "broken/fly.toml")
    text = '[[apps]]\nfly_toml = "broken/fly.toml"\n[[apps]]\nfly_toml = "gone/fly.toml"\n' + APP + "count = -1"
    faults = node.load(text).errors
    assert {(Path(fault.file or "").parent.name, fault.line) for fault in faults} == {
        ("broken", 1),
        (node.folder.name, 4),
        (node.folder.name, 7),
    }


@pytest.mark.parametrize("fly_toml", [None, "app = ", 'app = "<name>"\n'], ids=["missing", "no TOML", "no name"])
def test_faults_of_an_app_are_told_whatever_its_fly_toml_is_like(node: Node, fly_toml: str | None) -> None:
    if fly_toml is not None:
        (node.folder / "bad.toml").write_text(fly_toml)
    lines = 'fly_toml = "bad.toml"\ncommand = 3\nsticky = 5\ncount = "two"\nidle_timeout = "soon"\n'
    faults = node.errors(f'[[apps]]\n{lines}[apps.access]\nmax_body = "x"\n')
    keys = {"command", "sticky", "count", "idle_timeout", "access.max_body"}
    assert {f"apps[0].{key}" for key in keys} <= set(faults), faults


def test_a_log_may_lie_in_a_data_dir_that_is_yet_to_be_made(node: Node) -> None:
    node.good('[node]\ndata_dir = "new"\n[log]\naccess = "new/logs/access.log"\n')
    faults = node.errors('[node]\ndata_dir = "new"\n[log]\naccess = "newer/access.log"\n')
    assert "there is no" in faults["log.access"]


def test_a_misspelt_key_is_refused_with_the_likely_one(node: Node) -> None:
    result = node.load("[node]\nregoin = 'x'\n[nod]\n" + APP + "comand = 'x'\n")
    assert {(fault.key, fault.line, fault.did_you_mean) for fault in result.errors} == {
        ("node.regoin", 2, "region"),
        ("nod", 3, "node"),
        ("apps[0].comand", 6, "command"),
    }


def test_a_file_that_is_not_toml_is_one_fault_with_its_line(node: Node) -> None:
    result = node.load('[node]\nname = "x\n')
    assert (result.config, result.draft) == (None, None)
    (fault,) = result.errors
    assert fault.line == 2
    assert "not valid TOML" in fault.expectation


def test_a_file_that_is_not_there_or_not_text_is_one_fault(node: Node) -> None:
    assert "No such file" in load(node.folder / "none.toml").errors[0].expectation
    (node.folder / "config.toml").write_bytes(b"[node]\n\nname = '\xff'\n")
    (fault,) = load(node.folder / "config.toml").errors
    assert (fault.line, fault.expectation) == (3, "is not UTF-8 text")


def test_values_of_environments_are_not_repeated_in_faults(node: Node) -> None:
    (fault,) = node.load(APP + '[apps.env]\nFLY_TOKEN = "hush-hush"\n').errors
    assert (fault.line, fault.source_line) == (4, None)
    (other,) = node.load(APP + '[apps.env]\nTOKENS = ["hush-hush"]\n').errors
    assert "hush" not in str(fault) + str(other)


def test_a_fault_reads_as_one_line(node: Node) -> None:
    (fault,) = node.load(APP + 'cwd = "a\\u001bb"\n').errors
    path = node.folder / "config.toml"
    assert str(fault) == f'{path}:3: apps[0].cwd: "a\\u001bb": expected a folder: there is no {node.folder}/a b'
    (missing,) = load(node.folder / "none.toml").errors
    assert str(missing) == f"{node.folder}/none.toml: cannot be read: No such file or directory"


def test_a_driver_that_is_not_there_yet_is_refused(node: Node) -> None:
    assert "not in this version" in node.errors(APP + 'driver = "docker"')["apps[0].driver"]
    assert "apps[0].driver" in node.errors(APP + 'driver = "proces"')


def test_a_folder_that_is_not_there_is_refused(node: Node) -> None:
    assert node.errors(APP + 'cwd = "nowhere"').keys() == {"apps[0].cwd"}


# --- machines that exist already


def test_a_static_app_needs_no_fly_toml(node: Node) -> None:
    (app,) = node.good(STATIC).apps
    assert (app.name, app.driver) == ("old", "static")
    (machine,) = app.machines
    assert machine.endpoints(app.services) == (Endpoint(9000, "10.0.0.5", 9000),)
    assert [port.start for port in app.services[0].ports] == [80, 443]
    assert app.groups[0].count == 1


def test_a_static_app_needs_machines_with_id_and_address(node: Node) -> None:
    assert node.errors(APP + 'driver = "static"').keys() == {"apps[0].machines"}
    text = APP + 'driver = "static"\n[[apps.machines]]\naddress = "host"\n'
    assert node.errors(text).keys() == {"apps[0].machines[0].id", "apps[0].machines[0].address"}


def test_machines_are_only_for_the_static_driver(node: Node) -> None:
    text = APP + '[[apps.machines]]\nid = "a"\naddress = "127.0.0.1:1"\n'
    assert node.errors(text).keys() == {"apps[0].machines"}


# --- which machine, who may ask, and what wakes

EVERYTHING = """\
balance = "peak-ewma"
sticky = { name = "s", ttl = "1h" }
queue_timeout = "2s"
max_queued = 7
organization = "acme"
replay_sources = ["personal", "other", "other"]
keep_bodies = true
replay_memory = 2048
replay_spool = 4096
restart_on_failing_checks = "90s"
autostop_interval = "1m"
autostop_at_once = 3
busy = "/busy?now"
warm_hours = ["mon-fri 08:00-18:00 Europe/Amsterdam", "sat,sun 22:00-02:00"]
[apps.access]
allow = ["192.0.2.0/24", "2001:db8::1"]
deny = ["198.51.100.0/24"]
requests_per_second = 2.5
requests_burst = 9
connections = 3
handshakes_per_second = 4
max_body = 1000
[apps.wake_rules]
ignore_paths = ["/wp-*", "*.php"]
ignore_methods = ["head"]
ignore_agents = ["bot"]
ignore_sources = ["203.0.113.0/24"]
starts_per_source = 0.5
starts = 4
waiting_page = true
"""


def test_every_setting_of_an_app_reaches_its_plan(node: Node) -> None:
    (app,) = plan_of(node.good(APP + EVERYTHING)).apps
    assert (app.balance, app.sticky) == (Balance.PEAK_EWMA, StickyCookie("s", 3600.0))
    assert app.limits == AppLimits(queue_timeout_s=2.0, max_queued=7, replay_memory_bytes=2048, replay_spool_bytes=4096)
    assert (app.organization, app.replay_sources, app.keeps_bodies) == ("acme", ("personal", "other"), True)
    assert (app.restart_on_checks, app.autostop_interval_s, app.autostop_at_once) == (90.0, 60.0, 3)
    assert (app.busy, [hours.zone for hours in app.warm_hours]) == ("/busy?now", ["Europe/Amsterdam", "UTC"])
    assert app.access == AccessRules(
        ("192.0.2.0/24", "2001:db8::1"), ("198.51.100.0/24",), 2.5, 9, connections=3, handshakes_per_s=4.0,
        max_body_bytes=1000,
    )  # fmt: skip
    assert app.wake_rules == WakeRules(
        ("/wp-*", "*.php"), ("HEAD",), ("bot",), ("203.0.113.0/24",), 0.5, 4.0, waiting_page=True
    )


def test_a_plan_with_every_setting_comes_back_as_it_was_kept(node: Node) -> None:
    made = plan_of(node.good(APP + EVERYTHING))
    keep_plan(str(node.folder / "plan"), made)
    assert kept_plan(str(node.folder / "plan")) == made


def test_without_settings_an_app_is_open_and_balanced_as_fly_does(node: Node) -> None:
    (app,) = plan_of(node.good(APP)).apps
    assert app.balance is Balance.FLY and app.sticky is None
    assert app.access.is_open and app.wake_rules == WakeRules() and app.limits == AppLimits()


def test_sticky_is_a_flag_or_a_table(node: Node) -> None:
    assert node.app("sticky = true").sticky == StickyCookie()
    assert node.app("sticky = {}").sticky == StickyCookie()
    assert node.app("sticky = false").sticky is None
    assert node.app('sticky = { ttl = "1m" }').sticky == StickyCookie(ttl_s=60.0)
    assert node.errors(APP + 'sticky = "yes"').keys() == {"apps[0].sticky"}


@pytest.mark.parametrize(
    "line", ['balance = "fastest"', "queue_timeout = -1", "max_queued = -1", 'organization = "A B"',
             'replay_sources = ["a/b"]', "keep_bodies = 1", "replay_memory = -1", "replay_spool = 0.5",
             'sticky.name = "a=b"', 'sticky.ttl = "0"', "sticky.tll = 1", "autostop_at_once = 0",
             'autostop_interval = "0"', 'busy = "busy"', 'busy = "/a b"', 'restart_on_failing_checks = "soon"',
             'access.allow = ["10.0.0.1/8"]', 'access.deny = ["host"]', "access.requests_per_second = -1",
             "access.connections = 0", "access.requests_burst = 0", "access.max_body = -1", "access.alow = []",
             'wake_rules.ignore_paths = ["wp"]', 'wake_rules.ignore_methods = ["A B"]',
             'wake_rules.ignore_agents = [""]', 'wake_rules.ignore_sources = ["x"]', "wake_rules.starts = true",
             "wake_rules.waiting_page = 1", 'warm_hours = ["weekdays"]', 'warm_hours = ["mon 8:00-9:00 Mars/Base"]'],
)  # fmt: skip
def test_a_wrong_setting_of_an_app_is_refused_at_its_key(node: Node, line: str) -> None:
    assert node.errors(APP + line).keys() == {f"apps[0].{line.split(' ')[0]}"}


def test_all_faults_of_settings_come_at_once(node: Node) -> None:
    found = node.errors(APP + 'balance = "x"\nbusy = "x"\naccess = { deny = ["x"] }\nwake_rules = { starts = "x" }\n')
    assert found.keys() == {
        "apps[0].balance", "apps[0].busy", "apps[0].access.deny", "apps[0].wake_rules.starts"
    }  # fmt: skip


def test_a_zone_misspelt_comes_with_the_likely_one(node: Node) -> None:
    (fault,) = node.load(APP + 'warm_hours = ["daily 8:00-9:00 Europe/Amsterdm"]').errors
    assert fault.did_you_mean == "Europe/Amsterdam"


def test_networks_of_a_file_are_allowed_too(node: Node) -> None:
    (node.folder / "cdn.txt").write_text("# the CDN\n192.0.2.0/24\n\n2001:db8::/32 # and this\n")
    app = node.app('access = { allow = ["10.0.0.0/8"], allow_from_file = "cdn.txt" }')
    assert app.access.allow == ("10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32")


def test_faults_of_a_list_of_networks_come_with_its_own_file_and_lines(node: Node) -> None:
    (node.folder / "cdn.txt").write_text("192.0.2.0/24\nnone\n10.0.0.1/8\n")
    faults = node.load(APP + 'access.allow_from_file = "cdn.txt"').errors
    assert [(fault.file, fault.line, fault.source_line) for fault in faults] == [
        (str(node.folder / "cdn.txt"), 2, "none"),
        (str(node.folder / "cdn.txt"), 3, "10.0.0.1/8"),
    ]


def test_a_list_of_networks_that_would_let_everyone_in_is_refused(node: Node) -> None:
    key = "apps[0].access.allow_from_file"
    line = APP + 'access.allow_from_file = "cdn.txt"'
    assert "No such file" in node.errors(line)[key]
    (node.folder / "cdn.txt").write_text("# nothing left\n")
    assert "everyone would be let in" in node.errors(line)[key]
    (node.folder / "cdn.txt").write_bytes(b"\xff")
    assert "not UTF-8" in node.errors(line)[key]
    (node.folder / "cdn.txt").write_text("\n" * (1 << 20) + "\n")
    assert "1 MB" in node.errors(line)[key]


AUTOSTOP = 'app = "shop"\n[http_service]\nauto_stop_machines = "stop"\n'


def test_what_only_matters_where_machines_stop_is_a_warning_elsewhere(node: Node) -> None:
    lines = 'busy = "/busy"\nwarm_hours = ["daily 8:00-9:00"]\nautostop_interval = "1m"\nautostop_at_once = 2\n'
    keys = {"apps[0].busy", "apps[0].warm_hours", "apps[0].autostop_interval", "apps[0].autostop_at_once"}
    assert keys <= node.warnings(APP + lines).keys()
    node.fly(AUTOSTOP)
    assert not keys & node.warnings(APP + 'command = "python3"\n' + lines).keys()


def test_what_only_matters_between_machines_is_a_warning_for_one(node: Node) -> None:
    lines = 'sticky = true\nbalance = "least-loaded"\n'
    keys = {"apps[0].sticky", "apps[0].balance"}
    assert keys <= node.warnings(APP + lines).keys()
    assert not keys & node.warnings(APP + "count = 2\n" + lines).keys()
    assert keys <= node.warnings(APP + "count = { web = 1, worker = 5 }\n" + lines).keys()


def test_a_restart_for_checks_that_are_not_there_is_a_warning(node: Node) -> None:
    line = APP + 'restart_on_failing_checks = "1m"\n'
    assert "apps[0].restart_on_failing_checks" in node.warnings(line)
    node.fly(FLY.replace("[[mounts]]", '[[http_service.checks]]\npath = "/"\n[[mounts]]'))
    assert "apps[0].restart_on_failing_checks" not in node.warnings(line)


def test_rules_that_no_request_can_pass_are_a_warning(node: Node) -> None:
    found = node.warnings(APP + "access = { requests_per_second = 0, handshakes_per_second = 0.0 }\n")
    assert {"apps[0].access.requests_per_second", "apps[0].access.handshakes_per_second"} <= found.keys()
    assert "apps[0].wake_rules.starts" in node.warnings(APP + "wake_rules.starts = 0\n")
    assert "apps[0].access.requests_burst" in node.warnings(APP + "access.requests_burst = 5\n")
    assert "apps[0].keep_bodies" in node.warnings(APP + "keep_bodies = true\nreplay_spool = 0\n")


@pytest.mark.parametrize(
    ("allow", "deny", "is_told"),
    [("10.1.0.0/16", "10.0.0.0/8", True), ("10.0.0.0/8", "10.0.0.0/16", False), ("10.0.0.1", "10.0.0.1", True),
     ("2001:db8::/48", "2001:db8::/32", True), ("10.0.0.0/8", "::/0", False)],
)  # fmt: skip
def test_an_allowed_network_that_is_denied_whole_is_a_warning(node: Node, allow: str, deny: str, is_told: bool) -> None:
    found = node.warnings(APP + f'access = {{ allow = ["{allow}"], deny = ["{deny}"] }}\n')
    assert ("apps[0].access.deny" in found) == is_told


def test_rules_that_a_client_hello_does_not_know_of_ask_for_whole_requests(node: Node) -> None:
    key = "apps[0].wake_rules.ignore_paths"
    assert key in node.warnings(APP + 'wake_rules.ignore_paths = ["/wp-*"]\n')
    assert key not in node.warnings(APP + 'wake_on = "request"\nwake_rules.ignore_paths = ["/wp-*"]\n')
    assert "apps[0].wake_rules" in node.warnings(STATIC.replace("[[apps.m", "wake_rules.starts = 1\n[[apps.m"))


# --- warnings


def test_a_public_port_that_is_not_bound_says_which_line_to_add(node: Node) -> None:
    warnings = node.warnings('[listen]\n80 = ["127.0.0.1:8080"]\n' + APP)
    assert '"443" = ["127.0.0.1:8443"]' in warnings["listen.443"]
    assert "shop" in warnings["listen.443"]
    assert "listen.80" not in warnings


def test_several_machines_on_one_fixed_port_are_a_warning(node: Node) -> None:
    fixed = 'command = { web = "python3 web.py" }\n'
    assert "apps[0].count" in node.warnings(APP + "count = 2\n" + fixed)
    assert "apps[0].count" not in node.warnings(APP + "count = 2\n")
    assert "apps[0].count" not in node.warnings(APP + 'count = 2\nnetwork = "namespace"\n' + fixed)
    assert "apps[0].count" not in node.warnings(APP + 'count = 2\ncommand = ["sh", "-c", "serve $PORT"]\n')
    assert "apps[0].count" not in node.warnings(APP + fixed)


def test_a_command_that_names_the_internal_port_is_a_warning(node: Node) -> None:
    web = 'command = {{ web = "python3 web.py --bind 0.0.0.0:{}" }}\n'
    assert "8080" in node.warnings(APP + web.format(8080))["apps[0].command"]
    assert "apps[0].command" not in node.warnings(APP + web.format(80801))
    assert "apps[0].command" not in node.warnings(APP + web.format("{port}"))
    assert "apps[0].command" not in node.warnings(APP + web.format(8080) + 'network = "namespace"\n')
    assert "apps[0].command" not in node.warnings(APP + web.format(8080) + "count = 0\n")


def test_a_port_of_no_service_in_the_command_is_a_warning(node: Node) -> None:
    web = 'command = {{ web = "python3 web.py {{port:{}}}" }}\n'
    assert "9999" in node.warnings(APP + web.format(9999))["apps[0].command"]
    assert "apps[0].command" not in node.warnings(APP + web.format(8080))


def test_machines_that_run_as_root_are_a_warning(node: Node) -> None:
    assert "apps[0].user" in node.warnings(APP, ROOT_USER)
    assert "apps[0].user" in node.warnings(APP + 'user = "root"', ROOT_USER)
    assert "apps[0].user" not in node.warnings(APP + 'user = "nobody"', ROOT_USER)


def test_machines_that_own_the_nodes_keys_are_a_warning(node: Node) -> None:
    assert "node.data_dir" in node.warnings(APP)
    assert "node.data_dir" not in node.warnings(STATIC)


def test_another_user_is_for_root_only(node: Node) -> None:
    assert "apps[0].user" in node.warnings(APP + 'user = "nobody"')
    assert "apps[0].user" in node.errors(APP + 'user = "no body"')


@pytest.mark.parametrize("command", ['"a/\\u0000"', '["a", "\\u0000"]', '""', "[]", '"a \'b"', "5"])
def test_what_cannot_be_run_is_no_command(node: Node, command: str) -> None:
    node.fly('app = "shop"\n[http_service]')
    assert node.errors(APP + f"command = {command}").keys() == {"apps[0].command"}


def test_a_program_that_is_not_there_is_a_warning(node: Node) -> None:
    node.fly('app = "shop"\n[http_service]')
    assert "apps[0].command" in node.warnings(APP + 'command = "./server"')
    server = node.folder / "shop" / "server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    assert "apps[0].command" not in node.warnings(APP + 'command = "./server"')


# --- the example


def test_the_example_loads_and_shows_every_key_with_its_default() -> None:
    path = ROOT / "config.example.toml"
    result = load(path, NOBODY)
    assert result.config is not None, [str(fault) for fault in result.errors]
    assert {fault.key for fault in result.warnings} <= {"node.data_dir"}, result.warnings
    shown = tomli.loads(path.read_text())
    plain = load_text("", path.parent)
    for section in ("node", "limits", "log", "certs"):
        expected, found = getattr(plain, section), getattr(result.config, section)
        skipped = {"name"} if section == "node" else set()
        for field in dataclasses.fields(expected):
            if field.name not in skipped:
                assert getattr(found, field.name) == getattr(expected, field.name), f"{section}.{field.name}"
    assert result.config.listen == plain.listen
    assert set(shown["limits"]) == set(config_module._fields(config_module.LimitsSection))
    assert set(shown["node"]) == set(config_module._fields(config_module.NodeSection))
    hidden = {"user", "machines", "autostop_interval", "busy", "on_demand"}  # have no default that could be written
    assert set(shown["apps"][0]) | hidden == set(config_module._APP_KEYS)
    commented = set(re.findall(r"[a-z_]+", path.read_text()))
    assert {"acme_directory", "acme_email", "acme_ca_file", "backhaul", "dns", "latitude"} | hidden <= commented
    assert {*config_module._ACCESS_KEYS, *config_module._WAKE_KEYS} <= commented
    fleet = {*config_module._PEER_KEYS, *config_module._fields(ClusterSection), "latitude", "longitude"}
    assert fleet <= commented, fleet - commented


def test_the_examples_app_shows_the_defaults_of_an_app(node: Node) -> None:
    example = load(ROOT / "config.example.toml", NOBODY).config
    assert example is not None
    default = node.app()
    for name in (
        "wake_on", "wake_timeout_s", "idle_timeout_s", "limits", "network", "driver", "user", "balance", "sticky",
        "access", "wake_rules", "organization", "replay_sources", "keep_bodies", "autostop_interval_s",
        "autostop_at_once", "busy", "warm_hours", "restart_on_failing_checks_s", "wake",
    ):  # fmt: skip
        assert getattr(example.apps[0], name) == getattr(default, name), name


def load_text(text: str, folder: Path) -> NodeConfig:
    """What a config.toml of this text would come to in `folder`, where no file is written."""
    source = config_module.Source(str(folder / "config.toml"), text, tomli.loads(text))
    assert source.document is not None
    return config_module._ConfigReader(source, source.document, NOBODY).read()


# --- whatever comes

_names = st.sampled_from(
    [*config_module._SECTIONS, *config_module._APP_KEYS, *config_module._ACCESS_KEYS, *config_module._WAKE_KEYS,
     *config_module._fields(ClusterSection), "80", "443", "admin", "backhaul", "latitude",
     "id", "address", "web", "issuer",
     "region", "domain", "data_dir", "workers", "access", "urls", "name"]
)  # fmt: skip
_scalars = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(),
    st.sampled_from(["127.0.0.1:80", "10.0.0.0/8", "mon 1:00-2:00 Mars"]),
    st.sampled_from(["shop/fly.toml", "static", "process", "a.b", "1m", "x y", "\0", "é", "/", "~"]),
)  # fmt: skip
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=6), max_leaves=25
)


@pytest.mark.slow
@given(st.dictionaries(_names, _values, max_size=6))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_document_makes_loading_raise(document: dict[str, Any]) -> None:
    source = config_module.Source("/nowhere/config.toml", "", document)
    config_module._ConfigReader(source, document, NOBODY).read()
    for fault in source.placed():
        assert fault.expectation
        assert str(fault).isprintable()


# --- the documentation


def test_the_configuration_page_names_every_key() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    words = set(re.findall(r"[a-z_]+", page))
    own = {*config_module._fields(config_module.NodeSection), *config_module._fields(config_module.LimitsSection)}
    own |= {*config_module._APP_KEYS, *config_module._SECTIONS, "issuer", "access", "format", "admin", "id", "address"}
    own |= {*config_module._ACCESS_KEYS, *config_module._WAKE_KEYS}
    own |= {*config_module._PEER_KEYS, *config_module._fields(config_module.ClusterSection), "latitude", "longitude"}
    assert own <= words, own - words
    used = {key.split(".")[-1] for key, reason in KEYS.items() if reason == USED and "*" not in key}
    assert used - {"name", "command", "retries", "policy"} <= words, used - words
