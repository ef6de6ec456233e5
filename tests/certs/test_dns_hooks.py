"""DNS-01 hooks against a real name server: dynamic updates with TSIG, and a script that does them with nsupdate."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import dns.message
import pytest

from certs.dns_hooks import DnsHook, ExecHook, Rfc2136Hook, challenge_name, wait_visible
from certs.errors import DnsHookError, LookupFailedError
from certs.resolver import Resolver
from tests.support.bind import Bind, needs_bind, zone
from tests.support.dns_script import Said, ScriptedDns, reply
from tests.support.dns_world import KEY, NS1, NS2, ROOT, TLD, resolver_of, world
from tests.support.processes import belonging_to, wait_for

NSUPDATE = shutil.which("nsupdate")
NAME = "_acme-challenge.dyn.test"
((KEY_NAME, SECRET),) = KEY.items()


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bind]:
    with world(tmp_path_factory.mktemp("dns")) as bind:
        yield bind


def script(folder: Path, text: str) -> str:
    file = folder / "hook.sh"
    file.write_text("#!/bin/sh\n" + text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def _nsupdate_hook(net: Bind, folder: Path) -> ExecHook:
    server, _, port = net.at(NS1).rpartition(":")
    text = f"""
case $1 in
present) line="update add $2. 60 TXT \\"$3\\"" ;;
cleanup) line="update delete $2. TXT \\"$3\\"" ;;
*) exit 2 ;;
esac
printf 'server {server} {port}\\nzone dyn.test\\n%s\\nsend\\n' "$line" | {NSUPDATE} -y hmac-sha256:{KEY_NAME}:{SECRET}
"""
    return ExecHook((script(folder, text),), 20)


@pytest.fixture(params=["rfc2136", "rfc2136 zone found", "exec"])
def hook(request: pytest.FixtureRequest, net: Bind, tmp_path: Path) -> DnsHook:
    if request.param == "exec":
        if NSUPDATE is None:
            pytest.skip("needs nsupdate (Debian: bind9-dnsutils)")
        return _nsupdate_hook(net, tmp_path)
    named = "dyn.test" if request.param == "rfc2136" else None
    return Rfc2136Hook(net.at(NS1), named, KEY_NAME, SECRET)


@needs_bind
def test_values_are_set_beside_one_another_and_removed_one_by_one(net: Bind, hook: DnsHook) -> None:
    resolver = resolver_of(net)
    hook.present(NAME, "for-the-apex")
    hook.present(NAME, "for-the-wildcard")
    hook.present(NAME, "for-the-wildcard")  # said twice is there once
    assert resolver.txt(NAME) == ("for-the-apex", "for-the-wildcard")
    assert resolver.is_visible(NAME, "for-the-apex") and resolver.is_visible(NAME, "for-the-wildcard")
    hook.clean_up(NAME, "for-the-apex")
    assert resolver.txt(NAME) == ("for-the-wildcard",)
    hook.clean_up(NAME, "for-the-wildcard")
    hook.clean_up(NAME, "for-the-wildcard")
    assert resolver.txt(NAME) == ()


# --- RFC 2136, refused


@needs_bind
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (NAME, ("dyn.test", "other-key", SECRET), "BADKEY: the server knows no key other-key"),
        (NAME, ("dyn.test", KEY_NAME, "d3Jvbmc="), "BADSIG: key update-key has another secret or algorithm there"),
        (NAME, ("dyn.test", KEY_NAME, SECRET, "hmac-sha512"), "BADKEY: the server knows no key update-key"),
        (NAME, ("dyn.test",), r"REFUSED: the server does not let us \(no key was used\) change this"),
        ("x.good.test", ("good.test", KEY_NAME, SECRET), "REFUSED: the server does not let us"),
        ("x.elsewhere.test", ("elsewhere.test", KEY_NAME, SECRET), "NOTAUTH: the server is not the primary"),
        ("x.good.test", ("dyn.test", KEY_NAME, SECRET), "x.good.test is not in the zone dyn.test"),
        ("a" * 64 + ".test", (None, KEY_NAME, SECRET), "is not a name in DNS"),
        ("x.unheard.example", (None, KEY_NAME, SECRET), "does not say which zone x.unheard.example is in"),
    ],
)  # fmt: skip
def test_a_refused_update_says_why(net: Bind, name: str, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(DnsHookError, match=message):
        Rfc2136Hook(net.at(NS1), *arguments).present(name, "value")


_UPDATE = """
import sys
from certs.dns_hooks import Rfc2136Hook
from certs.errors import DnsHookError
try:
    Rfc2136Hook(sys.argv[1], "dyn.test", sys.argv[2], sys.argv[3]).present("_acme-challenge.dyn.test", "value")
