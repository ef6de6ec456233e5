"""fly.toml as it is found in the field: every shape has a sample in tests/data/fly-toml with its golden reading.

`WAKEFRONT_UPDATE_GOLDENS=1 pytest tests/wire/test_fly_toml.py` writes the goldens anew; read the difference before
committing it. `WAKEFRONT_FLY_TOML_CORPUS` names a folder of real files to try beside.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.cli.check import report_fly_toml
from proxy.decide.replay_key import split_pattern
from proxy.model import Autostop, ConcurrencyType, ReplayCacheRule, RestartPolicy
from proxy.wire.fly_keys import ALIASES, KEYS, RAW_PORT, UDP_SERVICE, KeyClass, classify_keys
from proxy.wire.fly_toml import FlyToml, FlyTomlResult, read_fly_toml
from proxy.wire.toml_table import Severity, render_path

SAMPLES = Path(__file__).parent.parent / "data" / "fly-toml"


def read(text: str) -> FlyTomlResult:
    return read_fly_toml(tomli.loads(text))


def valid(text: str) -> FlyToml:
    result = read(text)
    assert result.is_valid, [str(fault) for fault in result.faults]
    return result.app


def faults(text: str) -> dict[str, str]:
    return {fault.key: fault.expectation for fault in read(text).faults}


def errors(text: str) -> set[str]:
    return {fault.key for fault in read(text).faults if fault.severity is Severity.ERROR}


# --- goldens


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_each_shape_reads_as_its_golden_says(sample: Path) -> None:
    found = report_fly_toml(sample)
    found["file"] = sample.name
    for fault in found["faults"]:
        fault["file"] = sample.name
    golden = sample.with_suffix(".json")
    if os.environ.get("WAKEFRONT_UPDATE_GOLDENS"):
        golden.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert found == json.loads(golden.read_text())


def test_there_are_goldens_for_at_least_thirty_shapes() -> None:
    assert len(list(SAMPLES.glob("*.toml"))) >= 30


# --- real files


def corpus() -> Path:
    folder = os.environ.get("WAKEFRONT_FLY_TOML_CORPUS")
    if not folder:
        pytest.skip("WAKEFRONT_FLY_TOML_CORPUS names no folder of real fly.toml files")
    return Path(folder)


def test_every_valid_file_of_the_corpus_loads() -> None:
    files = sorted(corpus().glob("*.toml"))
    assert files
    wrong = {path.name: report["faults"] for path in files if not (report := report_fly_toml(path))["ok"]}
    assert not wrong


def test_every_invalid_file_of_the_corpus_has_faults_with_lines() -> None:
    files = sorted((corpus() / "invalid").glob("*.toml"))
    assert files
    for path in files:
        report = report_fly_toml(path)
        assert not report["ok"], path.name
        assert all(fault["line"] for fault in report["faults"]), path.name


# --- services


def test_http_service_stands_before_the_services_with_both_its_ports() -> None:
    app = valid('[http_service]\nforce_https = true\n[[services]]\n[[services.ports]]\nport = 9000\nhandlers=["http"]')
    first, second = app.services
    assert [(port.start, port.handlers, port.force_https) for port in first.ports] == [
        (80, ("http",), True),
        (443, ("http", "tls"), False),
    ]
    assert first.internal_port == 8080
    assert second.ports[0].start == 9000


def test_tls_options_of_http_service_are_those_of_its_tls_port_only() -> None:
    app = valid('[http_service.tls_options]\nversions = ["TLSv1.3"]\n[http_service.http_options]\nidle_timeout = 7')
    plain, tls = app.services[0].ports
    assert (plain.tls_versions, tls.tls_versions) == ((), ("TLSv1.3",))
    assert (plain.idle_timeout_s, tls.idle_timeout_s) == (7, 7)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("true", "stop"), ("false", "off"), ('"off"', "off"), ('"stop"', "stop"), ('"suspend"', "suspend")],
)
def test_autostop_is_a_boolean_or_a_word(written: str, meant: str) -> None:
    assert valid(f"[http_service]\nauto_stop_machines = {written}").services[0].autostop is Autostop(meant)


def test_autostart_is_on_unless_the_file_says_otherwise() -> None:
    assert valid("[http_service]").services[0].autostart
    assert not valid("[http_service]\nauto_start_machines = false").services[0].autostart


def test_machines_that_stop_and_never_start_are_a_warning() -> None:
    text = '[http_service]\nauto_stop_machines = "stop"\nauto_start_machines = false'
    assert faults(text).keys() == {"http_service.auto_start_machines"}
    assert faults(text.replace("stop", "off", 2).replace("auto_off", "auto_stop")) == {}


def test_old_concurrency_counts_requests() -> None:
    service = valid('[[services]]\nconcurrency = "20, 25"').services[0]
    assert (service.concurrency_type, service.soft_limit, service.hard_limit) == (ConcurrencyType.REQUESTS, 20, 25)


def test_soft_limit_is_twenty_but_never_above_a_lone_hard_limit() -> None:
    assert valid("[http_service]").services[0].soft_limit == 20
    assert valid("[http_service.concurrency]\nhard_limit = 5").services[0].soft_limit == 5


def test_unknown_concurrency_type_is_a_warning_and_counts_connections() -> None:
    text = '[http_service.concurrency]\ntype = "donuts"'
    assert valid(text).services[0].concurrency_type is ConcurrencyType.CONNECTIONS
    assert "http_service.concurrency.type" in faults(text)


def test_a_port_and_a_range_in_one_section_are_both_served() -> None:
    app = valid('[[services]]\n[[services.ports]]\nport = 80\nstart_port = 100\nend_port = 200\nhandlers = ["http"]')
    assert [(port.start, port.end) for port in app.services[0].ports] == [(80, 80), (100, 200)]


def test_missing_ends_of_a_range_reach_to_the_first_and_last_port() -> None:
    app = valid("[[services]]\n[[services.ports]]\nend_port = 9\n[[services.ports]]\nstart_port = 65000")
    assert [(port.start, port.end) for port in app.services[0].ports] == [(1, 9), (65000, 65535)]


def test_a_public_port_given_twice_names_the_first_owner() -> None:
    found = read('[http_service]\n[[services]]\n[[services.ports]]\nport = "443"\nhandlers = ["tls"]')
    assert found.is_valid
    assert [fault.key for fault in found.faults] == ["services[0].ports[0].port"]
    assert "http_service" in found.faults[0].expectation


def test_a_range_that_covers_an_earlier_port_collides() -> None:
    text = "[[services]]\n[[services.ports]]\nport = 50\n[[services.ports]]\nstart_port = 40\nend_port = 60"
    assert "services[0].ports[1].port" in faults(text)


def test_tcp_and_udp_may_share_a_port() -> None:
    text = "[[services]]\ninternal_port = 53\nprotocol = '{}'\n[[services.ports]]\nport = 53\n"
    assert faults(text.format("tcp") + text.format("udp")) == {}


def test_force_https_without_the_http_handler_is_ignored_with_a_warning() -> None:
    text = '[[services]]\n[[services.ports]]\nport = 443\nhandlers = ["tls"]\nforce_https = true'
    assert not valid(text).services[0].ports[0].force_https
    assert "services[0].ports[0].force_https" in faults(text)


def test_response_header_that_would_split_the_answer_is_refused() -> None:
    assert errors('[http_service.http_options.response.headers]\nX = "a\\r\\nY: b"') == {
        "http_service.http_options.response.headers.X"
    }


def test_response_headers_are_removed_set_or_set_many_times() -> None:
    app = valid('[http_service.http_options.response.headers]\nA = false\nB = "x"\nC = ["y", "z"]')
    assert app.services[0].ports[0].response_headers == (("A", None), ("B", ("x",)), ("C", ("y", "z")))


# --- process groups


def cache_rules(**changes: object) -> tuple[ReplayCacheRule, ...]:
    keys = {"path_prefix": "/", "ttl_seconds": 60, "type": "cookie", "name": "session"} | changes
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items() if value is not None)
    return valid(f"[[http_service.http_options.replay_cache]]\n{lines}").services[0].ports[0].replay_cache


def test_replay_caches_reach_the_ports_of_their_service() -> None:
    assert cache_rules() == (ReplayCacheRule("/", 60, "cookie", "session"),)
    assert cache_rules(path_prefix="a.example/b/*", type="header", allow_bypass=True) == (
        ReplayCacheRule("a.example/b/*", 60, "header", "session", True),
    )
    two = "[[services]]\n[[services.ports]]\nport = 80\nhandlers = ['http']\n" + (
        "[[services.ports.http_options.replay_cache]]\npath_prefix = '/{}'\nttl_seconds = 10\ntype = 'cookie'\n"
        "name = 'n'\n"
    )
    (port,) = valid(two.format("a") + two.partition("['http']\n")[2].format("b")).services[0].ports
    assert [rule.path_prefix for rule in port.replay_cache] == ["/a", "/b"]


def test_a_replay_cache_keeps_for_ten_seconds_at_least() -> None:
    assert cache_rules(ttl_seconds=3)[0].ttl_s == cache_rules(ttl_seconds=None)[0].ttl_s == 10
    cache = "[[http_service.http_options.replay_cache]]\nttl_seconds = 3"
    assert "10 is taken" in faults(cache)["http_service.http_options.replay_cache[0].ttl_seconds"]


@pytest.mark.parametrize("key", ["path_prefix", "type", "name"])
def test_a_replay_cache_that_lacks_something_is_left_out_with_a_warning(key: str) -> None:
    assert cache_rules(**{key: None}) == ()
    cache = "[[http_service.http_options.replay_cache]]\nttl_seconds = 30"
    assert f"http_service.http_options.replay_cache[0].{key}" in faults(cache)


@pytest.mark.parametrize(
    "prefix", ["", "a", "host", "/a?b", "/a#b", "//a", "/a//b", "/*/b", "/a*", "/é", "a b/", "h:80/"]
)
def test_what_is_no_path_prefix_is_left_out(prefix: str) -> None:
    assert cache_rules(path_prefix=prefix) == ()


@pytest.mark.parametrize(
    "prefix", ["/", "/*", "/a", "/a/", "/a/*", "/a/b", "h.example/", "h.example/a-b/c.d", "/%61@b"]
)
def test_a_path_prefix_that_is_taken_is_one_that_the_cache_reads(prefix: str) -> None:
    assert cache_rules(path_prefix=prefix)[0].path_prefix == prefix
    assert split_pattern(prefix.encode()) is not None


def test_a_soft_limit_above_the_hard_limit_is_a_warning_in_both_forms() -> None:
    assert (
        "hard limit 5"
        in faults("[http_service.concurrency]\nsoft_limit = 6\nhard_limit = 5")["http_service.concurrency.soft_limit"]
    )
    assert "hard limit 5" in faults("[[services]]\ninternal_port = 80\nconcurrency = '6,5'")["services[0].concurrency"]


def test_the_kind_of_a_services_check_is_said_by_its_section() -> None:
    text = "[[http_service.checks]]\ntype = 'http'\npath = '/'\n[checks.a]\ntype = 'tcp'\nport = 1"
    uses = {key.key: key.use for key in classify_keys(tomli.loads(text))}
    assert uses["http_service.checks[0].type"] is KeyClass.KEPT
    assert {uses["http_service.checks[0].path"], uses["checks.a.type"], uses["checks.a.port"]} == {KeyClass.USED}


def test_the_default_group_is_app_else_the_first_by_name() -> None:
    assert valid("").default_group == "app"
    assert valid('[processes]\nzoo = "z"\napp = "a"').default_group == "app"
    assert valid('[processes]\nzoo = "z"\nbar = "b"').default_group == "bar"


def test_items_without_groups_belong_to_the_default_group_only() -> None:
    app = valid(
        '[processes]\nweb = "w"\nbot = "b"\n[mounts]\nsource = "d"\ndestination = "/d"\n[[restart]]\npolicy = "always"'
    )
    assert app.mounts[0].processes == ("bot",)
    assert app.restart("bot").policy is RestartPolicy.ALWAYS
    assert app.restart("web").policy is RestartPolicy.ON_FAILURE


def test_a_service_without_groups_is_refused_where_there_are_groups() -> None:
    assert errors('[processes]\nweb = "w"\n[[services]]') == {"services[0].processes"}


def test_a_group_that_is_not_there_comes_with_the_likely_one() -> None:
    found = read('[processes]\nworker = "w"\n[mounts]\nsource = "d"\ndestination = "/d"\nprocesses = ["worked"]')
    assert [fault.did_you_mean for fault in found.faults] == ["worker"]


def test_entrypoint_comes_before_the_groups_command_and_exec_replaces_all() -> None:
    app = valid('[processes]\nweb = "run it"\n[experimental]\nentrypoint = "tini --"\ncmd = "other"')
    assert app.argv("web") == ("tini", "--", "run", "it")
    assert valid('[experimental]\nexec = "all"\ncmd = "other"').argv("app") == ("all",)
    assert valid("").argv("app") == ()


def test_memory_of_a_group_comes_from_its_own_size_first() -> None:
    app = valid(
        '[processes]\na = "a"\nb = "b"\n[[vm]]\nsize = "shared-cpu-2x"\n[[vm]]\nmemory = "2gb"\nprocesses = ["b"]'
    )
    assert (app.memory_mb("a"), app.memory_mb("b"), valid("").memory_mb("app")) == (512, 2048, 256)


# --- values


@pytest.mark.parametrize(
    ("written", "seconds"), [("7", 7.0), ('"7s"', 7.0), ('"1m30s"', 90.0), ('"7"', 7.0), ('""', 5.0), ("900", 300.0)]
)
def test_kill_timeout_is_seconds_or_a_duration_and_at_most_five_minutes(written: str, seconds: float) -> None:
    assert valid(f"kill_timeout = {written}").kill_timeout_s == seconds


def test_check_times_are_held_to_flys_limits() -> None:
    text = "[[http_service.checks]]\ninterval = {}\ntimeout = {}"
    slow = valid(text.format('"2m"', 90_000)).services[0].checks[0]
    fast = valid(text.format(10, '"1ms"')).services[0].checks[0]
    assert (slow.interval_s, slow.timeout_s) == (60.0, 60.0)
    assert (fast.interval_s, fast.timeout_s) == (1.0, 1.0)


def test_names_that_the_platform_sets_are_refused_in_env() -> None:
    assert errors('[env]\nFLY_REGION = "x"\nA = "y"') == {"env.FLY_REGION"}


def test_all_faults_come_at_once() -> None:
    text = (SAMPLES / "wrong-types.toml").read_text()
    assert len(errors(text)) >= 18


@pytest.mark.parametrize("source", ["../up", "a/b", "", ".", "..", ".hidden", "nul\\u0000"])
def test_a_volume_name_never_leads_out_of_its_folder(source: str) -> None:
    text = f'[mounts]\nsource = "{source}"\ndestination = "/data"'
    assert errors(text) == {"mounts.source"}
    assert read(text).app.mounts == ()


@pytest.mark.parametrize("destination", ["/", "", "//", "/.", "/a/../..", ".."])
def test_a_mount_is_never_over_the_root(destination: str) -> None:
    assert errors(f'[mounts]\nsource = "d"\ndestination = "{destination}"') == {"mounts.destination"}


def test_a_relative_destination_counts_from_the_root() -> None:
    text = '[mounts]\nsource = "d"\ndestination = "var//lib/./d/"'
    assert valid(text).mounts[0].destination == "/var/lib/d"
    assert "mounts.destination" in faults(text)


# --- the fate of keys


def test_an_unknown_key_is_a_warning_with_the_likely_one() -> None:
    found = read("[http_service]\nmin_machine_running = 1")
    assert found.is_valid
    assert [(fault.key, fault.did_you_mean) for fault in found.faults] == [
        ("http_service.min_machine_running", "min_machines_running")
    ]


def test_keys_of_a_port_have_no_effect_without_the_http_handler() -> None:
    keys = classify_keys(
        tomli.loads('[[services]]\n[[services.ports]]\nport = 22\n[[services.ports]]\nhandlers="http"')
    )
    assert [(key.key, key.use, key.reason) for key in keys] == [
        ("services[0].ports[0].port", KeyClass.KEPT, RAW_PORT),
        ("services[0].ports[1].handlers", KeyClass.USED, ""),
    ]


def test_keys_of_a_udp_service_have_no_effect() -> None:
    keys = classify_keys(tomli.loads('[[services]]\nprotocol = "udp"\ninternal_port = 53'))
    assert {key.reason for key in keys} == {UDP_SERVICE}


def test_an_empty_section_counts_as_its_keys_would() -> None:
    keys = classify_keys(tomli.loads("[build]\n[env]"))
    assert [(key.key, key.use) for key in keys] == [("build", KeyClass.KEPT), ("env", KeyClass.USED)]


def test_every_key_of_every_sample_has_a_fate() -> None:
    for sample in SAMPLES.glob("*.toml"):
        document = tomli.loads(sample.read_text())
        keys = {key.key for key in classify_keys(document)}
        for top in document:
            assert any(key == top or key.startswith((f"{top}.", f"{top}[")) for key in keys), (sample.name, top)


# --- whatever comes

_names = st.sampled_from(sorted({part for key in KEYS for part in key.split(".")} | set(ALIASES) | {"x y", ""}))
_scalars = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.dates(), st.times(), st.text(max_size=12),
    st.sampled_from(["1m", "80", "12,24", "app", "tcp", "../..", "http", "stop", "8gb", "'", "\0", "9" * 40]),
)  # fmt: skip
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names | st.text(max_size=6), inner, max_size=5),
    max_leaves=30,
)
_documents = st.dictionaries(_names, _values, max_size=8)


@pytest.mark.slow
@given(_documents)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_document_makes_the_reader_raise(document: dict[str, Any]) -> None:
    result = read_fly_toml(document)
    for fault in result.faults:
        assert fault.expectation
        assert render_path(fault.path)
        assert str(fault).isprintable()
    assert result.app.default_group in result.app.groups
    assert 0 <= result.app.kill_timeout_s <= 300
    for service in result.app.services:
        assert 1 <= service.internal_port <= 65535
        for port in service.ports:
            assert 1 <= port.start <= port.end <= 65535