except DnsHookError as error:
    print(error)
"""


@needs_bind
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime")
def test_clocks_too_far_apart_are_named(net: Bind) -> None:
    command = ["faketime", "-f", "-1h", sys.executable, "-c", _UPDATE, net.at(NS1), KEY_NAME, SECRET]
    environment = {**os.environ, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": os.getcwd()}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "BADTIME: this machine's clock and the server's are too far apart" in said


def _drip(query: dns.message.Message, transport: str) -> Iterable[Said]:
    return [b"\x00", b"\x40", *[b"x"] * 100]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda query, transport: (), "the server ended the connection"),
        (_drip, "no answer within 0.5 s"),
        (lambda query, transport: [b"\x00\x04junk"], "the answer cannot be read"),
    ],
)
def test_a_server_that_does_not_answer_properly_is_given_up(answer: object, message: str) -> None:
    with ScriptedDns(answer, pause_s=0.1) as server:  # type: ignore[arg-type]  # one of those above
        began = time.monotonic()
        with pytest.raises(DnsHookError, match=message):
            Rfc2136Hook(server.at, "dyn.test", timeout_s=0.5).present(NAME, "value")
        assert time.monotonic() - began < 3


def test_nobody_there_is_told() -> None:
    with pytest.raises(DnsHookError, match="Connection refused"):
        Rfc2136Hook("127.0.0.1:1", "dyn.test").present(NAME, "value")


@pytest.mark.parametrize("arguments", [("ns.example.net",), ("192.0.2.1:53", "z", "key", "not base64!")])
def test_what_cannot_be_read_is_refused_at_once(arguments: tuple[str, ...]) -> None:
    with pytest.raises(DnsHookError) as caught:
        Rfc2136Hook(*arguments)
    assert "not base64" not in str(caught.value)


# --- commands


def test_a_command_gets_its_arguments_and_environment_unaltered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hook = ExecHook(
        (script(tmp_path, f'printf "%s\\n" "$@" "$WAKEFRONT_DNS_ACTION $WAKEFRONT_DNS_NAME" >{out}'), "first arg")
    )
    hook.present("_acme-challenge.x.test", "$(id); `id`")
    assert out.read_text().splitlines() == [
        "first arg", "present", "_acme-challenge.x.test", "$(id); `id`", "present _acme-challenge.x.test"
    ]  # fmt: skip
    hook.clean_up("_acme-challenge.x.test", "v")
    assert out.read_text().splitlines()[1] == "cleanup"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo no such zone >&2; exit 3", r"present x\.test: status 3; it wrote: 'no such zone'"),
        ("kill -9 $$", "ended by signal 9"),
        (r"printf 'a\033[31mb\nc'; exit 1", r"it wrote: 'a\\\\x1b\[31mb \| c'"),
    ],
)
def test_a_command_that_fails_says_how(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DnsHookError, match=message):
        ExecHook((script(tmp_path, text),), 10).present("x.test", "v")


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DnsHookError, match="cannot be started"):
        ExecHook((str(tmp_path / "none"),)).present("x.test", "v")


def test_a_flood_of_output_is_read_to_its_end_and_cut(tmp_path: Path) -> None:
    with pytest.raises(DnsHookError, match=r"the end'$") as caught:
        ExecHook(
            (script(tmp_path, "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo the end; exit 1"),), 30
        ).present("x", "v")
    assert len(str(caught.value)) < 5000


@pytest.mark.slow
def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    hook = ExecHook((script(tmp_path, f"cd {tmp_path}; (trap '' TERM; sleep 60) & echo begun; sleep 60"),), 0.5)
    began = time.monotonic()
    with pytest.raises(DnsHookError, match=r"not done within 0.5 s; it wrote: 'begun'"):
        hook.present("x.test", "v")
    assert time.monotonic() - began < 5
    wait_for(lambda: not (belonging_to(tmp_path, "no mark") - {os.getpid()}), 5, "something still runs")


def test_what_a_command_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    ExecHook((script(tmp_path, f"cd {tmp_path}; sleep 60 & exit 0"),), 20).present("x.test", "v")
    assert time.monotonic() - began < 5
    wait_for(lambda: not (belonging_to(tmp_path, "no mark") - {os.getpid()}), 5, "something still runs")


# --- where, and when


@needs_bind
def test_the_record_goes_where_the_cname_leads(net: Bind) -> None:
    resolver = resolver_of(net)
    assert challenge_name("acme.wrong.test", resolver) == "acme.elsewhere.good.test"
    assert challenge_name("*.acme.wrong.test", resolver) == "acme.elsewhere.good.test"
    assert challenge_name("dyn.test", resolver) == NAME


@pytest.mark.slow
@needs_bind
def test_a_delegated_proof_is_set_and_seen_from_the_customers_name(tmp_path: Path) -> None:
    """The customer's zone never changes: its CNAME leads into the dynamic zone of ours."""
    servers = {
        ROOT: {".": zone(f"test. NS ns.nic.test.\nns.nic.test. A {TLD}\nns.root. A {ROOT}", ns="ns.root.")},
        TLD: {
            "test": zone(f"ns.nic A {TLD}\ncust NS n.cust\nn.cust A {NS1}\nacme NS n.acme\nn.acme A {NS2}", ns="ns.nic")
        },
        NS1: {"cust.test": zone(f"n A {NS1}\n_acme-challenge CNAME x1.acme.test.", ns="n")},
        NS2: {"acme.test": zone(f"n A {NS2}", ns="n")},
    }
    with Bind(tmp_path, servers, keys=KEY, dynamic=("acme.test",)) as bind:
        resolver = resolver_of(bind)
        name = challenge_name("*.cust.test", resolver)
        assert name == "x1.acme.test"
        Rfc2136Hook(bind.at(NS2), None, KEY_NAME, SECRET).present(name, "proof")
        assert resolver.is_visible("_acme-challenge.cust.test", "proof")
        assert resolver.look("*.cust.test").challenge.chain == ("x1.acme.test",)


@needs_bind
def test_a_circle_of_cnames_has_no_challenge_name(net: Bind, tmp_path: Path) -> None:
    answers = lambda query, transport: [reply(query, f"{query.question[0].name} 1 IN CNAME {query.question[0].name}")]  # noqa: E731
    with ScriptedDns(answers) as server, pytest.raises(LookupFailedError, match="is met again"):
        challenge_name("x.test", Resolver((server.at,), 1.0))


@pytest.mark.slow
@needs_bind
def test_waiting_ends_when_the_lagging_server_has_the_value_too(tmp_path: Path) -> None:
    zones = {one: {"two.test": zone(f"n1 A {NS1}\nn2 A {NS2}", ns="n1 n2")} for one in (NS1, NS2)}
    root = f"ns.root. A {ROOT}\n" + "".join(
        f"two.test. NS {name}.two.test.\n{name}.two.test. A {address}\n" for name, address in (("n1", NS1), ("n2", NS2))
    )
    servers = {
        ROOT: {".": zone(root, ns="ns.root.")},
        **zones,
    }  # fmt: skip
    with Bind(tmp_path, servers, keys=KEY, dynamic=("two.test",)) as bind:
        hooks = [Rfc2136Hook(bind.at(one), "two.test", KEY_NAME, SECRET) for one in (NS1, NS2)]
        name = "_acme-challenge.two.test"
        hooks[0].present(name, "proof")
        now, slept = 0.0, []

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            slept.append(seconds)
            if len(slept) == 3:
                hooks[1].present(name, "proof")

        wait_visible(resolver_of(bind), name, "proof", 60.0, sleep, lambda: now)
        assert len(slept) == 3
        with pytest.raises(DnsHookError, match="is not to be seen at all name servers in time: it is not there yet"):
            wait_visible(resolver_of(bind), name, "another", now + 10, sleep, lambda: now)
        assert len(slept) < 12


def test_waiting_on_a_dead_resolver_ends_at_the_deadline() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.raises(DnsHookError, match=r"in time: .*Connection refused"):
        wait_visible(Resolver(("127.0.0.1:1",), 0.2), "x.test", "v", 3.0, sleep, lambda: now)
